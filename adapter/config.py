"""
`config.yaml` and the environment, read once into one frozen `Config`, or every problem with its line.

What may stand in the file is said once, by the types below: their descriptions, bounds and defaults are what
`config.yaml` documents. `_Reader` walks a tree beside such a type and goes on after a mistake, which
`msgspec.convert` does not. It reads handlers' settings in the same way.

Values are never part of a problem: any of them may be a secret in the wrong place. A value that came by reference is
a `Reference` for as long as it is text, so that its `repr` shows where it came from and not what it is.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NewType,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import msgspec
from msgspec import Meta
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from adapter.plugin import Secret, Settings, Url

LARGEST_FILE_BYTES = 1024 * 1024
LARGEST_SECRET_BYTES = 64 * 1024
MOST_VALUES = 100_000  # after aliases are followed: a few lines of aliases can stand for billions
DEEPEST = 64
SHORTEST_URL_KEY_BYTES = 16
PARAMETERS_OF_SIGNED_URLS = ("merchant", "channel", "key", "sig")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong at one place of the configuration, and what is allowed there."""

    file: str
    line: int | None  # counted from 1; None where there is no line to show, such as a file that is not there
    path: str  # "routes.export-payment.settings.base_url"; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigurationInvalid(Exception):
    """The configuration cannot be used. `problems` are all of them, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))
        super().__init__("\n".join(map(str, self.problems)))


class Reference(str):
    """Text that `${env:NAME}` or `${file:PATH}` stands for. It is the text; its `repr` is the reference."""

    __slots__ = ("source",)
    source: str

    def __new__(cls, text: str, source: str) -> "Reference":
        reference = super().__new__(cls, text)
        reference.source = source
        return reference

    def __repr__(self) -> str:
        return repr(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The file that a `Config` was read from: where each value stands, and which texts must not be shown."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    resolved: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"<{self.file}>"

    def problem(self, path: str, message: str) -> Problem:
        """At the line of `path`, or of the nearest place around it that is in the file."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = _around(nearest)
        return Problem(file=self.file, line=self.lines.get(nearest), path=path, message=message)

    def masked(self, message: str) -> str:
        """A message that somebody else wrote, without the texts that came by reference."""
        for text in sorted(self.resolved, key=len, reverse=True):
            message = message.replace(text, "***")
        return message


# --- what may stand in the file -------------------------------------------------------------------------------------


class Within(NamedTuple):
    """The bounds of a duration, in the form in which durations are written."""

    shortest: str
    longest: str


def says(description: str | None = None, *, allowed: str | None = None, **bounds: Any) -> Meta:
    """What a key means; `allowed` says what may stand there, where type and bounds would say it badly."""
    return Meta(description=description, extra={"allowed": allowed} if allowed else None, **bounds)


