"""The types of handlers' settings."""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import msgspec

from adapter.conditions import CompiledCondition, Condition, ConditionInvalid, Result
from adapter.orders import Order

if TYPE_CHECKING:
    import ssl

# An address that needs no parser. Importing httpx takes a quarter of the time of a command that lists.
_PLAIN_ADDRESS = re.compile(
    r"(https://[a-z][a-z0-9.-]*|http://(localhost|127\.0\.0\.1))(:[1-9][0-9]{0,3})?(/[A-Za-z0-9/._-]*)?"
)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class for a handler's settings, with one annotated field for each setting.

    Describe each field with `Annotated[str, msgspec.Meta(description="…")]`. A handler may reach only the hosts in its
    fields of type `Url`. A field of type `Secret` accepts only a reference (`${env:NAME}` or `${file:PATH}`). To check
    settings that depend on each other, raise `ValueError` in `__post_init__`: its message is shown with the place in
    the configuration file.
    """


class NoSettings(Settings, frozen=True, kw_only=True):
    """The settings of a handler that declares none."""


class Undecided(Exception):
    """A condition could not be evaluated on this order, so that it neither holds nor does not.

    `scope` is the condition's pointer and `code` the reason; `norce-adapter explain` shows more. Raised by a validation
    or a hook, it counts as no answer.
    """

    def __init__(self, scope: str, code: str) -> None:
        super().__init__(scope, code)
        self.scope = scope
        self.code = code

    def __str__(self) -> str:
        return f"the condition at {self.scope} could not be evaluated: {self.code}"


class Conditional(Settings, frozen=True, kw_only=True, dict=True):
    """Base class for settings that depend on a condition on the order.

    The condition is checked and compiled when the settings are read. A `__post_init__` of a subclass must call
    `super().__post_init__()`.
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
        """The compiled condition, for an evaluation with its reason."""
        return self.__dict__["compiled"]  # type: ignore[no-any-return]

    def holds(self, order: Order) -> bool:
        """Return True if the condition holds on this order.

        Raises:
            Undecided: The condition could not be evaluated.
        """
        evaluation = self.compiled.evaluate(order.data)
        if evaluation.result is Result.ERROR:
            raise Undecided(self.scope, str(evaluation.code))
        return evaluation.result is Result.MATCHED


class Pace:
    """The pace of evaluating many conditions on one order, for a handler that `computes`.

    Before each of them, `await asyncio.sleep(0)` if the pace is exceeded. Small orders do not reach it.
    """

    BYTES = 512 * 1024  # a condition takes at most 50 ms for a MiB

    def __init__(self, order: Order) -> None:
        self._each = len(order.raw)
        self._evaluated = 0

    def is_exceeded(self) -> bool:
        """Count one evaluation; return True if another task of the loop should run before it."""
        self._evaluated += self._each
        if self._evaluated <= self.BYTES or self._evaluated == self._each:
            return False
        self._evaluated = self._each
        return True


class Url(str):
    """An address that a handler may call: `https://…`, or `http://…` on this machine.

    A `PlainUrl` may also be `http://…` on another one. A trailing slash is removed. Creating one raises `ValueError`
    for any other address, and for one with credentials, a query or a fragment.
    """

    __slots__ = ()
    _may_be_plain: ClassVar[bool] = False

    def __new__(cls, text: str) -> Self:
        if _PLAIN_ADDRESS.fullmatch(text):
            return super().__new__(cls, text.rstrip("/"))
        import httpx

        try:
            parts = httpx.URL(text)
        except (httpx.InvalidURL, ValueError) as error:
            raise ValueError("is not an address") from error
        if any(character.isspace() for character in text) or not 0 < (1 if parts.port is None else parts.port) < 65536:
            raise ValueError("is not an address")
        loopback = parts.host in ("localhost", "127.0.0.1", "::1")
        may_be_plain = loopback or cls._may_be_plain
        if not parts.host or not (parts.scheme == "https" or (parts.scheme == "http" and may_be_plain)):
            if cls._may_be_plain:
                raise ValueError("must be an http:// or https:// address")
            raise ValueError("must be an https:// address; only localhost, 127.0.0.1 and [::1] may have http://")
        authority = text.partition("://")[2].partition("/")[0]
        if "@" in authority or "?" in text or "#" in text:
            raise ValueError("must be an address without user, password, query and fragment")
        return super().__new__(cls, text.rstrip("/"))

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: `("https", "shop.example", 443)`. The host is ASCII (`xn--…`)."""
        import httpx

        parts = httpx.URL(self)
        return parts.scheme, parts.raw_host.decode("ascii"), parts.port or {"https": 443, "http": 80}[parts.scheme]


class PlainUrl(Url):
    """An address that may be `http://…` on any host, without encryption: for private networks."""

    __slots__ = ()
    _may_be_plain = True


class PrivateCa(str):
    """Certificates of authorities in PEM, which a handler trusts beside the public ones.

    They count for all hosts in the settings that hold them. Give them by reference (`${file:PATH}`) or as a text.
    """

    __slots__ = ()

    def __new__(cls, pem: str) -> Self:
        import ssl

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
        except (ssl.SSLError, ValueError, TypeError):  # a TypeError for text beyond ASCII
            raise ValueError("must be certificates in PEM") from None
        return super().__new__(cls, pem)


class Secret:
    """A secret that `repr`, `str` and encoders do not show. Call `reveal()` where it is used."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret value."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


class ClientCertificate(Settings, frozen=True, kw_only=True):
    """A certificate with which a handler identifies itself to the hosts in its settings.

    It is shown to those that ask for one. Settings hold at most one.
    """

    certificate: Annotated[str, msgspec.Meta(description="The certificate and its chain in PEM, by reference.")]
    key: Annotated[Secret, msgspec.Meta(description="The private key in PEM, not encrypted, by reference.")]

    def __post_init__(self) -> None:
        import ssl

        try:
            self.load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        except OSError:
            raise ValueError("certificate and key must be in PEM, without a password, and belong together") from None

    def load(self, context: "ssl.SSLContext") -> None:
        """Let a TLS context use it."""
        # OpenSSL reads files only. This one is in memory, and ends here.
        with open(os.memfd_create("client-certificate"), "w", encoding="ascii", errors="replace") as file:
            file.write(f"{self.certificate}\n{self.key.reveal()}\n")
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")  # so that nobody is asked for it


class OAuth2(Settings, frozen=True, kw_only=True):
    """A login by OAuth 2.0, for `Context.auth`: client credentials, or a refresh token."""

    token_url: Annotated[Url, msgspec.Meta(description="Address that issues the tokens.")]
    client_id: Annotated[str, msgspec.Meta(min_length=1, description="Id of the client.")]
    client_secret: Annotated[Secret, msgspec.Meta(description="Secret of the client, by reference.")]
    client_auth: Annotated[
        Literal["basic", "body"],
        msgspec.Meta(description="How the client identifies itself: by HTTP Basic, or in the body."),
    ] = "basic"
    refresh_token: Annotated[
        Secret | None,
        msgspec.Meta(description="The first refresh token, by reference; the ledger keeps the later ones."),
    ] = None
    scope: Annotated[str | None, msgspec.Meta(description="Rights to ask for, separated by spaces.")] = None
    parameters: Annotated[
        dict[str, str], msgspec.Meta(description="Further members of the request, such as `audience`. Not for secrets.")
    ] = msgspec.field(default_factory=dict)
