"""A typed, read-only view of a Norce Checkout order over its unchanged bytes.

Use the view for reading only. To pass an order on, send `raw`, byte for byte, or members of `data`, the plain tree on
which conditions are evaluated. A member of an unexpected type never makes an order unreadable: it counts as absent,
because Norce's API descriptions disagree about what is nullable, and live orders vary more than either description.
"""

import gc
import math
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from hashlib import sha256
from types import UnionType
from typing import Any, TypeAlias, get_origin, get_type_hints

import msgspec

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAX_DIGITS = 4300  # of an integer, in Python
LARGE_BYTES = 64 * 1024
MAX_DEPTH = 200  # of objects and arrays in one another
# An order with more members of an unexpected type is shown with its ids alone: each one costs another conversion.
MAX_SET_ASIDE = 20


class NotAnOrder(Exception):
    """The bytes are not strict JSON (RFC 8259), not an object, or nested too deeply."""


_NOT_FINITE = "not a finite number: "


def _refuse_non_finite(**amounts: Decimal | None) -> None:
    for name, amount in amounts.items():
        if amount is not None and not amount.is_finite():
            raise ValueError(_NOT_FINITE + name)  # msgspec's own path does not name the member


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A part of an order.

    Missing and null mean the same: a part is then empty, a single value is None. The `repr` shows no values, because
    an order in a traceback would put personal data into the log.
    """

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Price(_Part, frozen=True, kw_only=True):
    """An amount in the major unit of the currency: 1234.50 SEK is `Decimal("1234.50")`."""

    including_vat: Decimal | None = None
    excluding_vat: Decimal | None = None

    def __post_init__(self) -> None:
        _refuse_non_finite(includingVat=self.including_vat, excludingVat=self.excluding_vat)


class Transition(_Part, frozen=True, kw_only=True):
    """A change of the order's status. `time_stamp` is ISO 8601."""

    status: str | None = None
    time_stamp: str | None = None


class OrderState(_Part, frozen=True, kw_only=True):
    """The status of an order and its history.

    `current_status` is `checkout`, `processing`, `accepted`, `completed`, `declined` or `removed`, or a status that
    Norce has added since.
    """

    current_status: str | None = None
    transitions: tuple[Transition, ...] = ()


class Discount(_Part, frozen=True, kw_only=True):
    """A discount on one line or on the whole cart."""

    type: str | None = None
    name: str | None = None
    reference: str | None = None
    description: str | None = None
    code: str | None = None
    value: Price = Price()
    attributes: dict[str, Any] = {}


class Logistics(_Part, frozen=True, kw_only=True):
    """The weight (g) and the size (mm) of one unit. Only v0 of Norce's API has them."""

    weight: int | None = None
    height: int | None = None
    width: int | None = None
    length: int | None = None
    tags: tuple[str, ...] = ()
    shipping_date: str | None = None


class Item(_Part, frozen=True, kw_only=True, dict=True):
    """A line of the cart.

    `price` is for one unit before discounts, `total` for all units after them. `vat_rate` is a fraction: `0.25` is
    25 %.
    """

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
    logistics: Logistics = Logistics()
    upsell: bool | None = None
    attributes: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _refuse_non_finite(vatRate=self.vat_rate)

    def __deepcopy__(self, _memo: Any) -> "Item":
        return self  # msgspec would leave out `data`

    @property
    def data(self) -> dict[str, Any]:
        """The line as a plain tree with its unknown members, as in `Order.data`. Do not change it."""
        return self.__dict__.get("data", {})  # type: ignore[no-any-return]


class Cart(_Part, frozen=True, kw_only=True):
    """The cart. `reference` is its id in the shop platform; `total` excludes shipping."""

    reference: str | None = None
    items: tuple[Item, ...] = ()
    discounts: tuple[Discount, ...] = ()
    total: Price = Price()
    attributes: dict[str, Any] = {}


class Address(_Part, frozen=True, kw_only=True):
    """A billing or shipping address, with the person or organization that it belongs to."""

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
    """The customer. `type` is `person` or `organization`, in the sender's upper or lower case."""

    type: str | None = None
    billing: Address = Address()
    shipping: Address = Address()
    attributes: dict[str, Any] = {}


class Consent(_Part, frozen=True, kw_only=True):
    """A consent that the shopper was asked for."""

    id: str | None = None
    checked: bool | None = None
    text: str | None = None
    required: bool | None = None


class Payment(_Part, frozen=True, kw_only=True):
    """A payment. Leave those in state `removed` out of sums and exports: they are deleted."""

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
    """A shipping product or a pickup location: a reference and a name."""

    reference: str | None = None
    name: str | None = None


class DeliveryDetails(_Part, frozen=True, kw_only=True):
    """The carrier's product and the pickup location of a shipping."""

    carrier: str | None = None
    carrier_product_id: str | None = None
    class_: str | None = msgspec.field(default=None, name="class")
    product: Named = Named()
    pickup_location: Named = Named()