Name: TypeAlias = Annotated[
    str,
    says(
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*(?!\n)$",
        max_length=64,
        allowed="kebab-case (a-z, 0-9 and single hyphens), at most 64 characters",
    ),
]
# Travels in the headers `x-merchant` and `x-channel`, in URLs and in metrics.
NorceName: TypeAlias = Annotated[
    str, says(pattern=r"^[!-~]+(?!\n)$", max_length=64, allowed="1 to 64 visible ASCII characters without spaces")
]
SLUG = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(?!\n)$"
SLUG_IN_WORDS = "a part of a host name (a-z, 0-9 and hyphens within), at most 63 characters"
Port: TypeAlias = Annotated[int, says(ge=0, le=65535)]
Positive: TypeAlias = Annotated[int, says(ge=1, le=1024)]
OneOrTwoSecrets: TypeAlias = Annotated[tuple[Secret, ...], says(min_length=1, max_length=2)]
Merchants: TypeAlias = Annotated[tuple[str, ...], says(min_length=1)]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the file: a key a field."""


class Adapter(_Part, frozen=True, kw_only=True):
    id: Annotated[
        str,
        says(
            "The id of this adapter at Norce: on its registrations, and in the name of its schema.",
            min_length=1,
            max_length=64,
        ),
    ]
    public_url: Annotated[
        Url | None, says("The address at which Norce reaches the public port; signed URLs are made from it.")
    ] = None


class Server(_Part, frozen=True, kw_only=True):
    host: Annotated[str, says("The address that the public port listens on.", min_length=1)] = "0.0.0.0"  # noqa: S104
    port: Annotated[Port, says("The public port, which Norce calls; 0 takes any free one.")] = 8080
    max_body_bytes: Annotated[
        int, says("The largest body that is read, in bytes; a larger is a 413.", ge=1024, le=64 * 1024 * 1024)
    ] = 1024 * 1024
    receive_timeout: Annotated[
        timedelta,
        Within("100ms", "5m"),
        says("How long a caller may take to send its whole body; after that it is a 408."),
    ] = timedelta(seconds=10)


class Operations(_Part, frozen=True, kw_only=True):
    host: Annotated[str, says("The address that the operations port listens on; keep it private.", min_length=1)] = (
        "127.0.0.1"
    )
    port: Annotated[Port, says("The port of health, metrics, commands and the console; 0 takes any free one.")] = 8081
    token: Annotated[Secret | None, says("The bearer token of commands; without one, every command is refused.")] = None


class Store(_Part, frozen=True, kw_only=True):
    url: Annotated[
        str,
        says(
            "Where notifications and deliveries are kept: sqlite:/// and a path, relative to the working "
            "directory (four slashes for an absolute one); by reference where it holds a password."
        ),
    ] = "sqlite:///data/adapter.db"


class Norce(_Part, frozen=True, kw_only=True):
    environment: Annotated[
        Literal["playground", "stage", "production"], says("Which of Norce's environments to talk with.")
    ] = "playground"
    base_url: Annotated[Url | None, says("Replaces Norce's own addresses, for a simulator or a private network.")] = (
        None
    )
    timeout: Annotated[timedelta, Within("100ms", "1m"), says("How long one request to Norce may take.")] = timedelta(
        seconds=5
    )


class Dispatcher(_Part, frozen=True, kw_only=True):
    slots: Annotated[Positive, says("How many deliveries run at once in this process.")] = 32
    grace: Annotated[
        timedelta, Within("0s", "10m"), says("How long a shutdown waits for running deliveries before it cancels them.")
    ] = timedelta(seconds=20)


class Override(_Part, frozen=True, kw_only=True):
    settings: Annotated[
        Mapping[str, Any],
        says("Settings in place of the weaker ones: mappings are merged, everything else is replaced."),
    ] = {}


class Channel(_Part, frozen=True, kw_only=True):
    routes: Annotated[
        Mapping[str, Override],
        says("What is different on this channel, by route; stronger than the route and the merchant."),
    ] = {}


class Merchant(_Part, frozen=True, kw_only=True):
    slug: Annotated[
        str,
        says(
            "The merchant's part of Norce's host names; the merchant's name where it is left out.",
            pattern=SLUG,
            allowed=SLUG_IN_WORDS,
        ),
    ] = ""
    tokens: Annotated[
        OneOrTwoSecrets, says("The bearer tokens that Norce issued for this merchant; two while one is being replaced.")
    ]
    routes: Annotated[
        Mapping[str, Override], says("What is different for this merchant, by route; stronger than the route.")
    ] = {}
    channels: Annotated[
        Mapping[NorceName, Channel],
        says("The merchant's channels by their names at Norce.", min_length=1),
    ]


class SignedUrls(_Part, frozen=True, kw_only=True):
    keys: Annotated[
        Mapping[
            Annotated[
                str,
                says(
                    pattern=r"^[A-Za-z0-9_-]+(?!\n)$",
                    max_length=32,
                    allowed="a name of 1 to 32 letters, digits, hyphens and underscores",
                ),
            ],
            Secret,
        ],
        says(
            "Keys of at least 16 bytes by their names: the first signs, all verify. Put a new one first, "
            "and take the old one out when no open order carries it any more.",
            min_length=1,
        ),
    ]


class _SharedSecret(_Part, frozen=True, kw_only=True):
    values: Annotated[OneOrTwoSecrets, says("The values that are accepted; two while one is being replaced.")]
    merchants: Annotated[
        Merchants | None, says("Whose orders the secret is good for; every merchant's where left out.")
    ] = None


class HeaderSecret(_SharedSecret, frozen=True, kw_only=True):
    header: Annotated[
        str,
        says(
            "The header that carries the secret, in any case; the secret is its whole value.",
            pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+(?!\n)$",
            max_length=64,
            allowed="the name of an HTTP header",
        ),
    ]


class UrlSecret(_SharedSecret, frozen=True, kw_only=True):
    parameter: Annotated[
        str,
        says(
            "The query parameter that carries the secret, for registrations that cannot be signed.",
            pattern=r"^[A-Za-z0-9_.~-]+(?!\n)$",
            max_length=64,
            allowed="the name of a query parameter: letters, digits and . _ ~ -",
        ),
    ]


class Senders(_Part, frozen=True, kw_only=True):
    signed_urls: Annotated[
        SignedUrls | None, says("Callback URLs that carry a signature per merchant, channel, order and callback.")
    ] = None
    header_secrets: Annotated[
        tuple[HeaderSecret, ...], says("Secrets that Norce, or a gateway before us, sends in a header.")
    ] = ()
    url_secrets: Annotated[
        tuple[UrlSecret, ...],
        says("Secrets in the query of statically registered URLs; they end up in other people's logs."),
    ] = ()


Schema: TypeAlias = bool | dict[str, Any]


class NotificationCallback(_Part, frozen=True, kw_only=True, tag="notification", tag_field="kind"):
    """Something happened: stored, and delivered to the routes that want it."""

    kind: ClassVar[str] = "notification"
    scope: Annotated[str, says("The JSON pointer of what is watched in the order: /state/currentStatus.")]
    schema: Annotated[
        Schema, says("The JSON Schema (2020-12) that the value at the scope meets; true for any value.")
    ] = True


class ValidationCallback(_Part, frozen=True, kw_only=True, tag="validation", tag_field="kind"):
    """May this order proceed? Answered inside the deadline."""

    kind: ClassVar[str] = "validation"
    deadline: Annotated[
        timedelta,
        Within("100ms", "10s"),
        says("When Norce has its answer at the latest; an unfinished route then counts as its no_answer."),
    ] = timedelta(seconds=2)


Callback: TypeAlias = NotificationCallback | ValidationCallback


class When(_Part, frozen=True, kw_only=True):
    scope: Annotated[str, says("The JSON pointer of what the route looks at in the order.")]
    schema: Annotated[
        Schema, says("The JSON Schema (2020-12) that the value at the scope meets; true for any value.")
    ] = True


class Retries(_Part, frozen=True, kw_only=True):
    schedule: Annotated[
        tuple[Annotated[timedelta, Within("100ms", "7d")], ...],
        says("How long to wait after each failed attempt; then it is a dead letter.", max_length=50),
    ] = (
        timedelta(seconds=5),
        timedelta(seconds=30),
        timedelta(minutes=5),
        timedelta(minutes=30),
        *(timedelta(hours=hours) for hours in (2, 5, 10, 14, 20, 24)),
    )


class Route(_Part, frozen=True, kw_only=True):
    callback: Annotated[str, says("The callback that the route wants or answers.")]
    when: Annotated[
        When | None, says("A further condition; the route is asked where the callback's and this one hold.")
    ] = None
    handler: Annotated[Name, says("The name of an installed handler; `norce-adapter handlers` lists them.")]
    refetch: Annotated[
        bool, says("Notifications: act on the order as Norce has it now, in place of the order as it came.")
    ] = True
    no_answer: Annotated[
        Literal["approve", "reject"] | None,
        says("Validations, required there: what a late, broken or missing answer counts as."),
    ] = None
    timeout: Annotated[timedelta, Within("100ms", "10m"), says("Notifications: how long one attempt may take.")] = (
        timedelta(seconds=15)
    )
    retry: Annotated[Retries, says("Notifications: what happens after an attempt that failed.")] = Retries()
    concurrency: Annotated[
        Positive, says("Notifications: how many deliveries run at once, per process, merchant and channel.")
    ] = 8
    settings: Annotated[
        Mapping[str, Any], says("The handler's settings for every merchant and channel that does not say otherwise.")
    ] = {}


ONLY_FOR_NOTIFICATIONS = ("refetch", "timeout", "retry", "concurrency")


class ConfigFile(_Part, frozen=True, kw_only=True):
    """What stands in the file."""

    adapter: Annotated[Adapter, says("Who we are.")]
    server: Annotated[Server, says("The public port.")] = Server()
    operations: Annotated[Operations, says("The port for the people and machines that run this.")] = Operations()
    store: Annotated[Store, says("What survives a restart.")] = Store()
    norce: Annotated[Norce, says("Norce Checkout, as we call it.")] = Norce()
    dispatcher: Annotated[Dispatcher, says("The work on notifications.")] = Dispatcher()
    merchants: Annotated[Mapping[NorceName, Merchant], says("The merchants by their ids at Norce.", min_length=1)]
    senders: Annotated[Senders, says("Who may call us; at least one kind.")] = Senders()
    callbacks: Annotated[
        Mapping[Name, Callback], says("What Norce calls, by name; each is one URL and one registration.")
    ] = {}
    routes: Annotated[Mapping[Name, Route], says("Who wants or answers a callback, by name.")] = {}


class Config(ConfigFile, frozen=True, kw_only=True):
    """The whole configuration, checked except for what only the installed handlers can know."""

    source: Source

    def problem(self, path: str, message: str) -> Problem:
        """Something that turned out later, at the line of `path` ("routes.export-payment.handler")."""
        return self.source.problem(path, message)

    def settings(self, route: str, merchant: str, channel: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A route's settings for one merchant and channel, merged, and where they came from: for `read_settings`."""
        of_merchant = self.merchants[merchant]
        of_channel = of_merchant.channels[channel]
        at_merchant = under("merchants", merchant)
        at_channel = under(f"{at_merchant}.channels", channel)
        tree = merged(
            self.routes[route].settings,
            of_merchant.routes.get(route, Override()).settings,
            of_channel.routes.get(route, Override()).settings,
        )
        return tree, tuple(
            f"{under(f'{at}routes', route)}.settings" for at in ("", f"{at_merchant}.", f"{at_channel}.")
        )


