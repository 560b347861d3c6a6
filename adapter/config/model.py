"""The sections of `config.yaml`: keys, types, bounds, defaults and descriptions.

`make docs` generates `config.yaml` and `config.schema.json` from these declarations.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta

from adapter.config.problems import ConfigProblem, Source, under
from adapter.identifiers import Channel
from adapter.plugin import Secret, Url

MIB = 1024 * 1024


def doc(
    description: str = "", *, allowed: str | None = None, within: tuple[str, str] | None = None, **bounds: Any
) -> Meta:
    """Describe a key.

    Args:
        description: One sentence; it names the unit of a number.
        allowed: Words for the allowed values, if type and bounds do not say it well.
        within: The shortest and the longest duration.
        bounds: Bounds as `msgspec.Meta` has them.
    """
    if within is not None:
        description = f"{description} From {within[0]} to {within[1]}.".strip()
    return Meta(description=description or None, extra={"allowed": allowed, "within": within}, **bounds)


Name: TypeAlias = Annotated[
    str,
    doc(
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*(?!\n)$",
        max_length=64,
        allowed="kebab-case (a-z, 0-9 and single hyphens), at most 64 characters",
    ),
]
# Norce's names travel in the headers `x-merchant` and `x-channel`, in URLs and in metrics.
NorceName: TypeAlias = Annotated[
    str, doc(pattern=r"^[!-~]+(?!\n)$", max_length=64, allowed="1 to 64 visible ASCII characters without spaces")
]
KeyName: TypeAlias = Annotated[
    str,
    doc(
        pattern=r"^[A-Za-z0-9_-]+(?!\n)$",
        max_length=32,
        allowed="a name of 1 to 32 letters, digits, hyphens and underscores",
    ),
]
Pointer: TypeAlias = Annotated[
    str,
    doc(
        pattern=r"^(/([^/~\s]|~[01])+)+(?!\n)$",
        max_length=1024,
        allowed="a JSON pointer to a part of the order, such as /cart",
    ),
]
SLUG = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(?!\n)$"
SLUG_IN_WORDS = "a part of a host name (a-z, 0-9 and hyphens within), at most 63 characters"
INCLUDE = r"^(?!/|(.*/)?\.\.(/|$))[^\x00-\x1f]+(?!\n)$"
IncludePattern: TypeAlias = Annotated[
    str,
    doc(
        pattern=INCLUDE,
        max_length=1024,
        allowed="a path or a pattern below the folder of this file, such as merchants/*.yaml",
    ),
]
HostName: TypeAlias = Annotated[
    str, doc(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(?!\n)$", max_length=253, allowed="a host name without a port")
]
Port: TypeAlias = Annotated[int, doc(ge=0, le=65535)]
Concurrency: TypeAlias = Annotated[int, doc(ge=1, le=1024)]
OneOrTwoSecrets: TypeAlias = Annotated[tuple[Secret, ...], doc(min_length=1, max_length=2)]
Schema: TypeAlias = bool | dict[str, Any]
SCHEMA = doc("JSON Schema (2020-12) for the value at the scope; true allows any value.")
ApiVersion: TypeAlias = Literal["v0", "v1"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class AdapterConfig(_Section, frozen=True, kw_only=True):
    """This adapter."""

    id: Annotated[
        str, doc("Id of this adapter at Norce, used in its registrations and its schema.", min_length=1, max_length=64)
    ]
    public_url: Annotated[
        Url | None, doc("Address at which Norce reaches the public port; signed_urls and registrations need it.")
    ] = None


class ServerConfig(_Section, frozen=True, kw_only=True):
    """The public port, which Norce calls."""

    host: Annotated[str, doc("Address that the public port listens on.", min_length=1)] = "0.0.0.0"  # noqa: S104
    port: Annotated[Port, doc("Number of the public port; 0 takes any free port.")] = 8080
    max_body_bytes: Annotated[int, doc("Largest body in bytes; a larger body gets 413.", ge=1024, le=4 * MIB)] = MIB
    receive_timeout: Annotated[
        timedelta,
        doc(
            "Time limit for receiving a request, from its first byte; a slower caller gets 408.", within=("100ms", "5m")
        ),
    ] = timedelta(seconds=10)
    keep_alive: Annotated[
        timedelta,
        doc(
            "Time for which an idle connection is kept; longer than the same limit of a proxy in front.",
            within=("1s", "1h"),
        ),
    ] = timedelta(seconds=75)
    trusted_proxies: Annotated[
        tuple[str, ...],
        doc("Addresses and networks of proxies whose X-Forwarded-For counts; it serves only to limit unknown callers."),
    ] = ()


class OperationsConfig(_Section, frozen=True, kw_only=True):
    """The private port for health, metrics and commands."""

    host: Annotated[str, doc("Address that the operations port listens on.", min_length=1)] = "127.0.0.1"
    port: Annotated[Port, doc("Number of the operations port; 0 takes any free port.")] = 8081
    hosts: Annotated[
        tuple[HostName, ...],
        doc("Names that the port may be called by, besides localhost, the host above and every IP address."),
    ] = ()
    socket: Annotated[
        Annotated[str, doc(pattern=r"^[^\x00]+$", allowed="the path of a file, or null")] | None,
        doc("Path of a Unix socket on which commands need no token, relative to the working directory; null for none."),
    ] = "data/operations.sock"
    token: Annotated[Secret | None, doc("Bearer token for commands; without it the port refuses every command.")] = None


class LogsConfig(_Section, frozen=True, kw_only=True):
    """The log, which is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        doc("Lowest level that is written; info has a line for every callback and attempt."),
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "text"],
        doc("Form of a line: json for programs, text for people; auto is text on a terminal."),
    ] = "auto"


