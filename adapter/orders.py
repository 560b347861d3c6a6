"""
A typed, read-only view of a Norce Checkout order over its untouched bytes.

The view is for reading, never for passing on: what a handler forwards is `raw`, byte for byte. Members that this view
does not know are in `data`, the plain tree that conditions are evaluated on. An order is never refused because an
optional member has an odd type: that member then counts as absent (Norce's API descriptions disagree
about what is nullable, and live orders are more varied than either).
"""

from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

# How many odd members are set aside, one by one, before an order is shown with its ids alone.
MOST_MEMBERS_SET_ASIDE = 20


class NotAnOrder(Exception):
    """The bytes are not one JSON object in strict JSON (RFC 8259), or hold no order."""


_NOT_FINITE = "not a finite number: "


def _refuse_non_finite(**amounts: Decimal | None) -> None:
    for name, amount in amounts.items():
        if amount is not None and not amount.is_finite():
            raise ValueError(_NOT_FINITE + name)  # the member, which msgspec's own path does not name


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """
    A part of an order. Missing and null are the same: parts are empty rather than None, single values are None.

    Its `repr` shows no values: an order in a traceback would be personal data in a log.
    """

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Price(_Part, frozen=True, kw_only=True):
    """An amount in the major unit of the order's currency: 1234.50 SEK is `Decimal("1234.50")`."""

    including_vat: Decimal | None = None
    excluding_vat: Decimal | None = None

    def __post_init__(self) -> None:
        _refuse_non_finite(includingVat=self.including_vat, excludingVat=self.excluding_vat)


class Transition(_Part, frozen=True, kw_only=True):
    status: str | None = None
    time_stamp: str | None = None


class State(_Part, frozen=True, kw_only=True):
    """`current_status`: checkout, processing, accepted, completed, declined, removed, or one that came later."""

    current_status: str | None = None
    transitions: tuple[Transition, ...] = ()


class Discount(_Part, frozen=True, kw_only=True):
    type: str | None = None
    name: str | None = None
    reference: str | None = None
    description: str | None = None
    code: str | None = None
    value: Price = Price()
    attributes: dict[str, Any] = {}


class Item(_Part, frozen=True, kw_only=True):
    """A line of the cart. `price` is one unit before discount, `total` all units after it; `vat_rate` is a fraction."""

    id: str | None = None
    reference: str | None = None
    name: str | None = None
    sku: str | None = None
    product_type: str | None = None
    items: tuple["Item", ...] = ()
    url: str | None = None
    image_url: str | None = None
    quantity: int | None = None
    unit: str | None = None
    price: Price = Price()
    total: Price = Price()
    original_total: Price = Price()
    vat_rate: Decimal | None = None
    discounts: tuple[Discount, ...] = ()
    upsell: bool | None = None
    attributes: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _refuse_non_finite(vatRate=self.vat_rate)


class Cart(_Part, frozen=True, kw_only=True):
    """`reference` is the platform's cart id; `total` is without shipping."""

    reference: str | None = None
    items: tuple[Item, ...] = ()
    discounts: tuple[Discount, ...] = ()
    total: Price = Price()
    attributes: dict[str, Any] = {}


class Address(_Part, frozen=True, kw_only=True):
    type: str | None = None
    given_name: str | None = None
    family_name: str | None = None
    care_of: str | None = None
    reference: str | None = None
    organization_name: str | None = None
    street_address: str | None = None
    street_address2: str | None = None
    postal_code: str | None = None
    city: str | None = None
    region: str | None = None
    country: str | None = None
    phone: str | None = None
    email: str | None = None
    national_identification_number: str | None = None
    organization_identification_number: str | None = None
    attributes: dict[str, Any] = {}


class Customer(_Part, frozen=True, kw_only=True):
    """`type` is person or organization, in whatever case the sender writes it."""

    type: str | None = None
    billing: Address = Address()
    shipping: Address = Address()
    attributes: dict[str, Any] = {}


class Consent(_Part, frozen=True, kw_only=True):
    id: str | None = None
    checked: bool | None = None
    text: str | None = None
    required: bool | None = None


