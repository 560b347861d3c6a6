"""`adapter.orders`: exact amounts, tolerant of odd members, and no values in a `repr`."""

import contextlib
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.orders import (
    MAX_DEPTH,
    MAX_SET_ASIDE,
    NotAnOrder,
    Order,
    Price,
    canonical,
    decode,
    instant,
    order_in,
    read_order,
)
from tests import ORDERS

COMPLETED = (ORDERS / "order-completed.json").read_bytes()
TREE: dict[str, Any] = json.loads(COMPLETED)
CANARY = "canary-19811218"


def order_of(**members: Any) -> Order:
    return read_order(json.dumps({"id": "order-1", **members}).encode())


def members(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in Order.__annotations__ if name not in ("raw", "data")}


# --- the view -------------------------------------------------------------------------------------------------------


def test_raw_is_the_unchanged_body() -> None:
    spelled = b' {"id" : "order-1",\n"total": {"includingVat": 1.50}, "id": "order-1"}\n'

    assert read_order(spelled).raw == spelled


def test_a_real_order_is_decoded_completely() -> None:
    order = read_order(COMPLETED)

    assert order.set_aside == ()
    assert (order.id, order.merchant, order.channel) == (TREE["id"], "fjallboden", "se-b2c")
    assert order.state.current_status == "completed"
    assert [item.sku for item in order.cart.items] == [item["sku"] for item in TREE["cart"]["items"]]
    assert order.cart.items[0].price == Price(including_vat=Decimal(1499), excluding_vat=Decimal("1199.2"))
    assert order.data == TREE


def test_a_decoded_tree_is_not_decoded_again() -> None:
    data = order_in(decode(COMPLETED))

    assert read_order(COMPLETED, data).data is data


@pytest.mark.parametrize(
    ("written", "exact"),
    [
        ("0.1", Decimal("0.1")),
        ("1499.90", Decimal("1499.90")),
        ("100", Decimal(100)),
        ("1e2", Decimal(100)),
        ("-0.05", Decimal("-0.05")),
        ("0.30000000000000004", Decimal("0.30000000000000004")),
        ("79228162514264337593543950335.5", Decimal("79228162514264337593543950335.5")),
        ('"12.30"', Decimal("12.30")),
    ],
)
def test_an_amount_is_exact(written: str, exact: Decimal) -> None:
    order = read_order(b'{"id": "order-1", "total": {"includingVat": %s}}' % written.encode())

    assert order.total.including_vat == exact


def test_tenths_add_up() -> None:
    tenth = order_of(total={"includingVat": 0.1}).total.including_vat

    assert tenth is not None
    assert sum([tenth] * 10) == 1


@pytest.mark.parametrize("written", ["1e-1000000", "0.1e-999999999", "1e-101"])
def test_a_number_with_an_absurd_exponent_does_no_harm(written: str) -> None:
    order = read_order(b'{"id": "order-1", "total": {"includingVat": %s}}' % written.encode())

    assert order.total.including_vat is not None
    assert 0 <= order.total.including_vat < Decimal("1e-99")
    assert len(f"{order.total.including_vat:f}") < 400


NOT_FINITE = ["NaN", "nan", "sNaN", "Infinity", "-Infinity", "inf"]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_an_amount_that_is_not_finite_is_set_aside_alone(value: str) -> None:
    item = {"sku": "A", "vatRate": value, "price": {"includingVat": 10, "excludingVat": value}}
    order = order_of(
        cart={"items": [item]},
        payments=[{"id": "p-1", "amount": value, "upperLimitAmount": 5}],
        total={"includingVat": value, "excludingVat": 8},
    )

    (line,), (payment,) = order.cart.items, order.payments
    assert (line.sku, line.vat_rate, line.price) == ("A", None, Price(including_vat=Decimal(10)))
    assert (payment.id, payment.amount, payment.upper_limit_amount) == ("p-1", None, Decimal(5))
    assert order.total == Price(excluding_vat=Decimal(8))
    assert sorted(order.set_aside) == [
        "$.cart.items[0].price.excludingVat",
        "$.cart.items[0].vatRate",
        "$.payments[0].amount",
        "$.total.includingVat",
    ]


def test_a_name_that_looks_like_a_number_is_a_name() -> None:
    assert order_of(customer={"billing": {"givenName": "Nan"}}).customer.billing.given_name == "Nan"


