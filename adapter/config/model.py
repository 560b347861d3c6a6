"""
What may stand in `config.yaml`, said once: keys, types, bounds, defaults and their descriptions.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta

from adapter.config.problems import Problem, Source, under
from adapter.identifiers import Channel
from adapter.plugin import Secret, Url


def says(
    description: str | None = None, *, allowed: str | None = None, within: tuple[str, str] | None = None, **bounds: Any
) -> Meta:
    """
    What a key means. `allowed` are the words for what may stand there, where those of type and bounds would be bad;
    `within` bounds a duration.
    """
    if within is not None:
        description = f"{description or ''} From {within[0]} to {within[1]}.".strip()
    return Meta(description=description, extra={"allowed": allowed, "within": within}, **bounds)


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


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of the file: each field is a key."""


class AdapterConfig(_Section, frozen=True, kw_only=True):
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


class ServerConfig(_Section, frozen=True, kw_only=True):
    host: Annotated[str, says("The address that the public port listens on.", min_length=1)] = "0.0.0.0"  # noqa: S104
    port: Annotated[Port, says("The public port, which Norce calls; 0 takes any free one.")] = 8080
    max_body_bytes: Annotated[
        int, says("The largest body that is read, in bytes; a larger is a 413.", ge=1024, le=64 * 1024 * 1024)
    ] = 1024 * 1024
    receive_timeout: Annotated[
        timedelta,
        says("How long a caller may take to send its whole body; after that it is a 408.", within=("100ms", "5m")),
    ] = timedelta(seconds=10)


class OperationsConfig(_Section, frozen=True, kw_only=True):
    host: Annotated[str, says("The address that the operations port listens on; keep it private.", min_length=1)] = (
        "127.0.0.1"
    )
    port: Annotated[Port, says("The port of health, metrics, commands and the console; 0 takes any free one.")] = 8081
    token: Annotated[Secret | None, says("The bearer token of commands; without one, every command is refused.")] = None


class NorceConfig(_Section, frozen=True, kw_only=True):
    environment: Annotated[
        Literal["playground", "stage", "production"], says("Which of Norce's environments to talk with.")
    ] = "playground"
    base_url: Annotated[Url | None, says("Replaces Norce's own addresses, for a simulator or a private network.")] = (
        None
    )
    version: Annotated[
        Literal["v0", "v1"], says("The version of Norce's Order API that is asked, and registered with.")
    ] = "v0"
    timeout: Annotated[timedelta, says("How long one request to Norce may take.", within=("100ms", "1m"))] = timedelta(
        seconds=5
    )
    refresh: Annotated[
        timedelta,
        says(
            "How often a channel's configuration document is read from Norce; 0s is never, and this file is all.",
            within=("0s", "1m"),
        ),
    ] = timedelta(seconds=30)


class ReconciliationConfig(_Section, frozen=True, kw_only=True):
    every: Annotated[
        timedelta,
        says(
            "How often Norce's event log is read for notifications that never came, by one of the nodes; 0s is never.",
            within=("0s", "7d"),
        ),
    ] = timedelta(minutes=10)
    overlap: Annotated[
        timedelta,
        says(
            "How far before the newest event of the last time each time begins: for events that are written late.",
            within=("0s", "30d"),
        ),
    ] = timedelta(hours=1)


class DispatcherConfig(_Section, frozen=True, kw_only=True):
    slots: Annotated[Positive, says("How many deliveries run at once in this process.")] = 32
    grace: Annotated[
        timedelta,
        says("How long a shutdown waits for running deliveries before it cancels them.", within=("0s", "10m")),
    ] = timedelta(seconds=20)


class QueuesConfig(_Section, frozen=True, kw_only=True):
    pause_after: Annotated[
        int, says("Orders that fail in a row before their queue pauses; 0 means never.", ge=0, le=1000)
    ] = 5
    first_pause: Annotated[
        timedelta,
        says(
            "Length of the first pause; one delivery then probes, and each failed probe doubles it.",
            within=("100ms", "1d"),
        ),
    ] = timedelta(seconds=30)
    max_pause: Annotated[timedelta, says("Longest pause.", within=("100ms", "1d"))] = timedelta(minutes=10)