class Payment(_Part, frozen=True, kw_only=True):
    """`state` `removed` means soft-deleted: leave such payments out of sums and exports."""

    id: str | None = None
    adapter_id: str | None = None
    name: str | None = None
    type: str | None = None
    amount: Decimal | None = None
    upper_limit_amount: Decimal | None = None
    currency: str | None = None
    state: str | None = None
    reference: str | None = None
    attributes: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _refuse_non_finite(amount=self.amount, upperLimitAmount=self.upper_limit_amount)


class Named(_Part, frozen=True, kw_only=True):
    reference: str | None = None
    name: str | None = None


class DeliveryDetails(_Part, frozen=True, kw_only=True):
    carrier: str | None = None
    carrier_product_id: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    product: Named = Named()
    pickup_location: Named = Named()


class Shipping(_Part, frozen=True, kw_only=True):
    """`state` `removed` means soft-deleted: leave such shippings out of sums and exports."""

    id: str | None = None
    adapter_id: str | None = None
    name: str | None = None
    state: str | None = None
    reference: str | None = None
    tms_reference: str | None = None
    total: Price = Price()
    vat_rate: Decimal | None = None
    delivery_details: DeliveryDetails = DeliveryDetails()
    attributes: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _refuse_non_finite(vatRate=self.vat_rate)


class Order(_Part, frozen=True, kw_only=True, dict=True):
    """
    An order as Norce sent it. Made by `read_order`; `raw` and `data` are what it was made from.

    Money is `Decimal`, read from the same bytes as `data`, so that `0.1` is a tenth. Values of enumerations stay
    plain strings, so that a new one survives. What the view lacks is in `data`.
    """

    id: str = ""
    merchant: str = ""
    channel: str = ""
    reference: str | None = None
    created: str | None = None
    last_modified: str | None = None
    state: State = State()
    culture: str | None = None
    currency: str | None = None
    country: str | None = None
    cart: Cart = Cart()
    shippings: tuple[Shipping, ...] = ()
    payments: tuple[Payment, ...] = ()
    customer: Customer = Customer()
    consents: tuple[Consent, ...] = ()
    total: Price = Price()
    attributes: dict[str, Any] = {}

    @property
    def data(self) -> dict[str, Any]:
        """The order as a plain tree, unknown members included. To be read, not changed."""
        return self.__dict__["data"]  # type: ignore[no-any-return]

    @property
    def raw(self) -> bytes:
        """The bytes that the order was read from; where it came in an envelope, the whole envelope."""
        return self.__dict__["raw"]  # type: ignore[no-any-return]

    @property
    def set_aside(self) -> tuple[str, ...]:
        """Where members stood whose type did not fit, as msgspec paths (`$.cart.items[0].quantity`)."""
        return self.__dict__["set_aside"]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<Order {self.id}>"


class SendOrderDataInstead:
    """
    Stands in the place of a member until it is looked at. msgspec encodes members without a look, and would find an
    empty order there; now it finds what it cannot encode, and whose name says what to do.
    """


class _Unread(Order, frozen=True, kw_only=True, dict=True):
    @property
    def _view(self) -> Order:
        view = self.__dict__.get("view")
        if view is None:
            view = self.__dict__["view"] = read_order(self.raw, self.data)
        return view

    @property
    def set_aside(self) -> tuple[str, ...]:
        return self._view.set_aside


for _name in Order.__struct_fields__:
    setattr(_Unread, _name, property(attrgetter(f"_view.{_name}")))


_NOT_LOOKED_AT: Any = SendOrderDataInstead()


def decode(raw: bytes) -> Any:
    """
    The one decode of every body: strict JSON to a plain tree, numbers as int and float, the last of equal keys wins.

    Raises `NotAnOrder` on anything that is not JSON, a number out of range and nesting beyond the decoder's bound too.
    """
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotAnOrder("not valid JSON") from error


def order_in(tree: Any) -> dict[str, Any]:
    """
    The order in a body: the body itself, or the `order` member of `{"notification": …, "order": …}`.

    Both shapes are in Norce's public descriptions (checkout protocol, section 8.3). Raises `NotAnOrder`.
    """
    if isinstance(tree, dict):
        inner = tree.get("order")
        return inner if isinstance(inner, dict) else tree
    raise NotAnOrder("the body is not a JSON object")