class Shipping(_Part, frozen=True, kw_only=True):
    """A shipping. Leave those in state `removed` out of sums and exports: they are deleted."""

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


class Order:
    """An order as Norce sent it, bare or in an envelope `{"notification": …, "order": …}`.

    Its bytes are decoded at the first look: `data` at a look at `data`, the members at a look at any member, on the
    thread that looks. Either raises `NotAnOrder` if the bytes hold no order. An order cannot be encoded (`TypeError`);
    send `raw`, or members of `data`.

    Money is `Decimal` and exact: `0.1` is a tenth. Enumerations are plain strings, so that a value that Norce adds
    later survives. Members without a name here are in `data`.
    """

    raw: bytes  # the whole body, including the envelope
    data: dict[str, Any]  # the order as a plain tree, including unknown members; do not change it
    set_aside: tuple[str, ...]  # msgspec paths of members of an unexpected type: `$.cart.items[0].quantity`

    id: str
    merchant: str
    channel: str
    reference: str | None
    created: str | None
    last_modified: str | None
    state: OrderState
    culture: str | None
    currency: str | None
    country: str | None
    cart: Cart
    shippings: tuple[Shipping, ...]
    payments: tuple[Payment, ...]
    customer: Customer
    consents: tuple[Consent, ...]
    total: Price
    attributes: dict[str, Any]

    def __init__(self, raw: bytes, data: dict[str, Any] | None = None) -> None:
        """Keep the bytes. `data` saves a decode if the caller has decoded them already."""
        self.__dict__["raw"] = raw
        if data is not None:
            self.__dict__["data"] = data

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            decoded = {"data": order_in(decode(self.raw))}
        elif name in Order.__annotations__:
            decoded = _members(self.raw, self.data)
        else:
            raise AttributeError(f"an order has no member {name!r}")
        self.__dict__.update(decoded)
        return decoded[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("an order is read-only")

    def __repr__(self) -> str:
        return f"<Order {self.id}>"


def _empty(hint: Any) -> Any:
    kind = get_origin(hint) or hint
    return None if kind is UnionType else kind()


_NOT_MEMBERS = ("raw", "data", "set_aside")
_Members: Any = msgspec.defstruct(
    "_Members",
    [(name, hint, _empty(hint)) for name, hint in get_type_hints(Order).items() if name not in _NOT_MEMBERS],
    bases=(_Part,),
    frozen=True,
    kw_only=True,
)


def decode(raw: bytes, kind: Any = Any) -> Any:
    """Decode JSON (RFC 8259) to a plain tree with int and float, or to a type of msgspec.

    Every JSON from elsewhere is decoded here, because two parsers would accept different texts. Of equal keys the last
    one wins. A byte order mark is skipped. An escape that is half of a surrogate pair is read as U+FFFD, and a number
    beyond a double as the largest double. Integers of up to 4 300 digits are exact.

    Raises:
        NotAnOrder: The bytes are not JSON, do not have the type, or are nested more than `MAX_DEPTH` levels deep.
    """
    return _decoded(_PLAIN if kind is Any else _decoder_of(kind), raw)


@cache
def _decoder_of(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind, float_hook=_double)


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    try:
        try:
            tree = _without_collection(decoder.decode, raw)
        except msgspec.DecodeError:
            tree = _without_collection(decoder.decode, _repaired(raw))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise NotAnOrder("not valid JSON") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and isinstance(tree, dict | list) and _is_deep(tree):
        raise NotAnOrder("nested too deeply")
    return tree


def _without_collection(decode: Callable[[bytes], Any], raw: bytes) -> Any:
    """Decode without the garbage collector, which would take longer and find nothing."""
    if len(raw) < LARGE_BYTES or not gc.isenabled():
        return decode(raw)
    gc.disable()
    try:
        return decode(raw)
    finally:
        gc.enable()


def _repaired(raw: bytes) -> bytes:
    """Return JSON that the decoder takes for JSON that it does not take. Takes linear time."""
    text = _SURROGATES.sub(
        lambda found: found[0] if found[2] else found[1] + rb"\ufffd", raw.removeprefix(b"\xef\xbb\xbf")
    )
    if not _DIGITS.search(text):
        return text
    return _STRING_OR_INTEGER.sub(_in_range, text)


def _in_range(found: re.Match[bytes]) -> bytes:
    if found[0].startswith(b'"'):
        return found[0]
    return b"-" * found[0].startswith(b"-") + repr(_LARGEST).encode()


def _is_deep(tree: Any) -> bool:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for each in level
            for part in (each.values() if type(each) is dict else each)
            if type(part) is list or type(part) is dict
        ]
        if not level:
            return False
    return True


def order_in(tree: Any) -> dict[str, Any]:
    """Return the order in a decoded body: the body itself, or its member `order`.

    Norce's public descriptions contain both shapes (checkout protocol, section 8.3).

    Raises:
        NotAnOrder: The body is not an object.
    """
    if isinstance(tree, dict):
        inner = tree.get("order")
        return inner if isinstance(inner, dict) else tree
    raise NotAnOrder("the body is not a JSON object")


