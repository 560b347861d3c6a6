"""
The door for plugin authors: handler classes, their context, their settings and their outcomes.

A handler is a class in the entry-point group `norce_adapter.handlers`, made once without arguments. It keeps nothing
between calls: what it needs to know about an order comes in the call, what it learned goes into its outcome. All
methods are coroutines and run on an event loop of the plugins' own, so a handler that blocks delays other plugins,
never the intake; Python can still not interrupt it.

| happened | outcome |
|---|---|
| the effect is there | return `Done(reference, facts)` |
| nothing to do, and that is right | return `Skip(reason)` |
| could not be tried, or the far side says "later" | raise `Retry` |
| this order can never be taken | raise `Reject` |
| the request went out and no answer came | raise `Unknown` |
| a person must change the configuration | raise `Misconfigured` |

What `context.http` raises is this table already (see `adapter.outgoing`). Any other exception is a bug in the handler:
it is logged with its traceback and treated as `Unknown`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args

import httpx
import msgspec

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Evaluation, Result
from adapter.orders import Order

__all__ = [
    "CompiledCondition",
    "Condition",
    "ConditionInvalid",
    "Conditional",
    "Context",
    "Done",
    "Evaluation",
    "HookHandler",
    "Misconfigured",
    "Notification",
    "NotificationHandler",
    "Order",
    "Orders",
    "Outcome",
    "Patch",
    "Problem",
    "Refuse",
    "Reject",
    "Result",
    "Retry",
    "Secret",
    "Settings",
    "Skip",
    "Undecided",
    "Unknown",
    "Url",
    "ValidationHandler",
]

_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_POINTER = re.compile(r"(/([^/~]|~[01])*)+")  # RFC 6901; the root, the empty pointer, is nobody's to patch
LONGEST_CODE = 64


def _checked_code(code: str) -> str:
    if not _KEBAB.fullmatch(code) or len(code) > LONGEST_CODE:
        raise ValueError(
            f"a code is kebab-case (such as item-out-of-stock), at most {LONGEST_CODE} characters; not {code!r}"
        )
    return code


# --- settings -------------------------------------------------------------------------------------------------------


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    The settings of a handler: subclass it, one annotated field a setting.

    Describe each field with `Annotated[str, msgspec.Meta(description="…")]`. Fields of type `Url` say which hosts the
    handler may reach; fields of type `Secret` are given by reference only. A `__post_init__` that raises `ValueError`
    is how settings that only make sense together are checked; its message is shown with the place in the file.
    """


class NoSettings(Settings, frozen=True, kw_only=True):
    """What a handler has that declares no settings."""


class Undecided(Exception):
    """
    A condition ended in an error for this order, so that it neither holds nor does not: the order has something at its
    scope that the schema cannot be evaluated on. `explain` shows what; a verdict is the route's `no_answer` meanwhile.
    """

    def __init__(self, scope: str, code: str) -> None:
        super().__init__(scope, code)
        self.scope = scope
        self.code = code

    def __str__(self) -> str:
        return f"the condition at {self.scope} could not be decided: {self.code}"


class Conditional(Settings, frozen=True, kw_only=True, dict=True):
    """
    Settings with a condition in them, checked and compiled when they are read: subclass it for what is said about a
    part of the order. A `__post_init__` of its own calls that of `super()`.
    """

    scope: Annotated[str, msgspec.Meta(description="JSON Pointer to the part of the order that decides.")]
    schema: Annotated[
        dict[str, Any] | bool,
        msgspec.Meta(description="JSON Schema (2020-12) that this part must meet. Default: it only has to be there."),
    ] = True

    def __post_init__(self) -> None:
        try:
            self.__dict__["compiled"] = Condition(scope=self.scope, schema=self.schema).compile()
        except ConditionInvalid as error:
            raise ValueError(str(error)) from error

    @property
    def compiled(self) -> CompiledCondition:
        return self.__dict__["compiled"]  # type: ignore[no-any-return]

    def holds(self, order: Order) -> bool:
        """Whether the condition holds on this order. Raises `Undecided`."""
        evaluation = self.compiled.evaluate(order.data, parsed=True)
        if evaluation.result is Result.ERROR:
            raise Undecided(self.scope, str(evaluation.code))
        return evaluation.result is Result.MATCHED