# --- reading --------------------------------------------------------------------------------------------------------


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """
    The configuration in the file at `path`, with references resolved from `environ` and from files beside it.

    Raises `ConfigurationInvalid` with every problem there is. Conditions, handlers and settings are checked by
    `adapter.routes`, which reports through `Config.problem` and `read_settings`.
    """
    document = _Document(path, environ)
    problems, source = document.problems, document.source
    tree = document.read()
    if not isinstance(tree, dict):
        raise ConfigurationInvalid(problems)
    reader = _Reader(lambda at, message: problems.append(source.problem(at, message)), source.masked)
    read = reader.read(ConfigFile, _refuse_hooks(tree, reader), "")
    _check_together(tree, reader)
    if problems:
        raise ConfigurationInvalid(problems)
    merchants = {
        name: merchant if merchant.slug else msgspec.structs.replace(merchant, slug=name)
        for name, merchant in read.merchants.items()
    }
    return Config(**(msgspec.structs.asdict(read) | {"merchants": merchants}), source=source)


S = TypeVar("S", bound=Settings)


def read_settings(
    config: Config, type_: type[S], tree: Mapping[str, Any], paths: Sequence[str]
) -> S | tuple[Problem, ...]:
    """
    Merged settings as the type that a handler declares, or every problem in them.

    `paths` are the places that `tree` was merged from, weakest first; a problem is shown at the strongest of them
    that has the offending value. What no place has is missing from the weakest, the route itself.
    """
    problems: list[Problem] = []
    lines = config.source.lines

    def report(at: str, message: str) -> None:
        nearest, holders = at, [path for path in paths if _joined(path, at) in lines]
        while nearest and not holders:
            nearest = _around(nearest)
            holders = [path for path in paths if nearest and _joined(path, nearest) in lines]
        strongest = (holders or paths[:1])[-1]
        problems.append(config.source.problem(_joined(strongest, at), message))

    settings = _Reader(report, config.source.masked).read(type_, tree, "")
    return tuple(problems) if problems else cast("S", settings)


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of settings as one, weakest first: mappings are merged, everything else (null, lists) is replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            weaker = result.get(key)
            if isinstance(value, Mapping):
                value = merged(weaker if isinstance(weaker, Mapping) else {}, value)
            result[key] = value
    return result