class CircuitBreakerConfig(_Section, frozen=True, kw_only=True):
    failures: Annotated[
        int,
        says(
            "Misses in a row that open the circuit breaker of a route; 0 means never. A miss is no answer by the "
            "deadline, or an error after soft_limit.",
            ge=0,
            le=1000,
        ),
    ] = 5
    open_for: Annotated[
        timedelta,
        says("Time that a circuit breaker stays open before one call probes the route.", within=("100ms", "1d")),
    ] = timedelta(seconds=30)


class RetentionConfig(_Section, frozen=True, kw_only=True):
    bodies: Annotated[
        timedelta,
        says(
            "How long the body of a notification is kept when everything owed for it is done.", within=("1h", "3650d")
        ),
    ] = timedelta(days=30)
    bodies_of_dead_letters: Annotated[
        timedelta, says("How long it is kept otherwise; what still waits keeps its body.", within=("1h", "3650d"))
    ] = timedelta(days=90)
    rows: Annotated[
        timedelta,
        says(
            "How long the ledger remembers a notification and what became of it: so long a repeat is known as one.",
            within=("1d", "3650d"),
        ),
    ] = timedelta(days=400)
    verdicts: Annotated[
        timedelta, says("How long verdicts that were late, or of a shadow, are kept.", within=("1h", "3650d"))
    ] = timedelta(days=30)


class StoreConfig(_Section, frozen=True, kw_only=True):
    url: Annotated[
        str,
        says(
            "Where notifications and deliveries are kept: sqlite:/// and a path, relative to the working "
            "directory (four slashes for an absolute one), for one process on one machine; postgresql+psycopg:// for "
            "any number of nodes. By reference where it holds a password."
        ),
    ] = "sqlite:///data/adapter.db"
    retention: Annotated[RetentionConfig, says("How long things are kept.")] = RetentionConfig()


class OverrideConfig(_Section, frozen=True, kw_only=True):
    settings: Annotated[
        Mapping[str, Any],
        says("Settings in place of the weaker ones: mappings are merged, everything else is replaced."),
    ] = {}


class ChannelConfig(_Section, frozen=True, kw_only=True):
    routes: Annotated[
        Mapping[str, OverrideConfig],
        says("What is different on this channel, by route; stronger than the route and the merchant."),
    ] = {}


class MerchantConfig(_Section, frozen=True, kw_only=True):
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
        Mapping[str, OverrideConfig], says("What is different for this merchant, by route; stronger than the route.")
    ] = {}
    channels: Annotated[
        Mapping[NorceName, ChannelConfig],
        says("The merchant's channels by their names at Norce.", min_length=1),
    ]


class SignedUrlsConfig(_Section, frozen=True, kw_only=True):
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


class _SharedSecretConfig(_Section, frozen=True, kw_only=True):
    values: Annotated[OneOrTwoSecrets, says("The values that are accepted; two while one is being replaced.")]
    merchants: Annotated[
        Merchants | None, says("Whose orders the secret is good for; every merchant's where left out.")
    ] = None


class HeaderSecretConfig(_SharedSecretConfig, frozen=True, kw_only=True):
    header: Annotated[
        str,
        says(
            "The header that carries the secret, in any case; the secret is its whole value.",
            pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+(?!\n)$",
            max_length=64,
            allowed="the name of an HTTP header",
        ),
    ]


class UrlSecretConfig(_SharedSecretConfig, frozen=True, kw_only=True):
    parameter: Annotated[
        str,
        says(
            "The query parameter that carries the secret, for registrations that cannot be signed.",
            pattern=r"^[A-Za-z0-9_.~-]+(?!\n)$",
            max_length=64,
            allowed="the name of a query parameter: letters, digits and . _ ~ -",
        ),
    ]