class Url(str):
    """
    An address that a handler may call: https, or http to this very machine. `origin` is what it may reach.

    Raises `ValueError` for anything else, for credentials in the address, and for a query or fragment.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "Url":
        try:
            parts = httpx.URL(text)
        except (httpx.InvalidURL, ValueError) as error:
            raise ValueError("is not an address") from error
        if any(character.isspace() for character in text) or not 0 < (1 if parts.port is None else parts.port) < 65536:
            raise ValueError("is not an address")
        loopback = parts.host in ("localhost", "127.0.0.1", "::1")
        if not parts.host or not (parts.scheme == "https" or (parts.scheme == "http" and loopback)):
            raise ValueError("must be an https:// address; http:// is taken for localhost, 127.0.0.1 and [::1] only")
        authority = text.partition("://")[2].partition("/")[0]
        if "@" in authority or "?" in text or "#" in text:
            raise ValueError("must be a plain address: no user, password, query or fragment in it")
        return super().__new__(cls, text.rstrip("/"))

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: `("https", "shop.example", 443)`; the host as it is on the wire (`xn--…`)."""
        parts = httpx.URL(self)
        return parts.scheme, parts.raw_host.decode("ascii"), parts.port or {"https": 443, "http": 80}[parts.scheme]


class Secret:
    """A value that never shows itself: `reveal()` where it is used, and nowhere else."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


S = TypeVar("S", bound=Settings)


# --- what a handler is given ----------------------------------------------------------------------------------------


class Orders(Protocol):
    """
    Norce's orders, as the order's merchant and channel see them.

    What every method raises: `Retry` where Norce does not answer, answers 429 or 5xx; `Misconfigured` on 401 and 403;
    `Reject` on another 4xx (`order-not-found`; `norce-rejected`, also where another adapter's hook refuses the change);
    `Unknown` where a POST went out and no answer says what became of it. A change is made with our adapter id, so that
    our own hooks are not asked about it; it may be slow, and change more than was sent.
    """

    async def read(self, order_id: str) -> Order:
        """The order as Norce has it now."""
        ...

    async def set_reference(self, order_id: str, reference: str) -> None:
        """Writes the order's number in the other system on the order: `reference`. The same again does no harm."""
        ...

    async def set_attributes(self, order_id: str, attributes: Mapping[str, Any]) -> None:
        """Sets these attributes of the order, and leaves the others. Use keys that carry your name."""
        ...

    async def call(self, operation: str, order_id: str, body: Any = None, **path: str) -> Any:
        """
        Any other operation on the order, by its name in docs/simulator.md; `path` are the parameters in its path:
        `call("put_payment", order_id, payment, payment_id=…)`.

        Answers what Norce does, as plain JSON; None for nothing. Norce has no concurrency control, and a PUT replaces
        the whole: read right before, write only what is yours. Raises `KeyError` for an unknown operation.
        """
        ...


class Log(Protocol):
    """A structlog logger with the order, route and attempt bound. Only allow-listed fields leave the process."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """The last `Done` of this lane: what this route did for this order before."""

    reference: str | None
    facts: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(Generic[S]):
    """
    What surrounds one call of a handler.

    `attempt` counts from 1 and `first_attempt_at` is when it was 1; `deadline` is when this call is cancelled, on
    `clock`. `previous` is the lane's last `Done`, for a handler to find that nothing has changed. `http` reaches the
    hosts in the settings and no other, never later than the deadline. A handler that declares `computes` has neither
    `http` nor `orders`: using them raises `Misconfigured`.
    """

    settings: S
    log: Log
    http: httpx.AsyncClient
    orders: Orders
    clock: Callable[[], datetime]
    identity: str
    route: str
    deadline: datetime
    attempt: int = 1
    first_attempt_at: datetime
    previous: Previous | None = None

    def key(self, name: str = "") -> str:
        """
        An idempotency key of 64 hexadecimal characters.

        The same for every attempt at this notification on this route, after a restart too; another for another `name`.
        """
        return sha256(f"{self.identity}\n{self.route}\n{name}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """
    A notification as a handler gets it.

    `order` is the order to act on: as Norce has it now where the route re-reads it (the default), otherwise as it was
    received. `received` is the order as it came, `raw` the whole body as it came, byte for byte.
    """

    id: int
    merchant: str
    channel: str
    callback: str
    order: Order
    received: Order
    raw: bytes = field(repr=False)
    received_at: datetime


# --- what a handler answers -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """
    The effect is there. `reference` is the destination's name for it; `facts` are kept with it, for the next call's
    `context.previous`. Both are stored and shown to operators: no personal data.
    """

    reference: str | None = None
    facts: Mapping[str, str | int | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skip:
    """There was nothing to do, and that is right. The reason is kebab-case, such as `nothing-changed`."""

    reason: str

    def __post_init__(self) -> None:
        _checked_code(self.reason)


class Outcome(Exception):
    """
    What a notification handler raises when it is not done. `code` is kebab-case and stable; it is logged and counted.
    `message` is for the person who reads the dead letter: name members and rules, never a customer's values.
    """

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = _checked_code(code)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class Retry(Outcome):
    """Nothing happened; try again, not before `after` where the destination asked for it (`Retry-After`)."""

    def __init__(self, code: str, message: str = "", *, after: timedelta | None = None) -> None:
        super().__init__(code, message)
        self.after = after


class Reject(Outcome):
    """Nothing happened and nothing ever will with this order: a dead letter, with the reason a person will read."""


class Unknown(Outcome):
    """The request went out and no answer says what became of it: looked up before anything is sent again."""


class Misconfigured(Outcome):
    """Nothing happened because of the configuration (wrong credentials, say): the queue pauses, the work is kept."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a purchase may not go on. `code` is kebab-case: the shopper's front end shows or translates it."""

    code: str
    message: str

    def __post_init__(self) -> None:
        _checked_code(self.code)


@dataclass(frozen=True, slots=True)
class Patch:
    """
    One further change to the order, an operation of a JSON Patch (RFC 6902): made by `add`, `replace` or `remove`.

    `path` is a JSON Pointer (RFC 6901) from the root of the order, and lies inside the hook's `target`. `value` is
    plain JSON; `Decimal` is written as a number. Setting a whole member or a whole array is safer at Norce than editing
    an array by index. What is already as wanted is left out of the answer for you, so that a patch that comes back
    round ends. Raises `ValueError` for another operation, or a path that is no pointer.
    """

    op: Literal["add", "replace", "remove"]
    path: str
    value: Any = None

    def __post_init__(self) -> None:
        if self.op not in ("add", "replace", "remove"):
            raise ValueError("a patch is add, replace or remove")
        if not _POINTER.fullmatch(self.path):
            raise ValueError("a patch has a JSON Pointer from the root of the order, such as /cart/items")

    @classmethod
    def add(cls, path: str, value: Any) -> "Patch":
        """Sets a member, new or not; inserts into an array, at its end with `-`."""
        return cls("add", path, value)

    @classmethod
    def replace(cls, path: str, value: Any) -> "Patch":
        """Sets what must be there already."""
        return cls("replace", path, value)

    @classmethod
    def remove(cls, path: str) -> "Patch":
        """Takes away what is there; where nothing is, that is as wanted."""
        return cls("remove", path)


class Refuse(Exception):
    """
    The change may not be stored. `code` is kebab-case and `message` for the shopper's front end; `inner` is the cause
    as the system behind the handler names it (Norce's `innerErrorCode`).
    """

    def __init__(self, code: str, message: str, *, inner: str | None = None) -> None:
        super().__init__(code, message)
        self.code = _checked_code(code)
        self.message = message
        self.inner = inner

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


# --- what a handler is ----------------------------------------------------------------------------------------------


class _Handler(ABC, Generic[S]):
    settings_type: ClassVar[type[Settings]] = NoSettings

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Settings):
                    cls.settings_type = argument