def test_unknown_members_are_in_the_data() -> None:
    order = order_of(loyalty={"level": 3}, cart={"items": [{"sku": "A", "logistics": {"weight": 5}}]})

    assert order.data["loyalty"] == {"level": 3}
    assert order.data["cart"]["items"][0]["logistics"] == {"weight": 5}
    assert order.cart.items[0].logistics.weight == 5
    assert order.set_aside == ()


def test_an_item_has_its_own_data_whatever_is_set_aside() -> None:
    lines = [
        None,
        {"sku": "A", "colour": "red", "price": None},
        "no item",
        {"sku": "B", "quantity": "many", "items": [{"sku": "C", "size": 0.1}, 7, {"sku": "D", "items": {}}]},
    ]
    order = order_of(cart={"items": lines})

    first, bundle = order.cart.items
    assert first.data is order.data["cart"]["items"][1]
    assert first.data == {"sku": "A", "colour": "red", "price": None}
    assert [each.data for each in bundle.items] == [{"sku": "C", "size": 0.1}, {"sku": "D", "items": {}}]
    assert copy.deepcopy(order).cart.items[0].data == first.data
    assert order_of(cart={"items": "none"}).cart.items == ()


def test_new_values_of_enumerations_are_kept() -> None:
    order = order_of(
        state={"currentStatus": "on-hold"},
        customer={"type": "robot"},
        payments=[{"state": "half-done", "type": "barter"}],
    )

    assert (order.state.current_status, order.customer.type) == ("on-hold", "robot")
    assert (order.payments[0].state, order.payments[0].type) == ("half-done", "barter")


def nulled(tree: Any) -> Iterator[Any]:
    """Yield the order once for every member, with that member null."""
    for path in paths(tree):
        changed = copy.deepcopy(tree)
        put(changed, path, None)
        yield path, changed