class RetentionConfig(_Section, frozen=True, kw_only=True):
    """Times for which the ledger keeps things."""

    bodies: Annotated[
        timedelta, doc("Time to keep the body of a notification whose deliveries are done.", within=("1h", "3650d"))
    ] = timedelta(days=30)
    bodies_of_dead_letters: Annotated[
        timedelta,
        doc(
            "Time to keep the body of a notification with a dead letter; a waiting delivery keeps it longer.",
            within=("1h", "3650d"),
        ),
    ] = timedelta(days=90)
    unwanted: Annotated[
        timedelta, doc("Time to keep the body of a notification that no route wants.", within=("1h", "3650d"))
    ] = timedelta(days=1)
    rows: Annotated[
        timedelta,
        doc("Time to remember a notification, so that a repeat does nothing.", within=("1d", "3650d")),
    ] = timedelta(days=400)
    verdicts: Annotated[
        timedelta,
        doc("Time to keep recorded verdicts; of more than two million, the oldest go.", within=("1h", "3650d")),
    ] = timedelta(days=30)
    uses: Annotated[
        timedelta,
        doc("Time to remember how often each callback, channel and URL key was used.", within=("7d", "3650d")),
    ] = timedelta(days=90)


class StoreConfig(_Section, frozen=True, kw_only=True):
    """The database of the ledger."""

    url: Annotated[
        str,
        doc(
            "Address of the database: sqlite:/// and a path (relative to the working directory; absolute with four "
            "slashes) for one process, postgresql+psycopg:// for several nodes. Give it by reference if it holds a "
            "password."
        ),
    ] = "sqlite:///data/adapter.db"
    retention: RetentionConfig = RetentionConfig()


class NorceConfig(_Section, frozen=True, kw_only=True):
    """Calls to Norce Checkout."""

    environment: Annotated[Literal["playground", "stage", "production"], doc("Environment of Norce to call.")] = (
        "playground"
    )
    base_url: Annotated[
        Url | None, doc("Address to call in place of Norce's own, for the simulator or a private network.")
    ] = None
    version: Annotated[ApiVersion, doc("Version of Norce's Order API for reading orders and for registrations.")] = "v0"
    timeout: Annotated[timedelta, doc("Time limit for one request to Norce.", within=("100ms", "1m"))] = timedelta(
        seconds=5
    )
    refresh: Annotated[
        timedelta,
        doc("Time between reads of a channel's configuration document at Norce; 0s: never.", within=("0s", "1m")),
    ] = timedelta(seconds=30)


class ReconciliationConfig(_Section, frozen=True, kw_only=True):
    """The search in Norce's event log and orders for notifications that never arrived."""

    every: Annotated[
        timedelta, doc("Time between two searches, by one of the nodes; 0s: never.", within=("0s", "7d"))
    ] = timedelta(minutes=10)
    overlap: Annotated[
        timedelta,
        doc("Part of the log that a search reads again, for events that Norce wrote late.", within=("0s", "30d")),
    ] = timedelta(hours=1)
    orders: Annotated[
        timedelta,
        doc(
            "Time between two comparisons of Norce's orders of the last 48 hours, by one of the nodes; 0s: never.",
            within=("0s", "7d"),
        ),
    ] = timedelta(days=1)