class NotificationHandler(_Handler[S]):
    """
    Acts on a notification, once for each route that wants it.

    `repeatable = True` declares that repeating a request with the same key does no harm: a handler in doubt that has no
    `lookup` is then simply called again. Without either, an unknown outcome waits for a person.
    """

    repeatable: ClassVar[bool] = False

    @abstractmethod
    async def deliver(self, notification: Notification, context: Context[S]) -> Done | Skip:
        """Do it. The module says what to raise. The call is cancelled at its deadline; its outcome is then unknown."""

    async def lookup(self, notification: Notification, context: Context[S]) -> Done | None:
        """
        After an unknown outcome: is the effect there? `Done` where it is, None where nothing has happened.

        Called instead of `deliver`, never before the deadline of the call in doubt has passed. What it raises leaves
        the doubt and follows the retry schedule. Leave it out where the destination cannot be asked.
        """
        raise Unknown("no-lookup", "this handler cannot ask its destination")


class ValidationHandler(_Handler[S]):
    """
    Says whether a purchase may go on. Asked again for every try of the shopper: cheap, and without side effects.

    `computes = True` declares pure computation: it is then run in place, without a hop to the plugins' event loop.
    """

    computes: ClassVar[bool] = False

    @abstractmethod
    async def validate(self, order: Order, context: Context[S]) -> list[Problem]:
        """What stands against this purchase; empty to approve. A raised exception counts as no answer."""


class HookHandler(_Handler[S]):
    """
    Answers a change that is about to be stored: accepts it, refuses it, or asks for further changes.

    Called with the whole order, the change in it; what it was before and what has changed is not told (a callback of
    its own for each watched part, or `context.orders.read`, say more). It may be called again for the same change, and
    the change may still be refused by somebody else: no side effects. `computes = True` as for validations.
    """

    computes: ClassVar[bool] = False

    @abstractmethod
    async def change(self, order: Order, context: Context[S]) -> list[Patch]:
        """
        The further changes, empty to accept; raises `Refuse`. Any other exception counts as no answer, and so does a
        patch that does not apply to the order or leaves the target.
        """


def can_look_up(handler: type[NotificationHandler[Any]]) -> bool:
    """Whether this handler can be asked what became of a request."""
    return handler.lookup is not NotificationHandler.lookup
