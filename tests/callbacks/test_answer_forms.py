"""The form of what Norce is answered, by the documented examples; and what is answered though a handler is broken."""

import copy
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import jsonpath
import pytest
from sqlalchemy import func, select

import tests
from adapter.handlers.patch import PatchHandler
from adapter.handlers.rules import Rules
from adapter.ledger.schema import metadata
from adapter.ledger.store import open_for_reading
from adapter.plugin import Context, HookHandler, Order, Patch, Problem, Refuse, Settings, ValidationHandler
from tests import ORDERS
from tests.callbacks.test_endpoints import BY_HEADER, MIB, ROOT, Answer, Listening, Point, is_a_refusal

PLACED = json.loads((ORDERS / "order-checkout.json").read_text("utf-8"))
CHANGED = json.loads((tests.ROOT / "tests/flows/hook-request.json").read_text("utf-8"))
ORDER_ID = PLACED["id"]
CONFIG = """\
adapter: {id: jetshop_adapter, public_url: "http://127.0.0.1:1"}
server: {host: 127.0.0.1, port: 0}
operations: {port: 0, socket: null}
store: {url: "@STORE@"}
norce: {base_url: "@NORCE@", timeout: 2s}
merchants:
  fjallboden: {tokens: ["${env:TOKEN}"], channels: {se-b2c: {}}}
  norce: {tokens: ["${env:TOKEN}"], channels: {"1": {}}}
senders:
  header_secrets: [{header: Authorization, values: ["${env:FIRST}"]}]
callbacks:
  order-rules: {kind: validation}
  order-open: {kind: validation}
  order-shut: {kind: validation}
  cart-changed: {kind: hook, watch: /cart, target: /cart}
  cart-changed-v1: {kind: hook, watch: /cart, target: /cart, version: v1}
  cart-refused: {kind: hook, watch: /cart, target: /cart}
  cart-open: {kind: hook, watch: /cart}
  cart-shut: {kind: hook, watch: /cart}
routes:
  stock:
    callback: order-rules
    handler: rules
    no_answer: approve
    settings:
      rules:
        - scope: /cart/items
          schema: {not: {contains: {properties: {sku: {const: SOCK-3P}, quantity: {minimum: 2}}}}}
          code: item-out-of-stock
          message: {default: "SOCK-3P: 1 in stock, 2 asked for.", sv: "SOCK-3P: 1 st i lager, 2 st begärda."}
  broken-open: {callback: order-open, handler: broken, no_answer: approve}
  broken-shut: {callback: order-shut, handler: broken, no_answer: reject}
  ten-of-a-kind:
    callback: cart-changed
    handler: rules
    no_answer: reject
    settings: &limits
      rules:
        - scope: /cart/items
          schema: {items: {properties: {quantity: {maximum: 10}}}}
          code: too-many-of-a-kind
          message: {default: "At most ten of a kind, please.", sv: "Högst tio av samma sort, tack."}
  members:
    callback: cart-changed
    handler: patch
    no_answer: approve
    settings: &members
      changes:
        - {scope: /customer/loyalty/id, path: /cart/attributes/priceList, value: medlem}
        - scope: /cart/items
          schema: {prefixItems: [true, true, {properties: {sku: {const: BOOK-77}}}], minItems: 3}
          op: replace
          path: /cart/items/2/attributes
          value: {giftWrap: true}
  ten-of-a-kind-v1: {callback: cart-changed-v1, handler: rules, no_answer: reject, settings: *limits}
  members-v1: {callback: cart-changed-v1, handler: patch, no_answer: approve, settings: *members}
  credit: {callback: cart-refused, handler: credit, no_answer: approve}
  broken-hook-open: {callback: cart-open, handler: broken, no_answer: approve}
  broken-hook-shut: {callback: cart-shut, handler: broken, no_answer: reject}
"""


class Credit(HookHandler[Settings]):
    """Refuses, as the system behind it does."""

    async def change(self, _order: Order, _context: Context[Settings]) -> list[Patch]:
        raise Refuse("credit-too-low", "This is more than the account allows.", inner="ERP_4711")


