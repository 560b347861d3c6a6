"""The API for plugin authors: handlers with their context, settings and outcomes.

A handler is a class in the entry-point group `norce_adapter.handlers`. It is created once, without arguments, and keeps
no state between calls: everything about an order arrives with the call, and everything learned leaves with the outcome.
All methods are coroutines. They run on event loops for plugins, so a method that blocks delays other plugins, but never
the intake of callbacks. Nothing can interrupt a method that blocks.

| situation | outcome |
|---|---|
| the effect is there | return `Done(reference, facts)` |
| there is rightly nothing to do | return `Skip(reason)` |
| it could not be tried, or the destination asks for a later try | raise `Retry` |
| this order can never be taken | raise `Reject` |
| a request went out and was not answered | raise `Unknown` |
| a person must change the configuration | raise `Misconfigured` |

`context.http` raises these outcomes itself (see `adapter.outgoing`). Any other exception is a bug in the handler and is
logged with its traceback. It is `Unknown` if a write went out in this attempt; otherwise the delivery becomes a dead
letter `broken`.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, ParamSpec, Protocol, TypeVar, get_args

import structlog

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Evaluation, Result
from adapter.orders import (
    Address,
    Cart,
    Consent,
    Customer,
    DeliveryDetails,
    Discount,
    Item,
    Logistics,
    Named,
    Order,
    OrderState,
    Payment,
    Price,
    Shipping,
    Transition,
)
from adapter.plugin.settings import (
    ClientCertificate,
    Conditional,
    NoSettings,
    OAuth2,
    Pace,
    PlainUrl,
    PrivateCa,
    Secret,
    Settings,
    Undecided,
    Url,
)

if TYPE_CHECKING:
    import httpx

__all__ = [
    "Address",
    "Cart",
    "ClientCertificate",
    "CompiledCondition",
    "Condition",
    "ConditionInvalid",
    "Conditional",
    "Consent",
    "Context",
    "Customer",
    "DeliveryDetails",
    "Discount",
    "Done",
    "Evaluation",
    "HookHandler",
    "Item",
    "Log",
    "Logistics",
    "Misconfigured",
    "Named",
    "NoSettings",
    "Notification",
    "NotificationHandler",
    "OAuth2",
    "Order",
    "OrderState",
    "Orders",
    "Outcome",
    "Pace",
    "Patch",
    "Payment",
    "PlainUrl",
    "Previous",
    "Price",
    "PrivateCa",
    "Problem",
    "Refuse",
    "Reject",
    "Result",
    "Retry",
    "Secret",
    "Settings",
    "Shipping",
    "Skip",
    "Transition",
    "Undecided",
    "Unknown",
    "Url",
    "ValidationHandler",
]

log = structlog.get_logger(__name__)

_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_POINTER = re.compile(r"(/([^/~]|~[01])*)+")  # RFC 6901, without the empty pointer: the root cannot be patched
MAX_CODE_LENGTH = 64


def _kebab(code: object) -> str:
    """Return a code in kebab-case, converted and logged if it has another form."""
    text = str.__str__(code) if isinstance(code, str) else str(code)
    if _KEBAB.fullmatch(text) and len(text) <= MAX_CODE_LENGTH:
        return text
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text).lower())
    converted = "-".join(words)[:MAX_CODE_LENGTH].strip("-") or "no-code"
    log.warning("code_converted", code=converted)
    return converted


S = TypeVar("S", bound=Settings)
P = ParamSpec("P")
T = TypeVar("T")


# --- arguments of a handler -----------------------------------------------------------------------------------------


class Orders(Protocol):
    """Orders at Norce, as the order's merchant and channel see them.

    Changes carry our adapter id, so that Norce does not call our own hooks for them. A change may be slow, and may
    change more than was sent.

    Every method raises:
        Retry: Norce does not answer, or answers 408, 425, 429 or 5xx.
        Misconfigured: Norce answers 401 or 403.
        Reject: Norce answers another 4xx: `order-not-found`, or `norce-rejected` (another adapter's hook may have
            refused the change).
        Unknown: A POST went out and had no answer, 408 or 5xx.
    """

    async def read(self, order_id: str) -> Order:
        """Return the order as Norce has it now."""
        ...

    async def set_reference(self, order_id: str, reference: str) -> None:
        """Set the order's `reference`: its number in the other system. Repeating it does no harm."""
        ...

    async def set_attributes(self, order_id: str, attributes: Mapping[str, Any]) -> None:
        """Set these attributes of the order and keep the others. Use keys that carry your name."""
        ...

    async def call(self, operation: str, order_id: str, body: Any = None, **path: str) -> Any:
        """Call another operation on the order and return the JSON of the answer, or None.

        Norce has no concurrency control, and a PUT replaces the whole member. So read right before you write, and write
        only what is yours.

        Args:
            operation: A name from docs/simulator.md, such as `put_payment`.
            order_id: The order's id.
            body: The request body, as plain JSON.
            path: The other parameters of the operation's path, such as `payment_id`.

        Raises:
            KeyError: There is no such operation.
        """
        ...