class SendersConfig(_Section, frozen=True, kw_only=True):
    signed_urls: Annotated[
        SignedUrlsConfig | None, says("Callback URLs that carry a signature per merchant, channel, order and callback.")
    ] = None
    header_secrets: Annotated[
        tuple[HeaderSecretConfig, ...], says("Secrets that Norce, or a gateway before us, sends in a header.")
    ] = ()
    url_secrets: Annotated[
        tuple[UrlSecretConfig, ...],
        says("Secrets in the query of statically registered URLs; they end up in other people's logs."),
    ] = ()


Schema: TypeAlias = bool | dict[str, Any]
Pointer: TypeAlias = Annotated[
    str,
    says(
        pattern=r"^(/([^/~\s]|~[01])+)+(?!\n)$",
        max_length=1024,
        allowed="a JSON pointer to a part of the order, such as /cart",
    ),
]


class NotificationCallbackConfig(_Section, frozen=True, kw_only=True, tag="notification", tag_field="kind"):
    """Something happened: stored, and delivered to the routes that want it."""

    kind: ClassVar[str] = "notification"
    scope: Annotated[str, says("The JSON pointer of what is watched in the order: /state/currentStatus.")]
    schema: Annotated[
        Schema, says("The JSON Schema (2020-12) that the value at the scope meets; true for any value.")
    ] = True


class _AnsweredCallbackConfig(_Section, frozen=True, kw_only=True):
    deadline: Annotated[
        timedelta,
        says(
            "When Norce has its answer at the latest; an unfinished route then counts as its no_answer.",
            within=("100ms", "10s"),
        ),
    ] = timedelta(seconds=2)
    soft_limit: Annotated[
        timedelta | None,
        says(
            "A route that takes longer is logged and counted as slow; half the deadline where it is left out.",
            within=("1ms", "10s"),
        ),
    ] = None


class ValidationCallbackConfig(_AnsweredCallbackConfig, frozen=True, kw_only=True, tag="validation", tag_field="kind"):
    """May this order proceed? Answered inside the deadline."""

    kind: ClassVar[str] = "validation"


class HookCallbackConfig(_AnsweredCallbackConfig, frozen=True, kw_only=True, tag="hook", tag_field="kind"):
    """A change is about to be stored: accepted, refused, or more changed with it. Answered inside the deadline."""

    kind: ClassVar[str] = "hook"
    watch: Annotated[Pointer, says("The JSON pointer of the part of the order whose changes Norce asks about: /cart.")]
    target: Annotated[
        Pointer | None,
        says("The JSON pointer of the part that the answer may change further; where left out, it changes nothing."),
    ] = None
    version: Annotated[
        Literal["v0", "v1"], says("The version of the order that Norce is asked to send, and to be patched in.")
    ] = "v0"


CallbackConfig: TypeAlias = NotificationCallbackConfig | ValidationCallbackConfig | HookCallbackConfig


class WhenConfig(_Section, frozen=True, kw_only=True):
    scope: Annotated[str, says("The JSON pointer of what the route looks at in the order.")]
    schema: Annotated[
        Schema, says("The JSON Schema (2020-12) that the value at the scope meets; true for any value.")
    ] = True


class RetriesConfig(_Section, frozen=True, kw_only=True):
    schedule: Annotated[
        tuple[Annotated[timedelta, says(within=("100ms", "7d"))], ...],
        says("How long to wait after each failed attempt; then it is a dead letter.", max_length=50),
    ] = (
        timedelta(seconds=5),
        timedelta(seconds=30),
        timedelta(minutes=5),
        timedelta(minutes=30),
        *(timedelta(hours=hours) for hours in (2, 5, 10, 14, 20, 24)),
    )