def paths(tree: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of every member of an order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*at, key)
            yield from paths(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from paths(value, (*at, index))


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    for step in path[:-1]:
        tree = tree[step]
    tree[path[-1]] = value


def removed(tree: Any, path: tuple[str | int, ...]) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    return tree


def test_null_is_the_same_as_absent() -> None:
    for path, with_null in nulled(TREE):
        if "attributes" in path[:-1]:
            continue  # free form
        without = read_order(json.dumps(removed(TREE, path)).encode())
        order = read_order(json.dumps(with_null).encode())

        assert members(order) == members(without), path
        assert order.set_aside == (), path


def test_an_order_in_an_envelope_gives_the_same_view() -> None:
    envelope = b'{"notification": {"id": "n-1", "scope": "/state"}, "order": ' + COMPLETED + b"}"
    bare, enveloped = read_order(COMPLETED), read_order(envelope)

    assert members(enveloped) == members(bare)
    assert enveloped.data == bare.data
    assert enveloped.raw == envelope


PLACES = list(paths(TREE))
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(NOT_FINITE),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "items", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(place=st.sampled_from(PLACES), value=JSON_VALUES)
def test_only_the_member_of_a_wrong_type_is_set_aside(place: tuple[Any, ...], value: Any) -> None:
    tree = copy.deepcopy(TREE)
    put(tree, place, value)

    order = read_order(json.dumps(tree).encode())

    for name in ("id", "merchant", "channel"):
        if isinstance(tree[name], str):
            assert getattr(order, name) == tree[name]
    intact = read_order(COMPLETED)
    for name, member in (("state", "state"), ("cart", "cart"), ("customer", "customer"), ("total", "total")):
        if place[0] != member:
            assert getattr(order, name) == getattr(intact, name)
    prefix = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    assert all(path.startswith(f"${prefix}") for path in order.set_aside)


@given(value=JSON_VALUES)
def test_an_order_with_any_members_keeps_its_ids(value: Any) -> None:
    names = [name for name in TREE if name not in ("id", "merchant", "channel")]
    tree = {**TREE, **dict.fromkeys(names, value)}

    order = read_order(json.dumps(tree).encode())

    assert (order.id, order.merchant, order.channel) == (TREE["id"], TREE["merchant"], TREE["channel"])


def test_an_order_with_many_odd_members_has_only_its_ids() -> None:
    order = order_of(merchant="m", channel="1", currency="SEK", payments=[{"id": n} for n in range(100)])

    assert (order.id, order.merchant, order.channel, order.currency) == ("order-1", "m", "1", None)
    assert len(order.set_aside) == MAX_SET_ASIDE + 1


@pytest.mark.parametrize(
    "look",
    [
        lambda order: order,
        lambda order: order.customer,
        lambda order: order.customer.billing,
        lambda order: order.cart.items,
        lambda order: order.payments,
        lambda order: [order.total, order.state],
    ],
    ids=["order", "customer", "billing", "items", "payments", "parts"],
)
def test_a_repr_shows_no_values(look: Callable[[Order], Any]) -> None:
    order = order_of(
        state={"currentStatus": CANARY},
        cart={"items": [{"name": CANARY}]},
        payments=[{"reference": CANARY}],
        customer={"billing": {"email": CANARY, "nationalIdentificationNumber": CANARY}},
        attributes={"note": CANARY},
    )

    assert CANARY not in repr(look(order))
    assert CANARY not in f"{look(order)}"


def test_an_order_is_decoded_at_the_first_look() -> None:
    order = Order(COMPLETED)
    assert set(order.__dict__) == {"raw"}

    assert order.data["id"] == TREE["id"]
    assert set(order.__dict__) == {"raw", "data"}

    assert order.id == TREE["id"]
    assert set(order.__dict__) == set(Order.__annotations__)


@pytest.mark.parametrize("look", [lambda order: order.data, lambda order: order.id], ids=["data", "a member"])
def test_looking_at_something_else_than_an_order_raises(look: Callable[[Order], Any]) -> None:
    with pytest.raises(NotAnOrder):
        look(Order(b"{"))


@pytest.mark.parametrize("encode", [json.dumps, msgspec.json.encode, msgspec.to_builtins])
@pytest.mark.parametrize("order", [Order(COMPLETED), read_order(COMPLETED)], ids=["undecoded", "decoded"])
def test_an_order_cannot_be_encoded(encode: Callable[[Order], Any], order: Order) -> None:
    """An author who tries gets an error, and never sends an empty order."""
    with pytest.raises(TypeError, match="Order"):
        encode(order)


def test_an_order_is_read_only() -> None:
    order = order_of(currency="SEK")

    with pytest.raises(AttributeError):
        order.currency = "NOK"
    with pytest.raises(AttributeError):
        order.state.current_status = "completed"  # type: ignore[misc]
    assert order.currency == "SEK"


def test_an_order_can_be_copied() -> None:
    assert copy.deepcopy(Order(COMPLETED)).id == copy.copy(read_order(COMPLETED)).id == TREE["id"]


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half"),
        pytest.param(b"{} {}", id="two"),
        pytest.param(b'{"a": NaN}', id="NaN"),
        pytest.param(b'{"a": Infinity}', id="Infinity"),
        pytest.param(b'{"a": 01}', id="a leading zero"),
        pytest.param(b'{"a": "\xff"}', id="no UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b"{'a': 1}", id="single quotes"),
        pytest.param(b'{"a": 1,}', id="a trailing comma"),
        pytest.param(b'{"a": 1} // note', id="a comment"),
        pytest.param(b"[" * 100_000, id="a hundred thousand brackets"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="a hundred thousand objects"),
    ],
)
def test_only_strict_json_is_an_order(raw: bytes) -> None:
    with pytest.raises(NotAnOrder):
        decode(raw)
    with pytest.raises(NotAnOrder):
        read_order(raw)


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"order"', b"7", b"true"], ids=bytes.decode)
def test_only_an_object_is_an_order(raw: bytes) -> None:
    with pytest.raises(NotAnOrder):
        read_order(raw)


def test_the_last_of_equal_keys_wins() -> None:
    order = read_order(b'{"id": "first", "id": "last", "currency": "NOK", "currency": "SEK"}')

    assert (order.id, order.currency) == ("last", "SEK")
    assert order.data == {"id": "last", "currency": "SEK"}


def nested(depth: int) -> bytes:
    return b'{"id": "order-1", "a": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}"


@pytest.mark.parametrize("depth", [MAX_DEPTH, 1100, 5000, 50_000])
def test_an_order_nested_too_deeply_is_no_order(depth: int) -> None:
    with pytest.raises(NotAnOrder):
        read_order(nested(depth))


def test_the_deepest_order_is_read() -> None:
    assert read_order(nested(MAX_DEPTH - 1)).id == "order-1"


def test_brackets_in_texts_are_no_depth() -> None:
    assert decode(b'["' + b"[" * 300 + b'\\"' + b"{" * 300 + b'"]') == ["[" * 300 + '"' + "{" * 300]


