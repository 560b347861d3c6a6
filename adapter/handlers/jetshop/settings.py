"""The settings of `jetshop` and their checks.

`unmapped: fail` without a `method_map` would refuse every paid order, so `norce-adapter check` reports it. Timeouts
belong to the route.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal, TypeAlias

import msgspec

from adapter.plugin import Secret, Settings, Url

PaymentState: TypeAlias = Literal["reserved", "captured", "confirmed", "pending"]

# The handler or the HTTP client sets these. A second value would be sent beside theirs, or instead.
RESERVED_HEADERS = frozenset(
    {"accept", "authorization", "connection", "content-encoding", "content-length", "content-type", "host"}
    | {"idempotency-key", "te", "trailer", "transfer-encoding", "upgrade"}
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token, RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# Only attributes, since the order key is stored and shown to operators: another pointer could name an e-mail address.
_ATTRIBUTE = re.compile(r"(/cart)?/attributes/([^~]|~[01])+")


class BasicAuth(Settings, frozen=True, kw_only=True, tag_field="type", tag="basic"):
    """HTTP Basic, which Jetshop's integration service uses."""

    username: Annotated[str, msgspec.Meta(min_length=1, description="User name; without a colon.")]
    password: Annotated[Secret, msgspec.Meta(description="Password, by reference.")]

    def __post_init__(self) -> None:
        if ":" in self.username:
            raise ValueError("username must not hold a colon: HTTP Basic ends the name there")


class BearerAuth(Settings, frozen=True, kw_only=True, tag_field="type", tag="bearer"):
    """`Authorization: Bearer …`, for a bridge."""

    token: Annotated[Secret, msgspec.Meta(description="The token, by reference.")]

    def __post_init__(self) -> None:
        _check_secret_header("token", self.token)


class HeaderAuth(Settings, frozen=True, kw_only=True, tag_field="type", tag="header"):
    """A secret in a header of its own, for a bridge."""

    name: Annotated[str, msgspec.Meta(min_length=1, description="Name of the header, such as `x-api-key`.")]
    value: Annotated[Secret, msgspec.Meta(description="Its whole value, by reference.")]

    def __post_init__(self) -> None:
        _check_header_name("name", self.name, RESERVED_HEADERS - {"authorization"})
        _check_secret_header("value", self.value)


class Method(Settings, frozen=True, kw_only=True):
    """A payment method of the shop."""

    code: Annotated[str, msgspec.Meta(min_length=1, description="The shop's code of the payment method.")]
    name: Annotated[str | None, msgspec.Meta(description="Its name for people; left out of the export if absent.")] = (
        None
    )


class JetshopSettings(Settings, frozen=True, kw_only=True):
    """The settings of the handler `jetshop`."""

    base_url: Annotated[
        Url,
        msgspec.Meta(
            description="Where the export goes: Jetshop's resource, or a bridge before it. There is no default, since "
            "Jetshop documents no host for this."
        ),
    ]
    shop_id: Annotated[str, msgspec.Meta(min_length=1, description="The shop, as the destination names it.")]
    auth: Annotated[
        BasicAuth | BearerAuth | HeaderAuth,
        msgspec.Meta(description="How we identify ourselves; `type` is `basic`, `bearer` or `header`."),
    ]
    headers: Annotated[
        dict[str, str],
        msgspec.Meta(description="Further headers, the same on each request, such as `channelid`. Not for secrets."),
    ] = msgspec.field(default_factory=dict)
    path_payment_information: Annotated[
        str,
        msgspec.Meta(
            description="Path below `base_url`; `{orderKey}` is needed, `{shopId}` is not. Values are percent-encoded."
        ),
    ] = "/shops/{shopId}/orders/{orderKey}/payment-information"
    key_source: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            min_length=1,
            description="What the shop knows the order by; the first that has a value: `reference`, `cart.reference`, "
            "`id`, or a pointer to an attribute (`/attributes/…`, `/cart/attributes/…`).",
        ),
    ] = ("reference", "cart.reference")
    include_states: Annotated[
        tuple[PaymentState, ...],
        msgspec.Meta(min_length=1, description="Payments in these states are exported, those in others are left out."),
    ] = ("reserved", "captured", "confirmed", "pending")
    method_map: Annotated[
        dict[str, Method],
        msgspec.Meta(
            description="The shop's payment methods by those of the order. Looked up as `adapterId:name`, `adapterId`, "
            "`name`, `*`."
        ),
    ] = msgspec.field(default_factory=dict)
    unmapped: Annotated[
        Literal["fail", "passthrough"],
        msgspec.Meta(
            description="A payment that `method_map` has no entry for: `fail` refuses the order; `passthrough` sends "
            "the payment's `adapterId` as code and its name as name."
        ),
    ] = "fail"
    amount_tolerance: Annotated[
        Decimal,
        msgspec.Meta(
            description="How far the payments may be from the order's total, in the major unit of the currency."
        ),
    ] = Decimal("0.01")
    money_scale: Annotated[
        int, msgspec.Meta(ge=2, le=4, description="Decimals of an amount; rounded half up. 2 to 4.")
    ] = 2
    customer: Annotated[
        Literal["full", "contact", "none"],
        msgspec.Meta(
            description="How much of the customer is sent: `full` is type, e-mail, phone and addresses, `contact` is "
            "the first three. National identity numbers are never sent."
        ),
    ] = "full"
    not_found_grace_seconds: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="So long after the first attempt, an order that the shop does not know is tried again."
        ),
    ] = 600

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            _check_header_name("headers", name, RESERVED_HEADERS)
            if not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"headers: {name} must have a value of plain ASCII text on one line")
        if isinstance(self.auth, HeaderAuth) and self.auth.name.lower() in map(str.lower, self.headers):
            raise ValueError(f"headers: {self.auth.name} is what auth sends; leave it out of headers")
        _check_path(self.path_payment_information)
        for source in self.key_source:
            if source not in ("reference", "cart.reference", "id") and not _ATTRIBUTE.fullmatch(source):
                raise ValueError(
                    "key_source takes reference, cart.reference, id, /attributes/… and /cart/attributes/…, "
                    f"not {source!r}"
                )
        if not self.amount_tolerance.is_finite() or self.amount_tolerance < 0:
            raise ValueError("amount_tolerance must be zero or more")
        if self.unmapped == "fail" and not self.method_map:
            raise ValueError(
                "method_map is empty, so every paid order would be refused: give the shop's code for each payment "
                'adapter (klarna_checkout_adapter: {code: …}), or one for all ("*": {code: …}), or set unmapped to '
                "passthrough"
            )


def _check_header_name(where: str, name: str, reserved: frozenset[str]) -> None:
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} is not the name of a header")
    if name.lower() in reserved:
        raise ValueError(f"{where}: {name} is set by this handler; leave it out")


def _check_secret_header(where: str, secret: Secret) -> None:
    if not secret.reveal().strip() or not _HEADER_VALUE.fullmatch(secret.reveal()):
        raise ValueError(f"{where} must be plain ASCII text on one line")


def _check_path(path: str) -> None:
    names = _PLACEHOLDER.findall(path)
    if unknown := sorted(set(names) - {"shopId", "orderKey"}):
        raise ValueError(f"path_payment_information takes {{shopId}} and {{orderKey}}, not {{{unknown[0]}}}")
    if "orderKey" not in names:
        raise ValueError("path_payment_information needs {orderKey}: without it all orders have the same address")
    rest = _PLACEHOLDER.sub("x", path)
    if not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+/?", rest) or {".", ".."} & set(rest.split("/")):
        raise ValueError("path_payment_information must be a plain path that starts with /, without a query")