class RouteConfig(_Section, frozen=True, kw_only=True):
    callback: Annotated[str, says("The callback that the route wants or answers.")]
    when: Annotated[
        WhenConfig | None, says("A further condition; the route is asked where the callback's and this one hold.")
    ] = None
    handler: Annotated[Name, says("The name of an installed handler; `norce-adapter handlers` lists them.")]
    refetch: Annotated[
        bool, says("Notifications: act on the order as Norce has it now, in place of the order as it came.")
    ] = True
    no_answer: Annotated[
        Literal["approve", "reject"] | None,
        says("Validations and hooks, required there: what a late, broken or missing answer counts as."),
    ] = None
    mode: Annotated[
        Literal["enforce", "shadow"],
        says("Validations and hooks: a shadow is asked, compared and counted beside the answer, and never acted on."),
    ] = "enforce"
    timeout: Annotated[timedelta, says("Notifications: how long one attempt may take.", within=("100ms", "10m"))] = (
        timedelta(seconds=15)
    )
    retry: Annotated[RetriesConfig, says("Notifications: what happens after an attempt that failed.")] = RetriesConfig()
    concurrency: Annotated[
        Positive,
        says("Notifications: how many deliveries run at once, per merchant and channel, on all nodes together."),
    ] = 8
    settings: Annotated[
        Mapping[str, Any], says("The handler's settings for every merchant and channel that does not say otherwise.")
    ] = {}


ONLY_FOR_NOTIFICATIONS = ("refetch", "timeout", "retry", "concurrency")
ONLY_FOR_ANSWERS = ("no_answer", "mode")


class ConfigFile(_Section, frozen=True, kw_only=True):
    """What stands in the file."""

    adapter: Annotated[AdapterConfig, says("Who we are.")]
    server: Annotated[ServerConfig, says("The public port.")] = ServerConfig()
    operations: Annotated[OperationsConfig, says("The port for operators and monitoring.")] = OperationsConfig()
    store: Annotated[StoreConfig, says("What survives a restart.")] = StoreConfig()
    norce: Annotated[NorceConfig, says("Norce Checkout, as we call it.")] = NorceConfig()
    reconciliation: Annotated[
        ReconciliationConfig, says("Finding the notifications that Norce has sent, or tried to, and that never came.")
    ] = ReconciliationConfig()
    dispatcher: Annotated[DispatcherConfig, says("The work on notifications.")] = DispatcherConfig()
    queues: Annotated[
        QueuesConfig,
        says("A queue, one route for one merchant and channel, pauses by itself while its destination is down."),
    ] = QueuesConfig()
    circuit_breaker: Annotated[
        CircuitBreakerConfig,
        says("While the circuit breaker of a validation or hook route is open, its no_answer counts at once."),
    ] = CircuitBreakerConfig()
    merchants: Annotated[Mapping[NorceName, MerchantConfig], says("The merchants by their ids at Norce.", min_length=1)]
    senders: Annotated[SendersConfig, says("Who may call us; at least one kind.")] = SendersConfig()
    callbacks: Annotated[
        Mapping[Name, CallbackConfig], says("What Norce calls, by name; each is one URL and one registration.")
    ] = {}
    routes: Annotated[Mapping[Name, RouteConfig], says("Who wants or answers a callback, by name.")] = {}


class Config(ConfigFile, frozen=True, kw_only=True):
    """The whole configuration, checked except for what only the installed handlers can know."""

    source: Source

    def problem(self, path: str, message: str) -> Problem:
        """Something that turned out later, at the line of `path` ("routes.export-payment.handler")."""
        return self.source.problem(path, message)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels of all merchants."""
        return tuple(Channel(merchant, name) for merchant, its in self.merchants.items() for name in its.channels)

    def settings(self, route: str, channel: Channel) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A route's settings for one merchant and channel, merged, and where they came from: for `read_settings`."""
        of_merchant = self.merchants[channel.merchant]
        of_channel = of_merchant.channels[channel.name]
        at_merchant = under("merchants", channel.merchant)
        at_channel = under(f"{at_merchant}.channels", channel.name)
        tree = merged(
            self.routes[route].settings,
            of_merchant.routes.get(route, OverrideConfig()).settings,
            of_channel.routes.get(route, OverrideConfig()).settings,
        )
        return tree, tuple(
            f"{under(f'{at}routes', route)}.settings" for at in ("", f"{at_merchant}.", f"{at_channel}.")
        )


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