LARGEST = sys.float_info.max


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb'["\ud83d"]', ["\ufffd"]),
        (rb'["\ude00"]', ["\ufffd"]),
        (rb'["\ud83d\ude00"]', ["\U0001f600"]),
        (rb'["\ud83d\ud83d\ude00"]', ["\ufffd\U0001f600"]),
        (rb'["\ude00\ud83d"]', ["\ufffd\ufffd"]),
        (rb'["\\ud83d", "\ud83d"]', ["\\ud83d", "\ufffd"]),
        (rb'["\\\ud83dx"]', ["\\\ufffdx"]),
        (rb'{"\uD83D": 1}', {"\ufffd": 1}),
        (b"\xef\xbb\xbf[1]", [1]),
        (b'\xef\xbb\xbf["\\ud83d"]', ["\ufffd"]),
        (b"[1e400, -1e400, 1E+999]", [LARGEST, -LARGEST, LARGEST]),
        (b"[1e-400, 0.1e309]", [0.0, 1e308]),
        (b'["1e400", 1e400]', ["1e400", LARGEST]),
        (b'["\\"1e400", 1e400]', ['"1e400', LARGEST]),
        (b"[%s]" % (b"9" * 400), [10**400 - 1]),
        (b"[%s, 1e400]" % (b"9" * 400), [10**400 - 1, LARGEST]),
        (b"[-%s]" % (b"9" * 5000), [-LARGEST]),
        (b"[%s, -%s]" % (b"1" * 4300, b"1" * 4300), [int("1" * 4300), -LARGEST]),
        (b'["%s", %s]' % (b"9" * 5000, b"9" * 5000), ["9" * 5000, LARGEST]),
        (b'["\\"%s", %s.5, 0.%s, %s]' % ((b"9" * 5000,) * 4), ['"' + "9" * 5000, LARGEST, 1.0, LARGEST]),
        (rb'["\\\ud83d", "\\\\ud83d\ude00"]', ["\\\ufffd", "\\\\ud83d\ufffd"]),
    ],
)
def test_grammatical_json_that_others_refuse_is_read(text: bytes, value: Any) -> None:
    assert decode(text) == value
    assert read_order(b'{"id": "x", "a": %s}' % text.removeprefix(b"\xef\xbb\xbf")).id == "x"


@pytest.mark.parametrize(
    "text", [rb'["\ud83"]', rb'["\ud83d]', b"[1e]", b"[01e400]", b"[1e400", b"\xef\xbb", b"NaN1e400"]
)
def test_a_repair_makes_no_json_of_other_texts(text: bytes) -> None:
    with pytest.raises(NotAnOrder):
        decode(text)


@pytest.mark.parametrize(
    "text",
    [
        b'["\\ud83d"' + b",1e400" * 170_000 + b"]",
        b'["' + b'\\"' * 32_000,
        b'["' + b"9" * 5000 + b'\\"' * 32_000,
        b"[" + (b"9" * 4300 + b",") * 240 + b"\\",
        b"\\" * 64_000,
        b"[" + b"-" * 64_000,
        b'["\\ud83d"' + (b"," + b"9" * 4299) * 240 + b"]",
        b"[" + (b"9" * 4299 + b",") * 240,
    ],
    ids=[
        "numbers",
        "no end",
        "no end and digits",
        "many digits",
        "backslashes",
        "signs",
        "half a pair",
        "too few digits",
    ],
)
def test_no_text_takes_long_to_decode(text: bytes) -> None:
    """A string of 64 KiB without an end took 25 s, half a pair beside numbers of 4299 digits 4 s."""
    began = time.process_time()
    with contextlib.suppress(NotAnOrder):
        decode(text)

    assert time.process_time() - began < 2  # tells linear time, 0.01 to 0.2 s, from quadratic


def test_amounts_beyond_a_double_are_read_alike() -> None:
    order = read_order(b'{"id": "x", "total": {"includingVat": 1e400}}')

    assert order.data["total"]["includingVat"] == LARGEST
    assert order.total.including_vat == Decimal(repr(LARGEST))


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_a_repair_changes_nothing_else(value: Any) -> None:
    text = json.dumps({"a": value}).encode()

    assert decode(b"\xef\xbb\xbf" + text) == decode(text)


def test_a_decent_depth_is_read() -> None:
    raw = b'{"id": "order-1", "a": ' + b"[" * 100 + b"]" * 100 + b"}"

    assert read_order(raw).id == "order-1"


@given(st.binary(max_size=40))
def test_any_bytes_are_an_order_or_raise_not_an_order(raw: bytes) -> None:
    try:
        assert isinstance(read_order(raw), Order)
    except NotAnOrder:
        assert True