class DispatcherConfig(_Section, frozen=True, kw_only=True):
    """The dispatcher, which works off deliveries."""

    slots: Annotated[
        Concurrency,
        doc("Deliveries that run at the same time in one process; a queue without any may start one."),
    ] = 32
    grace: Annotated[
        timedelta, doc("Time that a shutdown gives running deliveries before it cancels them.", within=("0s", "10m"))
    ] = timedelta(seconds=20)


class QueuesConfig(_Section, frozen=True, kw_only=True):
    """Pauses of a queue, one route for one merchant and channel, after failures."""

    pause_after: Annotated[
        int, doc("Orders that fail one after another before their queue pauses; 0: never.", ge=0, le=1000)
    ] = 5
    first_pause: Annotated[
        timedelta,
        doc("Length of the first pause; then one delivery is tried, and a failure doubles it.", within=("100ms", "1d")),
    ] = timedelta(seconds=30)
    max_pause: Annotated[timedelta, doc("Length of the longest pause that no person set.", within=("100ms", "1d"))] = (
        timedelta(minutes=10)
    )


class CircuitBreakerConfig(_Section, frozen=True, kw_only=True):
    """The circuit breaker of a route; while it is open, the no_answer counts at once."""

    orders: Annotated[
        int,
        doc(
            "The last different orders that count, for each route and channel: it opens when more than half of so many "
            "missed; 0: never. No answer by the deadline is a miss, and so is an error after the soft_limit.",
            ge=0,
            le=1000,
        ),
    ] = 20
    open_for: Annotated[
        timedelta, doc("Time that it stays open before one call tries the route again.", within=("100ms", "1d"))
    ] = timedelta(seconds=30)


class OverrideConfig(_Section, frozen=True, kw_only=True):
    settings: Annotated[
        Mapping[str, Any], doc("Settings that replace those of the route; mappings are merged key by key.")
    ] = {}


class ChannelConfig(_Section, frozen=True, kw_only=True):
    routes: Annotated[
        Mapping[str, OverrideConfig], doc("Settings for this channel, by route; they replace those of the merchant.")
    ] = {}


class MerchantConfig(_Section, frozen=True, kw_only=True):
    slug: Annotated[
        str,
        doc("Merchant's part of Norce's host names; without it, the key.", pattern=SLUG, allowed=SLUG_IN_WORDS),
    ] = ""
    tokens: Annotated[OneOrTwoSecrets, doc("Bearer tokens from Norce for this merchant; two during a rotation.")]
    routes: Annotated[Mapping[str, OverrideConfig], doc("Settings for this merchant, by route.")] = {}
    channels: Annotated[
        Mapping[NorceName, ChannelConfig], doc("Channels of the merchant, by their names at Norce.", min_length=1)
    ]


class SignedUrlsConfig(_Section, frozen=True, kw_only=True):
    """Callback URLs with a signature for merchant, channel, order and callback."""

    keys: Annotated[
        Mapping[KeyName, Secret],
        doc(
            "Keys of at least 16 bytes, by name: the first signs, all verify. Put a new key first, and remove the old "
            "one when no open order uses it.",
            min_length=1,
        ),
    ]


class _SharedSecretConfig(_Section, frozen=True, kw_only=True):
    values: Annotated[OneOrTwoSecrets, doc("Accepted values; two during a rotation.")]
    merchants: Annotated[
        Annotated[tuple[str, ...], doc(min_length=1)] | None,
        doc("Merchants whose orders the secret is valid for; without it, all."),
    ] = None


class HeaderSecretConfig(_SharedSecretConfig, frozen=True, kw_only=True):
    header: Annotated[
        str,
        doc(
            "Header whose whole value is the secret.",
            pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+(?!\n)$",
            max_length=64,
            allowed="the name of an HTTP header",
        ),
    ]


class UrlSecretConfig(_SharedSecretConfig, frozen=True, kw_only=True):
    parameter: Annotated[
        str,
        doc(
            "Query parameter that carries the secret.",
            pattern=r"^[A-Za-z0-9_.~-]+(?!\n)$",
            max_length=64,
            allowed="the name of a query parameter: letters, digits and . _ ~ -",
        ),
    ]