class Broken(ValidationHandler[Settings], HookHandler[Settings]):
    """Has a bug."""

    async def validate(self, _order: Order, _context: Context[Settings]) -> list[Problem]:
        raise KeyError("a bug")

    async def change(self, _order: Order, _context: Context[Settings]) -> list[Patch]:
        raise KeyError("a bug")


POINTS = [Point("rules", Rules), Point("patch", PatchHandler), Point("credit", Credit), Point("broken", Broken)]
WHOSE = dict(BY_HEADER) | {"x-merchant": "fjallboden", "x-channel": "se-b2c"}


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    service = Listening(tmp_path_factory.mktemp("answers"), CONFIG, points=POINTS)
    yield service
    service.close()


def ask(listening: Listening, callback: str, order: Any = None, **given_: Any) -> httpx.Response:
    """Call a hook as Norce does, with the whole order."""
    if order is not None:
        given_["json"] = order
    order_id = given_.pop("order_id", ORDER_ID)
    return listening.post(f"{ROOT}/{quote(order_id)}/{callback}", **{"headers": WHOSE} | given_)


def with_quantity(order: dict[str, Any], sku: str, quantity: int) -> dict[str, Any]:
    """The order with so many of one article."""
    order = copy.deepcopy(order)
    (item,) = (each for each in order["cart"]["items"] if each["sku"] == sku)
    item["quantity"] = quantity
    return order


def in_v1(order: dict[str, Any]) -> dict[str, Any]:
    """Return the order as v1 has it: without the members that only v0 declares."""
    order = copy.deepcopy(order)
    for item in order["cart"]["items"]:
        del item["logistics"], item["upsell"]
    for discount in [*order["cart"]["discounts"], *(each for i in order["cart"]["items"] for each in i["discounts"])]:
        del discount["reference"], discount["description"]
    return order


def rows(listening: Listening) -> dict[str, int]:
    """Count the rows of the ledger by table, without those that the service writes on its own and later."""
    with open_for_reading(listening.config.store.url).connect() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
            if table.name not in ("watermarks", "verdicts")
        }


# --- a validation -----------------------------------------------------------------------------------------------------


def test_a_rejected_purchase_is_400_with_an_array_as_documented(listening: Listening) -> None:
    listening.norce.put(PLACED)

    answer = ask(listening, "order-rules")

    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json() == [
        {
            "adapterId": "jetshop_adapter",
            "code": "item-out-of-stock",
            "message": "SOCK-3P: 1 st i lager, 2 st begärda.",
        }
    ]


def test_a_validation_whose_handler_fails_gets_its_no_answer_and_never_a_500(listening: Listening) -> None:
    listening.norce.put(PLACED)

    opened, shut = ask(listening, "order-open"), ask(listening, "order-shut")

    assert (opened.status_code, opened.content) == (200, b"")
    assert shut.status_code == 400
    assert [set(problem) for problem in shut.json()] == [{"adapterId", "code", "message"}]
    assert shut.json()[0]["code"] == "not-answered"


# --- a hook -----------------------------------------------------------------------------------------------------------

BOTH_VERSIONS = pytest.mark.parametrize(
    ("callback", "order"), [("cart-changed", CHANGED), ("cart-changed-v1", in_v1(CHANGED))], ids=["v0", "v1"]
)


@BOTH_VERSIONS
def test_patches_of_a_hook_are_200_with_a_json_patch_as_documented(
    listening: Listening, callback: str, order: dict[str, Any]
) -> None:
    answer = ask(listening, callback, order)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == [
        {"op": "add", "path": "/cart/attributes/priceList", "value": "medlem"},
        {"op": "replace", "path": "/cart/items/2/attributes", "value": {"giftWrap": True}},
    ]


@BOTH_VERSIONS
def test_a_hook_called_for_its_own_patch_is_accepted_with_an_empty_array(
    listening: Listening, callback: str, order: dict[str, Any]
) -> None:
    patched = jsonpath.JSONPatch(ask(listening, callback, order).json()).apply(copy.deepcopy(order))

    answer = ask(listening, callback, patched)

    assert patched != order
    assert (answer.status_code, answer.content) == (200, b"[]")