def under(path: str, step: str | int) -> str:
    """The path of a member or an item: `a.b`, `a[0]`, and `a["b c"]` where the name is not a plain one."""
    if isinstance(step, int):
        return f"{path}[{step}]"
    if not _PLAIN.fullmatch(step):
        return f"{path}[{json.dumps(step, ensure_ascii=False)}]"
    return f"{path}.{step}" if path else step


_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_LAST_STEP = re.compile(r'(?:\.?[A-Za-z0-9_-]+|\[\d+\]|\["(?:[^"\\]|\\.)*"\])\Z')


def _around(path: str) -> str:
    return _LAST_STEP.sub("", path)


def _joined(path: str, rest: str) -> str:
    return path + rest if not rest or rest.startswith("[") else f"{path}.{rest}"


# --- what only makes sense together ---------------------------------------------------------------------------------


def _members(tree: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at these keys, empty where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _refuse_hooks(tree: dict[str, Any], reader: "_Reader") -> dict[str, Any]:
    """The tree without hooks: one that is not served yet is one problem, not one for each of its keys."""
    callbacks = _members(tree, "callbacks")
    hooks = [name for name in callbacks if _members(callbacks, name).get("kind") == "hook"]
    for name in hooks:
        reader.report(
            f"{under('callbacks', name)}.kind", "hooks are not served yet; it must be notification or validation"
        )
    served = {name: callback for name, callback in callbacks.items() if name not in hooks}
    return tree | {"callbacks": served} if hooks else tree


def _check_together(tree: Mapping[str, Any], reader: "_Reader") -> None:
    _check_addresses(tree, reader)
    _check_senders(tree, reader)
    _check_merchants(tree, reader)
    _check_routes(tree, reader)


def _check_addresses(tree: Mapping[str, Any], reader: "_Reader") -> None:
    url = reader.values.get("store.url", Store().url)
    if url.startswith("postgresql+psycopg://"):
        reader.report("store.url", "PostgreSQL comes later; use sqlite:///data/adapter.db")  # until it is served
    elif not re.fullmatch(r"sqlite:///(?!:memory:)[^?#]+", url):
        reader.report("store.url", "must be sqlite:/// and the path of a file")
    if re.search(r"//[^/@]*:[^/@]*@", url) and not isinstance(url, Reference):
        reader.report("store.url", f"holds a password; give the whole address by reference: {HOW_TO_REFER}")
    server, operations = (
        reader.values.get(f"{name}.port") if "port" in _members(tree, name) else default.port
        for name, default in (("server", Server()), ("operations", Operations()))
    )
    if server and server == operations:
        reader.report("operations.port", "must be another port than server.port")


def _check_senders(tree: Mapping[str, Any], reader: "_Reader") -> None:
    senders = _members(tree, "senders")
    if not any(senders.get(kind) for kind in ("signed_urls", "header_secrets", "url_secrets")):
        reader.report(
            "senders",
            "nobody may call this adapter; configure signed_urls, header_secrets or url_secrets, "
            'such as signed_urls: {keys: {k1: "${env:NORCE_ADAPTER_URL_KEY}"}}',
        )
    adapter = _members(tree, "adapter")
    if senders.get("signed_urls") and adapter and "public_url" not in adapter:
        reader.report("adapter.public_url", "is missing; senders.signed_urls signs addresses that begin with it")
    for name in _members(senders, "signed_urls", "keys"):
        at = under("senders.signed_urls.keys", name)
        if isinstance(key := reader.values.get(at), Secret) and len(key.reveal().encode()) < SHORTEST_URL_KEY_BYTES:
            reader.report(at, f"is too short for a key: at least {SHORTEST_URL_KEY_BYTES} bytes are needed")
    merchants = _members(tree, "merchants")
    for kind in ("header_secrets", "url_secrets"):
        entries = senders.get(kind)
        for entry in range(len(entries) if isinstance(entries, list) else 0):
            at = f"senders.{kind}[{entry}]"
            for index, merchant in enumerate(reader.values.get(f"{at}.merchants") or ()):
                if merchant not in merchants:
                    reader.report(f"{at}.merchants[{index}]", f"must be a merchant: {_list_of(merchants, merchant)}")
            if reader.values.get(f"{at}.parameter") in PARAMETERS_OF_SIGNED_URLS:
                taken = _list_of(PARAMETERS_OF_SIGNED_URLS, join="and")
                reader.report(f"{at}.parameter", f"must be another name; {taken} belong to signed URLs")


def _check_merchants(tree: Mapping[str, Any], reader: "_Reader") -> None:
    routes, replaced = _members(tree, "routes"), "base_url" in _members(tree, "norce")
    for name, merchant in _members(tree, "merchants").items():
        at = under("merchants", name)
        if isinstance(merchant, Mapping) and "slug" not in merchant and not re.match(SLUG, name) and not replaced:
            reader.report(f"{at}.slug", f"is missing, and the merchant's name is none; it must be {SLUG_IN_WORDS}")
        channels = _members(merchant, "channels")
        places = {at: merchant} | {under(f"{at}.channels", channel): channels[channel] for channel in channels}
        for place, level in places.items():
            for route in _members(level, "routes"):
                if route not in routes:
                    reader.report(under(f"{place}.routes", route), f"must be a route: {_list_of(routes, route)}")


def _check_routes(tree: Mapping[str, Any], reader: "_Reader") -> None:
    callbacks = _members(tree, "callbacks")
    for name in _members(tree, "routes"):
        route, at = _members(tree, "routes", name), under("routes", name)
        callback = reader.values.get(f"{at}.callback")
        if callback is not None and callback not in callbacks:
            reader.report(f"{at}.callback", f"must be a callback: {_list_of(callbacks, callback)}")
        kind = _members(callbacks, callback or "").get("kind")
        if kind == "validation":
            if "no_answer" not in route:
                reader.report(
                    f"{at}.no_answer",
                    "is missing; it must be approve or reject: what a late, broken or missing answer counts as",
                )
            for key in ONLY_FOR_NOTIFICATIONS:
                if key in route:
                    reader.report(f"{at}.{key}", "is for notifications only; leave it out of a validation's route")
        elif kind == "notification" and "no_answer" in route:
            reader.report(f"{at}.no_answer", "is for validations only; leave it out of a notification's route")


# --- the file as a tree ---------------------------------------------------------------------------------------------

_NOTHING: Any = object()  # stands where a value could not be had, after its problem was reported
_REFERENCE = re.compile(r"\$\{(env|file):([^{}]+)\}")
HOW_TO_REFER = "${env:NAME} or ${file:PATH}"


class _Unreadable(Exception):
    """No tree can be had from the file. Carries the message and, where there is one, the line."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


class _Document:
    """Reads YAML 1.2 into a plain tree, resolves references, and remembers the line of every place."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.path = path
        self.environ = environ
        self.source = Source(file=str(path))
        self.problems: list[Problem] = []
        self.values = 0

    def report(self, path: str, message: str, line: int | None = None) -> None:
        problem = self.source.problem(path, message)
        self.problems.append(problem if line is None else dataclasses.replace(problem, line=line))

    def read(self) -> Any:
        try:
            root = _composed(_text(self.path, LARGEST_FILE_BYTES))
            if not isinstance(root, MappingNode):
                raise _Unreadable("must be a mapping: adapter, merchants, senders, callbacks, routes and so on")
            self.source.lines[""] = _line(root)
            return self.value(root, "", 0)
        except _Unreadable as unreadable:
            self.report("", unreadable.message, unreadable.line)
            return _NOTHING

    def value(self, node: Node, path: str, depth: int) -> Any:
        self.values += 1
        if self.values > MOST_VALUES or depth > DEEPEST:
            raise _Unreadable(
                f"holds too much: at most {MOST_VALUES} values, {DEEPEST} levels deep, aliases counted", _line(node)
            )
        if isinstance(node, MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                at = under(path, index)
                self.source.lines[at] = _line(item)
                items.append(self.value(item, at, depth + 1))
            return items
        return self.scalar(cast("ScalarNode", node), path)

    def mapping(self, node: MappingNode, path: str, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, member in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                self.report(path, "has a key that is not plain text; merge keys (<<) are not YAML 1.2", _line(key))
                continue
            # As it is written: a channel may be called 1, a country NO, and neither has to be quoted.
            name = key.value
            at = under(path, name)
            if name in members:
                first = self.source.lines[at]
                self.report(at, f"stands here twice, first in line {first}; a key is given once", _line(key))
                continue
            self.source.lines[at] = _line(key)
            members[name] = self.value(member, at, depth + 1)
        return members

    def scalar(self, node: ScalarNode, path: str) -> Any:
        text: str = node.value
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("int", "float"):
            digits = text.replace("_", "")
            radix = 0 if digits.lstrip("+-").startswith(("0o", "0x", "0b")) else 10
            try:
                number = int(digits, radix) if kind == "int" else float(digits)
                if math.isfinite(number):
                    return number
            except (ValueError, OverflowError):
                pass
            self.report(path, "must be a finite number; put it in quotes if it is meant as text")
            return _NOTHING
        if kind not in ("str", "bool", "timestamp"):
            self.report(path, "has a tag; tags (!name) are not allowed, plain YAML values are")
            return _NOTHING
        return self.text(text, path)

    def text(self, text: str, path: str) -> Any:
        if "${env:" not in text and "${file:" not in text:
            return text
        match = _REFERENCE.fullmatch(text)
        if match is None:
            self.report(path, f"has a reference that is not the whole value; allowed is {HOW_TO_REFER} alone")
            return _NOTHING
        try:
            resolved = self.resolved(match[1], match[2])
        except _Unreadable as unreadable:
            self.report(path, f"{text} {unreadable.message}")
            return _NOTHING
        self.source.resolved.add(resolved)
        return Reference(resolved, text)

    def resolved(self, kind: str, name: str) -> str:
        if kind == "file":
            text = _text(self.path.parent / name, LARGEST_SECRET_BYTES).removesuffix("\n").removesuffix("\r")
        elif name in self.environ:
            text = self.environ[name]
        else:
            raise _Unreadable("names an environment variable that is not set; set it before the start")
        if not text.strip():
            raise _Unreadable("is empty; a reference must lead to a value")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _Unreadable("is not UTF-8; only text can be referred to")
        return text


def _text(path: Path, largest: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(largest + 1)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {(error.strerror or type(error).__name__).lower()}") from None
    except ValueError:
        raise _Unreadable("cannot be read: not the name of a file") from None
    if len(raw) > largest:
        raise _Unreadable(f"is larger than {largest} bytes, which is the most that is read")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Unreadable("is not UTF-8, the only encoding that is read", line) from None


def _composed(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    try:
        return cast("Node | None", yaml.compose(text))
    except MarkedYAMLError as error:
        # Never str(error): it quotes the line, and the line may hold a secret.
        mark = error.problem_mark or error.context_mark
        what = re.sub(r"'[^'<]{2,}'", "'…'", str(error.problem or error.context))
        raise _Unreadable(f"is not YAML: {what}", mark.line + 1 if mark else None) from None
    except ReaderError as error:
        raise _Unreadable(
            "is not YAML: control characters are not allowed", text.count("\n", 0, error.position) + 1
        ) from None
    except YAMLError:
        raise _Unreadable("is not YAML") from None
    except RecursionError:
        raise _Unreadable(f"is nested too deeply; at most {DEEPEST} levels are read") from None


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


# --- a tree as the types above --------------------------------------------------------------------------------------

_DURATION = re.compile(r"(\d{1,9})(ms|s|m|h|d)")
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LISTS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    Sequence: tuple,
    Collection: tuple,
}
_MAPPINGS = (dict, Mapping)


class _Reader:
    """
    Makes values of declared types from a tree, and goes on after a mistake: each is reported with its path.

    `values` has what was read, by path, for checks that need several places; what could not be read is not in it.
    """

    def __init__(self, report: Callable[[str, str], None], masked: Callable[[str], str]) -> None:
        self.report = report
        self.masked = masked
        self.values: dict[str, Any] = {}

    def read(self, type_: Any, value: Any, path: str) -> Any:
        result = _NOTHING if value is _NOTHING else self.read_anew(type_, value, path)
        if result is not _NOTHING:
            self.values[path] = result
        return result

    def read_anew(self, type_: Any, value: Any, path: str) -> Any:
        base, _ = _bare(type_)
        kind = _class(base)
        if kind in (Union, UnionType):
            return self.union(type_, value, path)
        if isinstance(value, Mapping) and _is_struct(base):
            return self.struct(base, value, path)
        if isinstance(value, Mapping) and kind in _MAPPINGS:
            return self.mapping(type_, value, path)
        if isinstance(value, list) and kind in _LISTS and (kind is not tuple or Ellipsis in get_args(base)):
            return self.list(type_, value, path)
        return self.leaf(type_, value, path)

    def union(self, type_: Any, value: Any, path: str) -> Any:
        base, notes = _bare(type_)
        members = [member for member in get_args(base) if member is not NoneType]
        if value is None and len(members) < len(get_args(base)):
            return None
        if isinstance(value, Mapping):
            structs = [member for member in members if _is_struct(member)]
            if len(structs) > 1:
                return self.tagged(structs, value, path)
            fitting = structs or [member for member in members if _class(member) in _MAPPINGS]
        elif isinstance(value, list):
            fitting = [member for member in members if _class(member) in _LISTS]
        else:
            fitting = []
        if len(members) == 1:
            fitting = members
        return self.read_anew(_noted(fitting[0], notes), value, path) if fitting else self.leaf(type_, value, path)

    def tagged(self, structs: list[Any], value: Mapping[str, Any], path: str) -> Any:
        by_tag = {_class(struct).__struct_config__.tag: struct for struct in structs}
        key = _class(structs[0]).__struct_config__.tag_field
        tag = self.read(Literal[tuple(by_tag)], value[key], under(path, key)) if key in value else None
        if key not in value:
            self.report(under(path, key), f"is missing; it must be {_list_of(by_tag)}")
        return self.read_anew(by_tag[tag], value, path) if tag in by_tag else _NOTHING

    def struct(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        config = _class(type_).__struct_config__
        fields = {declared.encode_name: declared for declared in msgspec.structs.fields(type_)}
        known = [config.tag_field, *fields] if config.tag_field else [*fields]
        for key in value:
            if key not in known:
                allowed = _list_of(known, key) if known else "no key at all"
                self.report(under(path, key), f"is not a key here; allowed: {allowed}")
        arguments = {}
        for key, declared in fields.items():
            if key in value:
                arguments[declared.name] = self.read(declared.type, value[key], under(path, key))
            elif declared.required:
                self.report(under(path, key), f"is missing; it must be {_allowed_in(declared.type)}")
                arguments[declared.name] = _NOTHING
        if _NOTHING in arguments.values():
            return _NOTHING
        try:
            return type_(**arguments)
        except (ValueError, TypeError) as error:
            self.report(path, self.masked(str(error)))
            return _NOTHING

    def mapping(self, type_: Any, value: Mapping[str, Any], path: str) -> Any:
        of_key, of_value = get_args(_bare(type_)[0]) or (str, Any)
        result = {}
        for name, member in value.items():
            at = under(path, name)
            key = self.leaf(of_key, name, at, "the name ")
            if (read := self.read(of_value, member, at)) is not _NOTHING and key is not _NOTHING:
                result[key] = read
        return self.sized(type_, len(value), result if len(result) == len(value) else _NOTHING, path)

    def list(self, type_: Any, value: list[Any], path: str) -> Any:
        base, _ = _bare(type_)
        of_item = (*get_args(base), Any)[0]
        items = [self.read(of_item, item, under(path, index)) for index, item in enumerate(value)]
        result = _NOTHING if any(item is _NOTHING for item in items) else _LISTS[_class(base)](items)
        return self.sized(type_, len(value), result, path)

    def sized(self, type_: Any, size: int, result: Any, path: str) -> Any:
        least, most = _bound(type_, "min_length"), _bound(type_, "max_length")
        if (least is not None and size < least) or (most is not None and size > most):
            self.report(path, f"must be {_allowed_in(type_)}; there are {size}")
            return _NOTHING
        return result

    def leaf(self, type_: Any, value: Any, path: str, subject: str = "") -> Any:
        base, _ = _bare(type_)
        message = f"{subject}must be {_allowed_in(type_)}{_contrast(base, value)}"
        try:
            if base is timedelta:
                return _duration(type_, value)
            # A reference is text, as every name is; for a number it is the text that spells it.
            spelt = base in (int, float, bool) and (isinstance(value, Reference) or subject != "")
            return msgspec.convert(str(value) if spelt else value, type_, strict=not spelt, dec_hook=_custom)
        except msgspec.ValidationError as error:
            if error.__cause__ is not None:  # what the type itself says: an address, a secret, a plugin's own
                message = self.masked(str(error.__cause__))
            elif " - at `" in str(error):  # within a type that is not walked, such as a dataclass
                message = self.masked(str(error))
        except ValueError:
            pass
        self.report(path, message)
        return _NOTHING


def _bare(type_: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its notes (`Annotated`), and the notes, the outermost last."""
    notes: tuple[Any, ...] = ()
    while True:
        if get_origin(type_) is Annotated:
            type_, notes = type_.__origin__, (*type_.__metadata__, *notes)
        elif isinstance(type_, NewType):
            type_ = type_.__supertype__
        else:
            return type_, notes


def _noted(type_: Any, notes: tuple[Any, ...]) -> Any:
    return Annotated[(type_, *notes)] if notes else type_


def _class(type_: Any) -> Any:
    base, _ = _bare(type_)
    origin = get_origin(base) or base
    return origin if isinstance(origin, type) or origin is Union else object


def _is_struct(type_: Any) -> bool:
    kind = _class(type_)
    return kind is not Union and issubclass(kind, msgspec.Struct)


def _bound(type_: Any, name: str) -> Any:
    notes = [note for note in _bare(type_)[1] if isinstance(note, Meta)]
    return next((bound for note in notes if (bound := getattr(note, name)) is not None), None)


def _custom(type_: Any, value: Any) -> Any:
    if type_ is Secret:
        if not isinstance(value, Reference):
            raise ValueError(f"is a secret, which is given by reference only: {HOW_TO_REFER}")
        return Secret(str(value))
    if not isinstance(value, str):
        raise ValueError(f"must be {_allowed_in(type_)}, not {_kind(value)}")
    return type_(str(value))


def _duration(type_: Any, value: Any) -> timedelta:
    duration = _spelt_duration(value) if isinstance(value, str) else None
    if duration is None:
        raise ValueError("not a duration")
    for note in _bare(type_)[1]:
        if isinstance(note, Within) and not (
            _spelt_duration(note.shortest) <= duration <= _spelt_duration(note.longest)
        ):
            raise ValueError("out of bounds")
    return duration


def _spelt_duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("not a duration")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


# --- the words of a problem -----------------------------------------------------------------------------------------

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    Decimal: "a number",
    bool: "true or false",
    timedelta: "a duration such as 500ms, 2s, 5m, 2h or 1d",
    Secret: f"a secret by reference: {HOW_TO_REFER}",
    Url: "an https:// address",
    Any: "any value",
}


def _allowed_in(type_: Any) -> str:
    base, notes = _bare(type_)
    for note in notes:
        if isinstance(note, Meta) and note.extra and "allowed" in note.extra:
            return str(note.extra["allowed"])
    kind = _class(base)
    if get_origin(base) is Literal:
        return _list_of(get_args(base))
    if kind in (Union, UnionType):
        members = [member for member in get_args(base) if member is not NoneType]
        return " or ".join(dict.fromkeys(_allowed_in(_noted(member, notes)) for member in members))
    if issubclass(kind, Enum):
        return _list_of([member.value for member in kind])
    if _is_struct(base) or kind in _MAPPINGS:
        return "a mapping" + _size(type_, "entry", "entries")
    if kind in _LISTS:
        return (
            f"a list{_size(type_, 'item', 'items')}, each {_allowed_in(get_args(base)[0])}"
            if get_args(base)
            else "a list"
        )
    words = _WORDS.get(base) or f"a value of the type {getattr(base, '__name__', base)}"
    for note in notes:
        if isinstance(note, Within):
            words += f", from {note.shortest} to {note.longest}"
    words += _size(type_, "character", "characters") if base is str else _range(type_)
    pattern = _bound(type_, "pattern")
    return f"{words} matching {pattern}" if pattern else words


def _size(type_: Any, one: str, many: str) -> str:
    least, most = _bound(type_, "min_length") or 0, _bound(type_, "max_length")
    if most is None:
        return f" of at least {least} {one if least == 1 else many}" if least else ""
    return f" of {least} to {most} {many}" if least != most else f" of {least} {one if least == 1 else many}"


def _range(type_: Any) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}
    bounds = [f"{word} {bound}" for name, word in words.items() if (bound := _bound(type_, name)) is not None]
    return f", {' and '.join(bounds)}" if bounds else ""


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "empty" if value is None else "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a mapping"


def _contrast(base: Any, value: Any) -> str:
    """What was found in place of what is allowed, by its kind and never by its value."""
    given, kind = _kind(value), _class(base)
    if given in ("a number", "true or false"):
        if base is str:
            return f", not {given}: put it in quotes"
        if base is timedelta:
            return f", not {given}: write its unit"
    if kind in (Union, UnionType):
        return f", not {given}"
    if base in (int, float, Decimal):
        expected = "a number"
    elif base is bool:
        expected = "true or false"
    elif _is_struct(base) or kind in _MAPPINGS:
        expected = "a mapping"
    else:
        expected = "a list" if kind in _LISTS else "text"
    return "" if given == expected else f", not {given}"


def _list_of(names: Iterable[Any], given: str = "", join: str = "or") -> str:
    known = [str(name) for name in names]
    near = difflib.get_close_matches(given, known, n=1)
    listed = ", ".join(known) if len(known) < 2 else f"{', '.join(known[:-1])} {join} {known[-1]}"
    return f"{listed}; did you mean {near[0]}?" if near and len(known) > 1 else listed or "none is configured"