class SendersConfig(_Section, frozen=True, kw_only=True):
    """The callers that are accepted; at least one kind is required."""

    signed_urls: SignedUrlsConfig | None = None
    header_secrets: Annotated[
        tuple[HeaderSecretConfig, ...], doc("Secrets in a header, from Norce or from a gateway before this service.")
    ] = ()
    url_secrets: Annotated[
        tuple[UrlSecretConfig, ...],
        doc(
            "Secrets in the query of static registrations, for notifications only. Prefer signed_urls: a secret fits "
            "every order, and queries end up in access logs."
        ),
    ] = ()


class NotificationCallbackConfig(_Section, frozen=True, kw_only=True, tag="notification", tag_field="kind"):
    """Something happened. It is stored, and later delivered to the routes that want it."""

    kind: ClassVar[str] = "notification"
    scope: Annotated[str, doc("JSON pointer to the part of the order that Norce watches, such as /state.")]
    schema: Annotated[Schema, SCHEMA] = True


class _AnsweredCallbackConfig(_Section, frozen=True, kw_only=True):
    deadline: Annotated[
        timedelta,
        doc(
            "Time limit for the answer to Norce; then the no_answer of unfinished routes counts.",
            within=("100ms", "10s"),
        ),
    ] = timedelta(seconds=2)
    soft_limit: Annotated[
        timedelta | None,
        doc(
            "Time after which a route is logged and counted as slow; without it, half the deadline.",
            within=("1ms", "10s"),
        ),
    ] = None


class ValidationCallbackConfig(_AnsweredCallbackConfig, frozen=True, kw_only=True, tag="validation", tag_field="kind"):
    """May this order proceed? The answer approves or rejects it."""

    kind: ClassVar[str] = "validation"


class HookCallbackConfig(_AnsweredCallbackConfig, frozen=True, kw_only=True, tag="hook", tag_field="kind"):
    """A change is about to be stored. The answer accepts, refuses or extends it."""

    kind: ClassVar[str] = "hook"
    watch: Annotated[Pointer, doc("JSON pointer to the part of the order whose changes Norce announces.")]
    target: Annotated[
        Pointer | None, doc("JSON pointer to the part that the answer may change; without it, nothing.")
    ] = None
    version: Annotated[ApiVersion, doc("Version of the order that Norce sends and the answer patches.")] = "v0"


CallbackConfig: TypeAlias = NotificationCallbackConfig | ValidationCallbackConfig | HookCallbackConfig


class WhenConfig(_Section, frozen=True, kw_only=True):
    """A condition of a route."""

    scope: Annotated[str, doc("JSON pointer to the part of the order that decides.")]
    schema: Annotated[Schema, SCHEMA] = True


class RetriesConfig(_Section, frozen=True, kw_only=True):
    """Notifications: the attempts after a failure."""

    schedule: Annotated[
        tuple[Annotated[timedelta, doc(within=("100ms", "7d"))], ...],
        doc("Waits before the next attempts, each from 100ms to 7d; after the last, a dead letter.", max_length=50),
    ] = (
        timedelta(seconds=5),
        timedelta(seconds=30),
        timedelta(minutes=5),
        timedelta(minutes=30),
        *(timedelta(hours=hours) for hours in (2, 5, 10, 14, 20, 24)),
    )


class RouteConfig(_Section, frozen=True, kw_only=True):
    callback: Annotated[str, doc("Name of the callback that the route receives or answers.")]
    merchants: Annotated[
        tuple[NorceName, ...] | None, doc("Merchants that the route is for, by their ids; without it, all.")
    ] = None
    channels: Annotated[
        tuple[NorceName, ...] | None, doc("Channels that the route is for, by name; without it, all.")
    ] = None
    when: Annotated[
        WhenConfig | tuple[WhenConfig, ...] | None,
        doc("A condition on the order for the route, or a list of conditions that must all hold."),
    ] = None
    handler: Annotated[Name, doc("Name of an installed handler, as `norce-adapter handlers list` shows it.")]
    refetch: Annotated[bool, doc("Notifications: read the order from Norce again before the handler runs.")] = True
    no_answer: Annotated[
        Literal["approve", "reject"] | None,
        doc("Validations and hooks, required there: the verdict if the answer is late, broken or missing."),
    ] = None
    mode: Annotated[
        Literal["enforce", "shadow"],
        doc(
            "A shadow has no effect. Validations and hooks: it runs and is compared with the verdict. Notifications: "
            "what it would get is recorded and not sent."
        ),
    ] = "enforce"
    timeout: Annotated[timedelta, doc("Notifications: time limit for one attempt.", within=("100ms", "10m"))] = (
        timedelta(seconds=15)
    )
    retry: RetriesConfig = RetriesConfig()
    concurrency: Annotated[
        Concurrency,
        doc("Notifications: deliveries that run at the same time on all nodes, per merchant and channel."),
    ] = 8
    max_answer_bytes: Annotated[
        int, doc("Largest body in bytes of an answer to the handler; a larger one is no answer.", ge=1024, le=64 * MIB)
    ] = MIB
    settings: Annotated[Mapping[str, Any], doc("Settings of the handler, for all merchants and channels.")] = {}