@BOTH_VERSIONS
def test_a_refused_change_is_400_with_an_object_and_no_patch(
    listening: Listening, callback: str, order: dict[str, Any]
) -> None:
    answer = ask(listening, callback, with_quantity(order, "JKT-1001-L", 11))

    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert answer.json() == {
        "code": "too-many-of-a-kind",
        "message": "Högst tio av samma sort, tack.",
        "innerErrorCode": None,
    }


def test_a_refusal_has_the_code_of_the_system_behind_it(listening: Listening) -> None:
    answer = ask(listening, "cart-refused", CHANGED)

    assert answer.status_code == 400
    assert answer.json() == {
        "code": "credit-too-low",
        "message": "This is more than the account allows.",
        "innerErrorCode": "ERP_4711",
    }


def test_a_hook_whose_handler_fails_gets_its_no_answer_and_never_a_500(listening: Listening) -> None:
    opened, shut = ask(listening, "cart-open", CHANGED), ask(listening, "cart-shut", CHANGED)

    assert (opened.status_code, opened.content) == (200, b"[]")
    assert shut.status_code == 400
    assert set(shut.json()) == {"code", "message", "innerErrorCode"}
    assert shut.json()["code"] == "not-answered"


def test_a_hook_reads_nothing_and_stores_only_its_verdict(listening: Listening) -> None:
    listening.norce.records.orders.clear()
    before = rows(listening)

    answers = [ask(listening, "cart-changed", CHANGED).content for _ in range(3)]

    assert answers[0] == answers[1] == answers[2] != b"[]"
    assert rows(listening) == before


REFUSED = [
    pytest.param({"content": b"{"}, 400, "order-bad-request", "malformed-json", id="malformed JSON"),
    pytest.param({"content": b""}, 400, "order-bad-request", "malformed-json", id="no body"),
    pytest.param({"content": b"[]"}, 400, "order-bad-request", "malformed-json", id="no object"),
    pytest.param({"order_id": "another"}, 400, "order-bad-request", "order-id-differs", id="other id"),
    pytest.param({"order_id": "x" * 65}, 400, "order-bad-request", "order-id", id="order id too long"),
    pytest.param({"headers": WHOSE | {"x-merchant": "norce"}}, 400, "order-bad-request", "merchant-unclear",
                 id="merchant differs"),
    pytest.param({"headers": WHOSE | {"x-channel": "1"}}, 400, "order-bad-request", "channel-unclear",
                 id="channel differs"),
    pytest.param({"headers": WHOSE | {"authorization": "Bearer wrong"}}, 401, "unauthorized", None,
                 id="not authenticated"),
    pytest.param({"order_id": "{order_id}"}, 404, "order-not-found", "unresolved-placeholder", id="literal braces"),
    pytest.param({"callback": "No-Name"}, 404, "callback-not-found", None, id="no name of a callback"),
    pytest.param({"order": CHANGED | {"merchant": "no name"}, "headers": WHOSE | {"x-merchant": "no name"}}, 404,
                 "configuration-not-found", "merchant-or-channel", id="no name of a merchant"),
    pytest.param({"order": CHANGED | {"channel": "no name"}, "headers": WHOSE | {"x-channel": "no name"}}, 404,
                 "configuration-not-found", "merchant-or-channel", id="no name of a channel"),
    pytest.param({"method": "GET"}, 405, "method-not-allowed", None, id="GET"),
    pytest.param({"content": b" " * (MIB + 1)}, 413, "payload-too-large", None, id="a byte too many"),
    pytest.param({"headers": WHOSE | {"content-type": "text/plain"}}, 415, "unsupported-media-type", "content-type",
                 id="not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "status", "code", "inner"), REFUSED)
def test_an_invalid_hook_has_its_status_and_norces_form(
    listening: Listening, given_: dict[str, Any], status: int, code: str, inner: str | None
) -> None:
    body = {} if "content" in given_ else {"order": CHANGED}

    answer = ask(listening, **{"callback": "cart-changed"} | body | given_)

    assert is_a_refusal(Answer(answer.status_code, answer.headers.raw, answer.content), status, code, inner)