def read_order(raw: bytes, data: dict[str, Any] | None = None) -> Order:
    """Decode an order completely, so that no later look at it can fail.

    Raises:
        NotAnOrder: The bytes hold no JSON object, or one that is nested too deeply.
    """
    order = Order(raw, data)
    _ = order.data, order.id
    return order


def instant(text: Any) -> datetime | None:
    """Return an ISO 8601 moment in UTC, or None if the text is none. No zone means UTC."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def canonical(tree: Any) -> bytes:
    """Encode a JSON value so that equal values have equal bytes.

    Keys are sorted, whitespace is left out, and 1.0 is written as 1. A number beyond 10^40 is written as it is, so an
    integer differs from a fraction there: 1e308 as an integer would take a hundred times as long.

    Raises:
        NotAnOrder: The value is nested too deeply.
    """
    try:
        # Through a text, because a walk through the tree in Python would take five times as long.
        text = msgspec.json.encode(tree)
        return msgspec.json.encode(_without_collection(_INTEGRAL.decode, text), order="sorted")
    except RecursionError as error:
        raise NotAnOrder("nested too deeply") from error


def order_digest(order: dict[str, Any]) -> bytes:
    """Return 16 bytes that are equal for equal orders, whatever their spelling.

    Raises:
        NotAnOrder: The order is nested too deeply.
    """
    return sha256(canonical(order)).digest()[:16]


def _members(raw: bytes, data: dict[str, Any]) -> dict[str, Any]:
    """Return the typed members of the order in these bytes, with `set_aside`."""
    exact = _without_nulls(order_in(_decoded(_EXACT, raw)))
    plain_items = dict(_plain_items(exact.get("cart"), data.get("cart")))
    set_aside: list[str] = []
    while True:
        try:
            members = msgspec.convert(exact, _Members)
            break
        except msgspec.ValidationError as error:
            message, _, path = str(error).rpartition(" - at `")
            path = path.rstrip("`") + message.replace(_NOT_FINITE, ".") * message.startswith(_NOT_FINITE)
            if len(set_aside) == MAX_SET_ASIDE or not _remove(exact, path):
                ids = {name: exact[name] for name in ("id", "merchant", "channel") if isinstance(exact.get(name), str)}
                members = _Members(**ids)
                set_aside.append("$")
                break
            set_aside.append(path)
    if members.cart.items:
        _add_data(members.cart.items, exact["cart"], plain_items)
    return {**msgspec.structs.asdict(members), "set_aside": tuple(set_aside)}


def _plain_items(exact: Any, plain: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the identity of each exact item of a cart or a bundle, and its plain tree."""
    items = exact.get("items") if isinstance(exact, dict) else None
    if isinstance(items, list):
        for item, its_plain in zip(items, (each for each in plain["items"] if each is not None), strict=True):
            if isinstance(item, dict):
                yield id(item), its_plain
                yield from _plain_items(item, its_plain)


def _add_data(items: tuple[Item, ...], exact: Any, plain_items: dict[int, dict[str, Any]]) -> None:
    for item, its_exact in zip(items, exact.get("items", ()), strict=True):
        item.__dict__["data"] = plain_items[id(its_exact)]
        _add_data(item.items, its_exact, plain_items)


def _remove(tree: Any, path: str) -> bool:
    """Remove the member at a msgspec path (`$.cart.items[0].name`) if there is one."""
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
    if isinstance(exponent, int) and abs(exponent) <= 100:
        return value
    return Decimal(repr(_double(text)))


_LARGEST = sys.float_info.max


def _double(text: str) -> float:
    value = float(text)
    return value if -_LARGEST <= value <= _LARGEST else math.copysign(_LARGEST, value)


def _integral(text: str) -> float | int:
    value = float(text)
    return int(value) if -_MOST_INTEGRAL < value < _MOST_INTEGRAL and value.is_integer() else value


_MOST_INTEGRAL = 1e40
_INTEGRAL: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_integral)
# With a hook, because msgspec's own floats take 12 us each near the limits of a double: 2 s for a MiB of 1e308.
_PLAIN: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_double)
_EXACT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_decimal)
# The escape of a pair (group 2) or of half a pair, behind an even number of backslashes (group 1).
_SURROGATES = re.compile(
    rb"(?<!\\)((?:\\\\)*+)\\u[dD](?:[89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|[c-fC-F][0-9a-fA-F]{2})"
)
# An integer with too many digits for msgspec, which counts the sign. A string may lack its end, so that no quote is
# looked at twice, and a search does not begin inside a number.
_DIGITS = re.compile(rb"(?<![0-9])[0-9]{%d}" % MAX_DIGITS)
_STRING_OR_INTEGER = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?|(?<![0-9.eE+-])(?:-|(?=[0-9]{%d}))[1-9][0-9]{%d,}+(?![.eE])'
    % (MAX_DIGITS + 1, MAX_DIGITS - 1),
    re.DOTALL,
)