ONLY_FOR_NOTIFICATIONS = ("refetch", "timeout", "retry", "concurrency")
ONLY_FOR_ANSWERS = ("no_answer",)


class ConfigFile(_Section, frozen=True, kw_only=True):
    """The configuration of norce-adapter."""

    adapter: AdapterConfig
    server: ServerConfig = ServerConfig()
    operations: OperationsConfig = OperationsConfig()
    logs: LogsConfig = LogsConfig()
    store: StoreConfig = StoreConfig()
    norce: NorceConfig = NorceConfig()
    reconciliation: ReconciliationConfig = ReconciliationConfig()
    dispatcher: DispatcherConfig = DispatcherConfig()
    queues: QueuesConfig = QueuesConfig()
    circuit_breaker: CircuitBreakerConfig = CircuitBreakerConfig()
    include: Annotated[
        IncludePattern | None,
        doc("Files with further merchants, relative to this file; each has the key merchants and no other."),
    ] = None
    merchants: Annotated[
        Mapping[NorceName, MerchantConfig],
        doc("Merchants, by their ids at Norce; here or in included files.", min_length=1),
    ]
    senders: SendersConfig = SendersConfig()
    callbacks: Annotated[
        Mapping[Name, CallbackConfig], doc("Callbacks that Norce makes, by name; each is one URL and one registration.")
    ] = {}
    routes: Annotated[Mapping[Name, RouteConfig], doc("Routes from callbacks to handlers, by name.")] = {}


class Config(ConfigFile, frozen=True, kw_only=True):
    """The checked configuration. `routing.routes` checks conditions, handlers and settings."""

    source: Source

    def problem(self, path: str, message: str) -> ConfigProblem:
        """Return a problem at the line of `path`, such as "routes.export-payment.handler"."""
        return self.source.problem(path, message)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels of all merchants."""
        return tuple(Channel(merchant, name) for merchant, its in self.merchants.items() for name in its.channels)

    def channels_of(self, route: str) -> tuple[Channel, ...]:
        """Return the channels that a route is for."""
        merchants, names = self.routes[route].merchants, self.routes[route].channels
        return tuple(
            channel
            for channel in self.channels
            if (merchants is None or channel.merchant in merchants) and (names is None or channel.name in names)
        )

    @property
    def queue_keys(self) -> tuple[tuple[str, Channel], ...]:
        """The queues: each notification route with each channel that it is for."""
        routes = [name for name, each in self.routes.items() if self.callbacks[each.callback].kind == "notification"]
        return tuple((route, channel) for route in routes for channel in self.channels_of(route))

    def settings(self, route: str, channel: Channel) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return a route's settings for a channel, and the paths they are merged from.

        The paths are in order, weakest first.
        """
        merchant = self.merchants[channel.merchant]
        at_merchant = under("merchants", channel.merchant)
        at_channel = under(f"{at_merchant}.channels", channel.name)
        tree = merged(
            self.routes[route].settings,
            merchant.routes.get(route, OverrideConfig()).settings,
            merchant.channels[channel.name].routes.get(route, OverrideConfig()).settings,
        )
        return tree, tuple(
            f"{under(f'{at}routes', route)}.settings" for at in ("", f"{at_merchant}.", f"{at_channel}.")
        )


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings, weakest first; only mappings are merged, the rest is replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            weaker = result.get(key)
            if isinstance(value, Mapping):
                value = merged(weaker if isinstance(weaker, Mapping) else {}, value)
            result[key] = value
    return result