def read_order(raw: bytes, data: dict[str, Any] | None = None) -> Order:
    """
    The typed view of the order in `raw`, bare or in an envelope. `data` saves a second decode where the caller has one.

    Raises `NotAnOrder` where the bytes hold no JSON object, or one nested too deeply; a wrong type in a member never
    raises.
    """
    if data is None:
        data = order_in(decode(raw))
    try:
        exact = _without_nulls(order_in(_EXACT.decode(raw)))
    except RecursionError as error:
        raise NotAnOrder("nested too deeply") from error
    order, set_aside = _view(exact)
    order.__dict__.update(data=data, raw=raw, set_aside=set_aside)
    return order


def unread(raw: bytes, data: dict[str, Any]) -> Order:
    """
    The same where `data` is what `raw` holds, but the view is made when somebody first looks at it: most conditions
    never do, and it takes eight times as long as to decode. A look raises `NotAnOrder` on what is nested too deeply.
    """
    order = _Unread(id=_NOT_LOOKED_AT)
    order.__dict__.update(data=data, raw=raw)
    return order


def viewed(order: Order) -> Order:
    """
    The same with its view made. For whoever may do more than look at it: what is unread is an empty order to msgspec,
    which encodes, compares and copies members without a look. Raises `NotAnOrder`.
    """
    return order._view if isinstance(order, _Unread) else order


def instant(text: Any) -> datetime | None:
    """An ISO 8601 moment as aware UTC, or None where the text is none. A moment without a zone is taken as UTC."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def canonical(tree: Any) -> bytes:
    """
    One spelling of a JSON value: sorted keys, compact, 1.0 written as 1. Equal values have equal bytes.

    Raises `NotAnOrder` where it is nested too deeply.
    """
    try:
        return msgspec.json.encode(_integral(tree), order="sorted")
    except RecursionError as error:
        raise NotAnOrder("nested too deeply") from error


def order_digest(raw: bytes) -> bytes:
    """
    16 bytes that are equal for equal orders, however they are spelled and whether or not in an envelope.

    Decoded and encoded without a walk of our own, for a caller may send a mebibyte as often as it likes. Raises
    `NotAnOrder`.
    """
    try:
        return sha256(msgspec.json.encode(order_in(_INTEGRAL.decode(raw)), order="sorted")).digest()[:16]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotAnOrder("not valid JSON, or nested too deeply") from error


def _integral(tree: Any) -> Any:
    if isinstance(tree, float) and tree.is_integer():
        return int(tree)
    if isinstance(tree, dict):
        return {key: _integral(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_integral(value) for value in tree]
    return tree


def _view(exact: Any) -> tuple[Order, tuple[str, ...]]:
    set_aside: list[str] = []
    while len(set_aside) < MOST_MEMBERS_SET_ASIDE:
        try:
            return msgspec.convert(exact, Order), tuple(set_aside)
        except msgspec.ValidationError as error:
            what, _, path = str(error).rpartition(" - at `")
            path = path.rstrip("`") + what.replace(_NOT_FINITE, ".") * what.startswith(_NOT_FINITE)
            if not _drop(exact, path):
                break
            set_aside.append(path)
    ids = {name: exact[name] for name in ("id", "merchant", "channel") if isinstance(exact.get(name), str)}
    return Order(**ids), (*set_aside, "$")


def _drop(tree: Any, path: str) -> bool:
    """Takes the member at a msgspec path (`$.cart.items[0].name`) out of the tree; False where it cannot be found."""
    steps: list[str | int] = []
    for part in path.removeprefix("$").split("."):
        name, *indices = part.split("[")
        if name:
            steps.append(name)
        for index in indices:
            if not index.rstrip("]").isdigit():
                return False
            steps.append(int(index.rstrip("]")))
    if not steps:
        return False
    try:
        for step in steps[:-1]:
            tree = tree[step]
        del tree[steps[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_nulls(value) for value in tree if value is not None]
    return tree


def _decimal(text: str) -> Decimal:
    # A number such as 1e-1000000 is zero as a float, and a denial of service as an exact decimal.
    value = Decimal(text)
    exponent = value.as_tuple().exponent
    return value if isinstance(exponent, int) and abs(exponent) <= 100 else Decimal(repr(float(text)))


_EXACT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_decimal)


def _integer_or_float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


_INTEGRAL: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_integer_or_float)