class Log(Protocol):
    """A structured log with merchant, channel, route, order and attempt on each line.

    These fields cannot be replaced. Events are stable names, such as `order_seen`; another text is replaced by
    `plugin_logged`. Of the other fields, only an allow-list and the `log_fields` of the handler leave the process:
    numbers, and texts of at most 200 characters. A text in a field that the handler does not declare must look like a
    name, such as `nothing-changed`.
    """

    def debug(self, event: str, /, **fields: Any) -> Any: ...
    def info(self, event: str, /, **fields: Any) -> Any: ...
    def warning(self, event: str, /, **fields: Any) -> Any: ...
    def error(self, event: str, /, **fields: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """The last `Done` of this route for this order."""

    reference: str | None
    facts: Mapping[str, Any]
    at: datetime


class InThread(Protocol):
    """Runs a blocking function in a thread, as `Context.thread` does."""

    async def __call__(self, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[S]):
    """The surroundings of one call of a handler.

    If the handler declares `computes`, using `http` or `orders` raises `Misconfigured`.
    """

    settings: S  # for this merchant and channel
    log: Log
    http: "httpx.AsyncClient"  # reaches only the hosts in the settings, and ends before the deadline
    orders: Orders
    clock: Callable[[], datetime]  # aware, in UTC
    identity: str  # of the event, the same for repeats; each resend has its own
    route: str
    deadline: datetime  # by `clock`; a delivery is cancelled then, a verdict is no longer waited for
    attempt: int = 1  # counts from 1
    first_attempt_at: datetime
    previous: Previous | None = None  # to find out that nothing has changed since
    is_resend: bool = False  # a person wants it delivered again, so do not skip it because nothing has changed
    in_thread: InThread = asyncio.to_thread  # for `thread`
    auth_by: "Callable[[OAuth2], httpx.Auth] | None" = None  # for `auth`

    def key(self, name: str = "") -> str:
        """Return an idempotency key of 64 hexadecimal characters.

        It is the same for every attempt at this notification on this route, also after a restart, and another for each
        resend. Each `name` has a key of its own, for handlers that send several requests.
        """
        return sha256(f"{self.identity}\n{self.route}\n{name}".encode()).hexdigest()

    async def thread(self, function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
        """Call a function that blocks (a SOAP, SFTP or ODBC client) in a thread.

        A route has as many threads of its own as its `concurrency`; further calls wait. The function counts as a write:
        an attempt that ends without an outcome of the handler, or before the function, is `Unknown`. Nothing can
        interrupt the function. This call is cancelled at the deadline, but the lane of the delivery is held until the
        thread has ended. So give the client a time limit of its own that ends earlier.

        Raises:
            Retry: The deadline came before the function was called.
        """
        return await self.in_thread(function, *arguments, **named)

    def auth(self, oauth2: OAuth2) -> "httpx.Auth":
        """Return the authentication for a request of `context.http`: its argument `auth`.

        All nodes share the access token of a merchant. One of them replaces it shortly before it ends. A request that
        is answered 401 is sent once more with a new token, so its content is held in memory.

        Raises (when a request is sent):
            Retry: The token endpoint does not answer.
            Misconfigured: It refuses, or this context has no tokens (a handler that `computes`).
        """
        if self.auth_by is None:
            raise Misconfigured("no-tokens", "tokens of OAuth2 are not available here")
        return self.auth_by(oauth2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A notification, with the order to act on."""

    id: int  # in the ledger
    merchant: str
    channel: str
    callback: str
    order: Order  # as Norce has it now; as it was received on a route with `refetch: false`
    received: Order | None  # as it was received; None if its body is not kept, or was not read
    raw: bytes | None = field(repr=False)  # the whole body as it was received, or None
    received_at: datetime


# --- outcomes and answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """The effect is there.

    Both fields are stored, shown to operators, and given to the next call as `context.previous`. They must not hold
    personal data.
    """

    reference: str | None = None  # the destination's name for the effect, such as an invoice number
    facts: Mapping[str, str | int | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skip:
    """There is rightly nothing to do. `reason` is kebab-case, such as `nothing-changed`."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _kebab(self.reason))


class Outcome(Exception):
    """Base class of the outcomes that a notification handler raises.

    Args:
        code: Kebab-case and stable; it is logged and counted.
        message: Stored for the person who reads the dead letter. Name members and rules, never a customer's values.
    """

    host: str | None = None  # of the request, if `context.http` raised it
    status: int | None = None  # of the answer, if there was one
    explanation: str | None = None  # of the answer, by the handler's `explain`

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = _kebab(code)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class Retry(Outcome):
    """Nothing happened, and a later attempt may succeed.

    `after` is the delay that the destination asked for (`Retry-After`). The next attempt is not earlier than that, and
    not earlier than the route's schedule.
    """

    def __init__(self, code: str, message: str = "", *, after: timedelta | None = None) -> None:
        super().__init__(code, message)
        self.after = after


class Reject(Outcome):
    """Nothing happened, and no attempt with this order can succeed. It becomes a dead letter."""


class Unknown(Outcome):
    """A request went out and its result is not known.

    It is looked up before anything is sent again. `after` is the delay that the destination asked for, as for `Retry`.
    """

    def __init__(self, code: str, message: str = "", *, after: timedelta | None = None) -> None:
        super().__init__(code, message)
        self.after = after


class Misconfigured(Outcome):
    """Nothing happened, because the configuration is wrong.

    It is retried by the schedule, because a person may correct the configuration meanwhile. When different orders in a
    row end like this, the queue pauses, and attempts use up nothing of the schedule until one of them is answered.
    """


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason why a purchase may not proceed. The shopper's front end shows or translates it."""

    code: str  # kebab-case
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", _kebab(self.code))


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to the order: an operation of a JSON Patch (RFC 6902).

    Create it with `add`, `replace` or `remove`. Prefer to set a whole member or a whole array: Norce is less reliable
    when an array is changed by index. A patch that would change nothing is left out of the answer, so that a hook that
    is called again for its own patch ends.

    Args:
        op: `add`, `replace` or `remove`.
        path: JSON Pointer (RFC 6901) from the root of the order to a place inside the hook's `target`.
        value: Plain JSON; a `Decimal` is written as a number.

    Raises:
        ValueError: `op` is another operation, or `path` is no pointer.
    """

    op: Literal["add", "replace", "remove"]
    path: str
    value: Any = None

    def __post_init__(self) -> None:
        if self.op not in ("add", "replace", "remove"):
            raise ValueError("the op of a patch is add, replace or remove")
        if not _POINTER.fullmatch(self.path):
            raise ValueError("the path of a patch is a JSON Pointer from the root of the order, such as /cart/items")

    @classmethod
    def add(cls, path: str, value: Any) -> "Patch":
        """Set a member, or insert an element before an index of an array, at its end with `-`."""
        return cls("add", path, value)

    @classmethod
    def replace(cls, path: str, value: Any) -> "Patch":
        """Set a member or an element that exists."""
        return cls("replace", path, value)

    @classmethod
    def remove(cls, path: str) -> "Patch":
        """Remove a member or an element. Does nothing if it does not exist."""
        return cls("remove", path)


class Refuse(Exception):
    """Raised by a hook handler to refuse a change.

    Args:
        code: Kebab-case.
        message: Shown by the shopper's front end.
        inner: The cause, in the words of the system behind the handler (Norce's `innerErrorCode`).
    """

    def __init__(self, code: str, message: str, *, inner: str | None = None) -> None:
        super().__init__(code, message)
        self.code = _kebab(code)
        self.message = message
        self.inner = inner

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


# --- handlers -------------------------------------------------------------------------------------------------------


class _Handler(ABC, Generic[S]):
    settings_type: ClassVar[type[Settings]] = NoSettings
    log_fields: ClassVar[Collection[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Settings):
                    cls.settings_type = argument

    async def check_credentials(self, context: Context[S]) -> None:
        """Ask the destination whether it accepts our credentials, by a request that has no effect.

        `norce-adapter check --online` calls it without an order, once for each different settings. Leave it out if the
        destination cannot be asked.

        Raises:
            Outcome: The destination refuses, or does not answer. `context.http` raises these itself.
        """


class NotificationHandler(_Handler[S]):
    """Base class for handlers that act on notifications.

    `repeatable = True` declares that repeating a request with the same idempotency key does no harm. After an unknown
    outcome, a repeatable handler without a `lookup` is called again. A handler with neither waits for a person.

    `not_done = {503}` declares statuses that the destination never sends after it has acted, not even through a
    gateway. A write that is answered with one of them is retried without a lookup.

    `other_clients = True` declares that the handler has effects through other clients than `context.http` and
    `context.orders`. The service does not see these, so every attempt that ends without an outcome is unknown.

    `lookup_by_key = True` declares that `lookup` finds the effect of this delivery only, such as by its idempotency
    key, and never mistakes that of an earlier delivery of the order for it. Otherwise a resend is never looked up:
    without a known outcome it waits for a person.

    `log_fields = {"invoice"}` declares fields of `context.log` whose texts may be logged. They must not hold personal
    data.
    """

    repeatable: ClassVar[bool] = False
    lookup_by_key: ClassVar[bool] = False
    not_done: ClassVar[Collection[int]] = frozenset()
    other_clients: ClassVar[bool] = False

    @abstractmethod
    async def deliver(self, notification: Notification, context: Context[S]) -> Done | Skip:
        """Deliver the order to the destination.

        The call is cancelled at its deadline; its outcome is then `Unknown` if a write went out, otherwise `Retry`. The
        deliveries of one order on one route run one at a time.

        Raises:
            Outcome: `Retry`, `Reject`, `Unknown` or `Misconfigured`, as the table of this module says.
        """

    async def lookup(self, notification: Notification, context: Context[S]) -> Done | None:
        """Look up the effect of an attempt with an unknown outcome.

        It is called instead of `deliver`, and not before the deadline of the attempt in doubt has passed. Leave it out
        if the destination cannot be asked.

        Returns:
            `Done` if the effect is there; None if nothing happened, and `deliver` may be called again.

        Raises:
            Outcome: The doubt remains, and the next lookup follows the retry schedule.
        """
        raise Unknown("no-lookup", "this handler cannot look up the effect of a request")

    def explain(self, answer: "httpx.Response") -> str | None:
        """Return the reason that the destination gives in an answer that is not 2xx, or None.

        `raise_for_status()` calls it, and the first 200 characters are added to the message of the attempt. They are
        deleted with the body of the notification, and are not logged. Take a code or a sentence, not the whole answer.
        """
        return None


class ValidationHandler(_Handler[S]):
    """Base class for handlers that decide whether a purchase may proceed.

    `computes = True` declares that the handler only computes. It then runs on the service's own event loop and must
    not await anything but `asyncio.sleep(0)`, which lets other orders be answered (see `Pace`).

    `log_fields` declares fields of `context.log`, as for a `NotificationHandler`.
    """

    computes: ClassVar[bool] = False

    @abstractmethod
    async def validate(self, order: Order, context: Context[S]) -> list[Problem]:
        """Return the problems that stand against the purchase; an empty list approves.

        It is called again for every try of the shopper. So it must be cheap and have no side effects. An exception, or
        an answer after the deadline, counts as no answer: the route's `no_answer` is used.
        """


class HookHandler(_Handler[S]):
    """Base class for handlers that answer a change before it is stored.

    `computes = True` declares that the handler only computes, and `log_fields` fields of `context.log`, as for a
    `ValidationHandler`.
    """

    computes: ClassVar[bool] = False

    @abstractmethod
    async def change(self, order: Order, context: Context[S]) -> list[Patch]:
        """Return further changes to the order; an empty list accepts the change as it is.

        `order` is the whole order with the change in it. Norce does not say what has changed: use one callback for each
        watched part, or read the stored order with `context.orders.read`. The method may be called again for the same
        change, which another adapter may still refuse. So it must have no side effects.

        An exception other than `Refuse` counts as no answer, and so do patches that do not apply to the order or leave
        the hook's `target`.

        Raises:
            Refuse: The change must not be stored.
        """


def can_check_credentials(handler: type[_Handler[Any]]) -> bool:
    """Return True if the handler has a `check_credentials` of its own."""
    return handler.check_credentials is not _Handler.check_credentials


def can_look_up(handler: type[NotificationHandler[Any]]) -> bool:
    """Return True if the handler has a `lookup` of its own."""
    return handler.lookup is not NotificationHandler.lookup