@pytest.mark.parametrize(
    ("tree", "inner"),
    [
        ({"order": {"id": "a"}, "notification": {}}, {"id": "a"}),
        ({"id": "a"}, {"id": "a"}),
        ({"id": "a", "order": None}, {"id": "a", "order": None}),
        ({"id": "a", "order": "first"}, {"id": "a", "order": "first"}),
    ],
    ids=["envelope", "bare", "null member", "a member of that name"],
)
def test_the_order_is_the_body_or_its_member_order(tree: Any, inner: Any) -> None:
    assert order_in(tree) == inner


# --- canonical bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1.0}', b'{"a": 1}'),
        (b'{"a": 1e2}', b'{"a": 100.00}'),
        (b'{"a": -0.0}', b'{"a": 0}'),
        (b'{"a": 1e20}', b'{"a": 100000000000000000000}'),
        (b'{"a": 9223372036854775808}', b'{"a": 9223372036854775808.0}'),
        (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}'),
        (b'{"a": {"c": [1.0], "b": 2}}', b'{"a": {"b": 2, "c": [1]}}'),
        (b'{"a": "\\u00e5"}', '{"a": "å"}'.encode()),
        (b'{"a": "\\/"}', b'{"a": "/"}'),
        (b'{"a": 1, "a": 2}', b'{"a": 2}'),
    ],
)
def test_equal_values_have_equal_bytes(one: bytes, other: bytes) -> None:
    assert canonical(decode(one)) == canonical(decode(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1}', b'{"a": 1.5}'),
        (b'{"a": 1e20}', b'{"a": 100000000000000000001}'),
        (b'{"a": 1}', b'{"a": "1"}'),
        (b'{"a": 1}', b'{"a": true}'),
        (b'{"a": null}', b"{}"),
        (b"[1, 2]", b"[2, 1]"),
        (b'{"a": ""}', b'{"a": null}'),
    ],
)
def test_different_values_have_different_bytes(one: bytes, other: bytes) -> None:
    assert canonical(decode(one)) != canonical(decode(other))


@given(JSON_VALUES)
def test_canonical_bytes_hold_the_same_value(value: Any) -> None:
    spelled = canonical(value)

    assert json.loads(spelled) == value
    assert canonical(json.loads(spelled)) == spelled


def test_a_value_nested_too_deeply_has_no_canonical_bytes() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]

    with pytest.raises(NotAnOrder):
        canonical(deep)


# --- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-02-03T08:16:35.870Z", datetime(2026, 2, 3, 8, 16, 35, 870_000, UTC)),
        ("2026-02-03T09:16:35.87+01:00", datetime(2026, 2, 3, 8, 16, 35, 870_000, UTC)),
        ("2026-02-03T08:16:35", datetime(2026, 2, 3, 8, 16, 35, tzinfo=UTC)),
        ("2026-02-03", datetime(2026, 2, 3, tzinfo=UTC)),
        ("2026-02-03T08:16:35.8701234Z", datetime(2026, 2, 3, 8, 16, 35, 870_123, UTC)),
        ("yesterday", None),
        ("", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-14:00", None),
        (None, None),
        (1770106595, None),
    ],
)
def test_a_moment_is_aware_utc_or_none(text: Any, moment: datetime | None) -> None:
    assert instant(text) == moment


@given(st.text(max_size=30) | JSON_VALUES)
def test_any_text_is_a_moment_or_none(value: Any) -> None:
    moment = instant(value)

    assert moment is None or moment.tzinfo is UTC


# The files that decode JSON themselves: our own, or that of a handler's destination.
DECODE_THEMSELVES = {
    "orders.py",
    "conditions/schemas.py",
    "config/json_schema.py",
    "norce/api.py",
    "handlers/jetshop/client.py",
    "verdicts/patches.py",
    "ledger/queries.py",
    "ledger/commands.py",
    "ledger/claims.py",
    "cli/service.py",
    "operations/application.py",
    "cli/masks.py",
    "oauth2.py",
    "testing/builders.py",
    "testing/play.py",
}


def test_json_from_elsewhere_is_decoded_in_one_place() -> None:
    adapter = Path(__file__).parents[1] / "adapter"
    found = {
        str(path.relative_to(adapter))
        for path in adapter.rglob("*.py")
        if "sandbox" not in path.parts and re.search(r"json\.(decode|loads?|Decoder)\(", path.read_text("utf-8"))
    }

    assert found == DECODE_THEMSELVES
