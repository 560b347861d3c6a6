"""The endpoints of the simulator: every operation, every error, and the rules of an order."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapter.callbacks.server import http_server, listen
from adapter.norce.api import BY_NAME, CHANNEL, CODES, MERCHANT, OPERATIONS, Operation
from adapter.sandbox.norce import Simulator, Switches, SwitchInvalid
from adapter.sandbox.norce.switches import questions
from tests.simulators import COMPLETED, PRICE, SAMPLE, Shop, shop, validator

HOOK = {"adapterId": "jetshop_adapter", "scope": "/cart", "target": "/cart", "invoke": "http://127.0.0.1:9/hook"}
NOTIFICATION = {"adapterId": "jetshop_adapter", "scope": "/cart", "invoke": "http://127.0.0.1:9/n/{order.id}"}
ADDRESS = {"type": "person", "givenName": "Tove", "familyName": "Testsson", "city": "Göteborg", "country": "SE"}
DOCUMENT = {
    "$schema": "https://norce.api-se.playground.norce.tech/checkout/configuration/openapi/v1/schemas/configuration.json",
    "id": "static_notifications",
    "active": True,
    "order": {"notifications": [NOTIFICATION | {"scope": "/state/currentStatus", "schema": {"const": "completed"}}]},
}


@pytest.fixture
def norce() -> Iterator[Shop]:
    with shop() as made:
        yield made


class Stage:
    """An order with one part of every kind, so that every operation has something to work on."""

    def __init__(self, norce: Shop) -> None:
        self.order_id = norce.create(consents=[{"id": "c1", "text": "Ja", "checked": True}])
        ask = {"order_id": self.order_id}
        payment_id = norce.pay(self.order_id)
        shipping_id = norce.ask("add_shipping", {"total": PRICE, "vatRate": 0.25}, **ask).json()["id"]
        norce.ask("add_validation", {"url": norce.receiver.to("/v", None)}, **ask)
        norce.ask("add_hook", {"subscribeTo": "/consents", "invoke": norce.receiver.to("/h", [])}, **ask)
        norce.ask("add_notification", {"scope": "/attributes", "invoke": norce.receiver.to("/n", None)}, **ask)
        norce.ask("patch_attributes", {"a": 1}, **ask)
        path = {"merchant": "norce", "channel": "1", "name": "static_notifications"}
        norce.ask("put_configuration", DOCUMENT, **path)
        order = norce.read(self.order_id)
        self.path = path | {
            "order_id": self.order_id,
            "item_id": order["cart"]["items"][0]["id"],
            "validation_id": order["validations"][0]["id"],
            "hook_id": order["hooks"][0]["id"],
            "notification_id": order["notifications"][0]["id"],
            "payment_id": payment_id,
            "shipping_id": shipping_id,
            "event_id": next(iter(norce.simulator.records.events)),
        }
        self.norce = norce

    def ask(self, operation: Operation, version: str, **given: Any) -> httpx.Response:
        template = operation.template(version)
        path = {name: value for name, value in self.path.items() if f"{{{name}}}" in template}
        return self.norce.ask(operation.name, BODIES.get(operation.name), version=version, **(path | given))


BODIES: dict[str, Any] = {
    "create_order": SAMPLE,
    "put_cart": {"items": []},
    "put_billing": ADDRESS,
    "put_shipping_address": ADDRESS,
    "patch_attributes": {"b": None},
    "put_reference": "100245",
    "put_state": {"currentStatus": "processing"},
    "patch_consents": [{"id": "c1", "checked": False}],
    "add_validation": {"adapterId": "a", "url": "http://127.0.0.1:9/v"},
    "put_validation": {"adapterId": "b", "invoke": "http://127.0.0.1:9/v"},
    "add_hook": HOOK,
    "add_notification": NOTIFICATION,
    "add_payment": {"adapterId": "p", "amount": 1.5},
    "put_payment": {"adapterId": "p", "amount": 150, "state": "captured"},
    "add_transaction": {"event": "capture", "requestJson": '{"a": 1}', "isSuccess": True},
    "add_shipping": {"total": PRICE, "vatRate": 0.25},
    "put_shipping": {"total": PRICE, "vatRate": 0.25, "state": "confirmed", "tmsReference": "t1"},
    "put_configurations": [DOCUMENT, {"$schema": "configuration.json", "id": "admin_meta"}],
    "put_configuration": DOCUMENT,
    "create_from_basket": {"cartReference": 11, "culture": "sv-SE"},
    "patch_item": {"quantity": 3},
}
BODIES["put_configurations"][1]["$schema"] = DOCUMENT["$schema"]
EACH = [pytest.param(each, version, id=f"{each.name}-{version}") for each in OPERATIONS for version in each.versions]
NEVER = {  # the simulator knows every channel, and lets several orders have one cart
    *((name, 404) for name in ("create_order", "list_orders", "create_from_basket")),
    ("create_order", 409),
}
EACH_ERROR = [
    pytest.param(each, version, status, id=f"{each.name}-{version}-{status}")
    for each in OPERATIONS
    for version, errors in each.errors.items()
    for status in errors
    if (each.name, status) not in NEVER
]


@pytest.mark.parametrize(("operation", "version"), EACH)
def test_every_operation_is_carried_out(norce: Shop, operation: Operation, version: str) -> None:
    stage = Stage(norce)
    if operation.name in ("validate", "complete_payment"):
        norce.pay(stage.order_id, 100)  # the shipping
    if operation.name == "refresh_from_basket":
        stage.path["order_id"] = norce.ask("create_from_basket", {"cartReference": 3, "culture": "sv-SE"}).json()["id"]

    answer = stage.ask(operation, version)

    assert answer.is_success, answer.text


@pytest.mark.parametrize(("operation", "version", "status"), EACH_ERROR)
def test_every_declared_error_is_answered(norce: Shop, operation: Operation, version: str, status: int) -> None:
    stage = Stage(norce)
    given: dict[str, Any] = {}
    if status in (401, 403):
        given = {"headers": {"authorization": "Bearer another"}}
    elif status == 404:
        stage.path |= {"order_id": "o0", "event_id": "e0", "channel": "0", "merchant": "nobody"}
        given = {"headers": {MERCHANT: "nobody"}} if operation.service == "configuration" else {}
    elif status == 409:
        stage.ask(operation, version)
    elif status == 500:
        norce.simulator.set_switches(server_errors=1)
    elif operation.body is not None:
        given = {"raw": b"{"}
    elif operation.service == "configuration":
        given = {"headers": {MERCHANT: "another"}}
    elif operation.name == "list_events":
        given = {"query": {"limit": "many"}}
    elif operation.name == "validate":
        given = {"headers": {CHANNEL: ""}}
    else:
        given = {"headers": {MERCHANT: ""}}

    answer = stage.ask(operation, version, **given)

    assert answer.status_code == status, answer.text


def test_every_code_of_norce_is_answered_with_its_status(norce: Shop) -> None:
    order_id = norce.create(consents=[{"id": "c1", "required": True}])
    path = {"merchant": "norce", "channel": "1"}
    bought = {"order_id": norce.ask("create_from_basket", {"cartReference": 5, "culture": "sv-SE"}).json()["id"]}
    bought["payment_id"] = norce.ask("start_payment", **bought).json()["paymentId"]
    norce.ask("complete_payment", **bought, status=200)
    answers = [
        norce.ask("put_cart", {"items": 1}, order_id=order_id),
        norce.ask("put_state", {"currentStatus": "processing"}, order_id=order_id),
        norce.ask("put_state", {"currentStatus": "completed"}, order_id=order_id),
        norce.ask("complete_payment", **bought),
        norce.ask("put_configuration", DOCUMENT, **path, name="another"),
        norce.ask("read_order", order_id=order_id, headers={"authorization": ""}),
        norce.ask("add_hook", HOOK, version="v1", order_id=order_id, headers={"authorization": ""}),
        norce.ask("read_order", order_id="o0"),
        norce.ask("read_payment", order_id=order_id, payment_id="p0"),
        norce.ask("read_shipping", order_id=order_id, shipping_id="s0"),
        norce.ask("read_configuration", **path, name="none"),
        norce.ask("create_from_basket", {"cartReference": 5, "culture": "sv-SE"}),
    ]
    norce.simulator.set_switches(server_errors=1)
    answers.append(norce.ask("list_orders"))

    assert {(each.json()["code"], each.status_code) for each in answers} == {
        (code, status) for code, statuses in CODES.items() for status in statuses if code != "application-not-found"
    }


# --- requests of Norce's public collections ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "body", "status"),
    [
        ("create_order", "v0", SAMPLE, 201),
        ("create_order", "v1", SAMPLE, 201),
        ("create_order", "v1", SAMPLE | {"merchant": "another", "channel": "another"}, 201),
        ("create_order", "v0", {"culture": "sv-SE", "currency": "SEK", "country": "se"}, 201),
        ("add_hook", "v1", {"version": "v0", "scope": "/state", "invoke": "https://a.example/{order.id}",
                            "adapterId": "external_reserve"}, 200),
        ("add_hook", "v1", {"version": "v0", "scope": "/reference", "invoke": "https://a.example"}, 200),
        ("add_validation", "v1", {"invoke": "https://a.example/{order.id}", "adapterId": "a"}, 200),
        ("add_notification", "v1", {"adapterId": "a", "scope": "/cart", "invoke": "https://a.example/{order_id}",
                                    "version": "v0"}, 200),
        ("add_notification", "v0", SAMPLE["notifications"][0], 200),
        ("add_payment", "v0", {"type": "default", "amount": 1234, "state": "intent"}, 201),
        ("put_reference", "v0", "100245", 200),
        ("put_state", "v0", {"currentStatus": "processing"}, 200),
        ("put_state", "v1", {"currentStatus": "Processing"}, 200),
        ("put_configuration", "v1", DOCUMENT, 200),
        ("put_configurations", "v1", [DOCUMENT], 200),
        ("list_events", "v1", None, 200),
    ],
)  # fmt: skip
def test_requests_of_norces_collections_are_accepted(
    norce: Shop, name: str, version: str, body: Any, status: int
) -> None:
    stage = Stage(norce)

    answer = stage.ask(BY_NAME[name], version, raw=b"" if body is None else json.dumps(body).encode())

    assert answer.status_code == status, answer.text


def test_the_sample_of_the_api_reference_becomes_an_order(norce: Shop) -> None:
    order = norce.read(norce.create(SAMPLE))

    for part in ("cart", "customer", "consents", "total", "attributes", "reference"):
        assert without_ids(order[part]) == without_ids(SAMPLE[part])
    assert (order["merchant"], order["channel"], order["shippings"], order["payments"]) == ("norce", "1", [], [])
    assert order["created"] == order["lastModified"] == order["state"]["transitions"][0]["timeStamp"]
    assert order["hooks"][0]["subscribeTo"] == "string"
    assert all(each["id"] for each in order["hooks"] + order["validations"] + order["notifications"])


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(each) for each in value]
    if isinstance(value, dict):
        return {name: without_ids(each) for name, each in value.items() if name != "id"}
    return value


def test_the_headers_name_the_channel_and_other_channels_do_not_find_the_order(norce: Shop) -> None:
    order_id = norce.create(SAMPLE, merchant="another", channel="another", id="mine", created="2001-01-01T00:00:00Z")

    assert (norce.read(order_id)["merchant"], norce.read(order_id)["channel"]) == ("norce", "1")
    assert norce.read(order_id)["id"] == order_id != "mine"
    assert norce.ask("read_order", order_id=order_id, headers={CHANNEL: "2"}).status_code == 404
    assert norce.ask("list_orders", headers={MERCHANT: "another"}).json()["data"] == []


def test_a_token_is_accepted_with_and_without_its_scheme(norce: Shop) -> None:
    token = norce.headers["authorization"].removeprefix("Bearer ")

    assert norce.ask("list_orders", headers={"authorization": token}).status_code == 200
    assert norce.ask("list_orders", headers={"authorization": f"Basic {token}"}).status_code == 401


def test_repeated_keys_and_a_body_on_get_are_tolerated(norce: Shop) -> None:
    answer = norce.ask("create_order", raw=b'{"reference": "1", "reference": "2"}', status=201)

    order_id = answer.json()["id"]
    assert norce.ask("read_order", raw=b"{", order_id=order_id, status=200).json()["reference"] == "2"
    assert answer.headers["location"].endswith(f"/api/v0/checkout/orders/{order_id}")


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b'"\\ud800"', b"[" * 100_000, b'{"cart": []}', b"\xff"])
def test_a_body_that_is_no_order_is_a_bad_request(norce: Shop, raw: bytes) -> None:
    assert norce.ask("create_order", raw=raw, status=400).json()["code"] == "order-bad-request"


# --- an order and its rules -------------------------------------------------------------------------------------------


def test_v1_shows_the_same_order_with_its_own_names(norce: Shop) -> None:
    order_id = norce.create(SAMPLE)
    norce.pay(order_id, upsell={"eligible": True})
    norce.ask("add_hook", HOOK | {"reference": "r"}, version="v1", order_id=order_id)
    v0, v1 = norce.read(order_id), norce.read(order_id, "v1")

    assert [set(each) for each in (v0["validations"][0], v1["validations"][0])] == [
        {"id", "adapterId", "url"},
        {"id", "adapterId", "invoke"},
    ]
    assert (v0["hooks"][1]["subscribeTo"], v1["hooks"][1]["scope"]) == ("/cart", "/cart")
    assert ("reference" in v0["hooks"][1], "reference" in v1["hooks"][1]) == (False, True)
    assert ("delay" in v0["notifications"][0], "delay" in v1["notifications"][0]) == (True, False)
    assert ("merchant" in v0["payments"][0], "merchant" in v1["payments"][0]) == (True, False)
    assert ("upsell" in v0["payments"][0], "upsell" in v1["payments"][0]) == (True, False)
    assert ("logistics" in v0["cart"]["items"][0], "logistics" in v1["cart"]["items"][0]) == (True, False)
    assert v0["cart"]["total"] == v1["cart"]["total"]


def test_the_state_moves_as_documented_and_keeps_its_history(norce: Shop) -> None:
    order_id = norce.create()

    norce.move(order_id, "processing", "checkout", "checkout", "processing", "accepted", "completed")

    state = norce.read(order_id)["state"]
    assert state["currentStatus"] == "completed"
    assert [each["status"] for each in state["transitions"]] == [
        "checkout", "processing", "checkout", "processing", "accepted", "completed"
    ]  # fmt: skip
    for status in ("checkout", "declined", "removed"):
        norce.ask("put_state", {"currentStatus": status}, order_id=order_id, status=400)
    norce.ask("put_state", {"currentStatus": "sold"}, order_id=order_id, status=400)


def test_required_consents_come_before_processing(norce: Shop) -> None:
    order_id = norce.create(consents=[{"id": "c1", "required": True}])
    norce.ask("put_state", {"currentStatus": "processing"}, order_id=order_id, status=400)
    norce.ask("patch_consents", [{"id": "c1", "checked": True, "required": False}], order_id=order_id, status=200)

    norce.move(order_id, "processing")

    assert norce.read(order_id)["consents"] == [{"id": "c1", "required": True, "checked": True}]
    norce.ask("patch_consents", [{"id": "c1", "checked": False}], order_id=order_id, status=400)


def test_a_part_that_the_state_locks_does_not_change(norce: Shop) -> None:
    order_id = norce.create()
    cart = norce.read(order_id)["cart"]
    upsold = cart | {"items": [*cart["items"], {"name": "Vantar", "upsell": True, "total": PRICE}], "total": None}
    norce.move(order_id, "processing")
    norce.ask("put_cart", upsold, order_id=order_id, status=400)
    norce.ask("put_billing", ADDRESS, order_id=order_id, status=400)
    norce.pay(order_id)
    norce.move(order_id, "accepted")

    norce.ask("put_cart", {"items": []}, order_id=order_id, status=400)
    norce.ask("put_cart", upsold, order_id=order_id, status=200)
    norce.ask("put_billing", ADDRESS, order_id=order_id, status=200)

    order = norce.read(order_id)
    assert order["total"]["includingVat"] == 250
    assert order["customer"] == {"type": "person", "billing": ADDRESS}


def test_the_total_is_that_of_the_cart_and_of_shippings_that_are_not_removed(norce: Shop) -> None:
    order_id = norce.create()
    shipping = {"total": PRICE, "vatRate": 0.25}
    ids = [norce.ask("add_shipping", shipping, order_id=order_id, status=201).json()["id"] for _ in range(2)]
    assert norce.read(order_id)["total"]["includingVat"] == 350

    gone = norce.ask("put_shipping", shipping | {"state": "removed"}, order_id=order_id, shipping_id=ids[0]).json()

    assert (gone["id"], gone["orderId"], gone["state"]) == (ids[0], order_id, "removed")
    assert norce.read(order_id)["total"]["includingVat"] == 250


def test_attributes_are_merged_and_everything_else_is_replaced(norce: Shop) -> None:
    order_id = norce.create(attributes={"a": 1, "b": {"c": 2}})
    norce.ask("patch_attributes", {"b": None, "d": True}, order_id=order_id, status=200)
    payment_id = norce.pay(order_id, reference="r", attributes={"a": 1})
    norce.ask("put_payment", {"amount": 1, "id": "mine"}, order_id=order_id, payment_id=payment_id, status=200)
    norce.ask("put_reference", {"a": "text"}, order_id=order_id, status=400)

    order = norce.read(order_id)

    assert order["attributes"] == {"a": 1, "b": None, "d": True}
    assert (order["payments"][0]["id"], order["payments"][0].get("reference")) == (payment_id, None)


def test_transactions_are_not_part_of_the_order(norce: Shop) -> None:
    order_id = norce.create()
    path = {"order_id": order_id, "payment_id": norce.pay(order_id)}
    norce.ask("add_transaction", {"requestJson": "{"}, **path, status=400)
    added = norce.ask("add_transaction", {"event": "capture", "responseJson": "[]"}, **path, status=200).json()

    assert norce.ask("list_transactions", **path, status=200).json() == [added]
    assert added["created"]
    assert not any("transaction" in name for name in norce.read(order_id))


def test_an_equal_write_changes_nothing(norce: Shop) -> None:
    order_id = norce.create()
    before = norce.read(order_id)
    norce.clock.now = norce.clock.now.replace(hour=9)

    norce.ask("put_cart", before["cart"], order_id=order_id, status=200)

    assert norce.read(order_id) == before
    norce.ask("put_reference", "r", order_id=order_id, status=200)
    assert norce.read(order_id)["lastModified"] == "2026-02-03T09:00:00.000Z"


@pytest.mark.parametrize("scope", ["/payments/0/state", "/cart/items/0", "state", "", "/a//b"])
def test_a_scope_inside_an_array_or_without_a_pointer_is_refused(norce: Shop, scope: str) -> None:
    order_id = norce.create()

    norce.ask("add_hook", HOOK | {"scope": scope}, version="v1", order_id=order_id, status=400)
    norce.ask("add_notification", NOTIFICATION | {"scope": scope}, order_id=order_id, status=400)


def test_a_deleted_order_is_gone(norce: Shop) -> None:
    order_id = norce.create()

    assert norce.ask("delete_order", order_id=order_id, status=204).content == b""
    norce.ask("read_order", order_id=order_id, status=404)


# --- lists ------------------------------------------------------------------------------------------------------------


def test_pages_end_where_the_list_does(norce: Shop) -> None:
    created = [norce.create() for _ in range(12)]

    def pages(version: str) -> list[dict[str, Any]]:
        queries = ({"offset": offset, "limit": 5} for offset in (0, 5, 10, 15))
        return [norce.ask("list_orders", version=version, query=each, status=200).json() for each in queries]

    assert sorted(order["id"] for page in pages("v0") for order in page["data"]) == sorted(created)
    assert [each["pagination"]["size"] for each in pages("v0")] == [12] * 4
    assert [each["pagination"]["size"] for each in pages("v1")] == [5, 5, 2, 0]
    assert {each["pagination"]["totalSize"] for each in pages("v0") + pages("v1")} == {12}
    assert pages("v0")[0]["pagination"]["valueSum"] == 1800
    assert "valueSum" not in pages("v1")[0]["pagination"]


@pytest.mark.parametrize(
    ("version", "query", "found"),
    [
        ("v0", {"reference": "r2"}, ["r2"]),
        ("v0", {"cart_reference": "c1"}, ["r1"]),
        ("v0", {"search": "umeå"}, ["r2"]),
        ("v1", {"status[]": ["processing", "accepted"]}, ["r2"]),
        ("v1", {"status": "checkout"}, ["r1", "r3"]),
        ("v1", {"date_from": "2026-02-03T08:01:00Z", "date_to": "2026-02-03T08:01:30Z"}, ["r2"]),
        ("v1", {"order_by": "created", "order_by_direction": "asc"}, ["r1", "r2", "r3"]),
        ("v1", {"order_by": "created", "order_by_direction": "desc"}, ["r3", "r2", "r1"]),
        ("v0", {}, ["r3", "r2", "r1"]),
    ],
)
def test_orders_are_filtered_and_sorted(norce: Shop, version: str, query: Any, found: list[str]) -> None:
    for number, city in enumerate(("Göteborg", "Umeå", "Boden"), 1):
        order_id = norce.create(
            reference=f"r{number}",
            customer={"type": "person", "billing": ADDRESS | {"city": city}},
            cart={"reference": f"c{number}", "items": []},
        )
        norce.clock.now = norce.clock.now.replace(minute=number)
        if number == 2:
            norce.move(order_id, "processing")

    page = norce.ask("list_orders", version=version, query=query, status=200).json()

    references = [order["reference"] for order in page["data"]]
    assert (references if "order_by" in query or not query else sorted(references)) == found


@pytest.mark.parametrize(
    "query", [{"limit": "x"}, {"offset": -1}, {"date_from": "soon"}, {"order_by": "cartTotal"}, {"countries[]": "SE"}]
)
def test_a_query_that_is_wrong_or_not_simulated_is_a_bad_request(norce: Shop, query: Any) -> None:
    norce.ask("list_orders", query=query, status=400)


# --- other adapters ---------------------------------------------------------------------------------------------------


def test_a_basket_becomes_an_order_and_is_bought(norce: Shop) -> None:
    order_id = norce.ask("create_from_basket", {"cartReference": 7, "culture": "sv-SE"}, status=201).json()["id"]
    path, total = {"order_id": order_id}, norce.read(order_id)["total"]["includingVat"]
    item = norce.read(order_id)["cart"]["items"][0]
    norce.ask("patch_item", {"quantity": item["quantity"] + 1}, item_id=item["id"], **path, status=200)
    assert norce.read(order_id)["total"]["includingVat"] == total + item["price"]["includingVat"]
    assert norce.ask("refresh_from_basket", **path, status=200).json()["total"]["includingVat"] == total
    norce.ask("validate_basket", **path, status=200)
    shipping_id = norce.ask("start_shipping", **path, status=200).json()["shippingId"]
    assert norce.ask("start_shipping", **path).json()["shippingId"] == shipping_id
    norce.pay(order_id, 100, type="voucher")
    payment_id = norce.ask("start_payment", **path, status=200).json()["paymentId"]
    assert norce.ask("start_payment", **path).json()["paymentId"] == payment_id

    norce.ask("complete_payment", payment_id=payment_id, **path, status=200)
    norce.ask("complete_shipping", shipping_id=shipping_id, **path, status=200)
    again = norce.ask("complete_payment", payment_id=payment_id, **path, status=400)
    assert again.json()["code"] == "payment-error"

    order = norce.read(order_id)
    assert order["state"]["currentStatus"] == "completed"
    assert (order["payments"][1]["amount"], order["payments"][1]["state"]) == (total + 59 - 100, "reserved")
    assert order["shippings"][0]["state"] == "confirmed"
    assert order["shippings"][0]["tmsReference"]


def test_an_invalid_order_stays_in_checkout_and_its_payment_can_be_cancelled(norce: Shop) -> None:
    order_id = norce.create(consents=[{"id": "c1", "required": True}])
    payment_id = norce.ask("start_payment", order_id=order_id).json()["paymentId"]
    refused = norce.ask("complete_payment", order_id=order_id, payment_id=payment_id, status=400)
    assert refused.json() == [{"adapterId": "norce_checkout", "code": "consent-required"}]
    norce.ask("patch_consents", [{"id": "c1", "checked": True}], order_id=order_id)
    norce.move(order_id, "processing")

    norce.ask("cancel_payment", order_id=order_id, payment_id=payment_id, status=200)

    assert norce.read(order_id)["state"]["currentStatus"] == "checkout"
    assert norce.read(order_id)["payments"][0]["state"] == "removed"


# --- configuration ----------------------------------------------------------------------------------------------------


def test_documents_belong_to_a_channel(norce: Shop) -> None:
    path = {"merchant": "norce", "channel": "se"}
    other = {"$schema": DOCUMENT["$schema"], "id": "admin_meta"}
    assert norce.ask("put_configurations", [DOCUMENT, other], **path, status=200).json() == [DOCUMENT, other]
    norce.ask("put_configuration", other | {"active": False}, **path, name="admin_meta", status=200)
    assert norce.ask("list_channels", merchant="norce", status=200).json() == ["se"]
    assert norce.ask("list_configurations", **path, status=200).json() == [DOCUMENT, other | {"active": False}]

    norce.ask("remove_configuration", **path, name="admin_meta", status=200)
    assert norce.ask("read_configuration", **path, name=DOCUMENT["id"], status=200).json() == DOCUMENT
    norce.ask("remove_configurations", **path, status=200)

    norce.ask("list_channels", merchant="norce", status=404)


@pytest.mark.parametrize(
    ("answer", "document", "status"),
    [
        ({"type": "object", "properties": {"shop": {"type": "string"}}}, {"shop": "1"}, 200),
        ({"type": "object", "properties": {"shop": {"type": "string"}}}, {"shop": 1}, 400),
        ({"allOf": [{"$ref": "https://norce.example/openapi/v1/schemas/configuration.json"}]}, {"active": True}, 200),
        ({"$ref": "https://norce.example/elsewhere.json"}, {}, 400),
        ({"$ref": "file:///etc/hostname"}, {}, 400),
        ({"$schema": "http://127.0.0.1:9/dialect.json"}, {}, 400),
        ({"type": "nothing"}, {}, 400),
        ([], {}, 400),
        (httpx.Response(404), {}, 400),
        (httpx.Response(200, content=b"<html>"), {}, 400),
    ],
)
def test_a_document_has_to_fit_the_schema_that_its_adapter_publishes(
    norce: Shop, answer: Any, document: dict[str, Any], status: int
) -> None:
    url = norce.receiver.to("/openapi/v1/schemas/own_adapter.json", answer)
    path = {"merchant": "norce", "channel": "1", "name": "own_adapter"}

    norce.ask("put_configuration", {"$schema": url, "id": "own_adapter"} | document, **path, status=status)

    norce.ask("read_configuration", **path, status=200 if status == 200 else 404)
    assert [each.url.path for each in norce.receiver.got] == ["/openapi/v1/schemas/own_adapter.json"]
    assert [each.kind for each in norce.simulator.journal.entries] == ["schema", "request", "request"]


# --- the simulator's own ----------------------------------------------------------------------------------------------


def get(norce: Shop, path: str, **given: Any) -> httpx.Response:
    return norce.loop.run(norce.http.request(given.pop("method", "GET"), f"http://simulator{path}", **given))


def test_the_journal_shows_requests_and_callbacks_without_secrets(norce: Shop) -> None:
    order_id = norce.create()
    norce.receiver.to("/v", None)
    norce.ask("add_validation", {"url": "http://user:hidden@127.0.0.1:9/v?sig=hidden"}, order_id=order_id)
    norce.ask("validate", order_id=order_id, status=400)

    rows = norce.simulator.journal.read(order_id=order_id)

    assert [(each.kind, each.method, each.status, each.note) for each in rows] == [
        ("request", "POST", 201, ""),
        ("request", "POST", 200, ""),
        ("validation", "POST", 200, ""),
        ("request", "POST", 400, "payment-missing"),
    ]
    assert rows[2].url == "http://127.0.0.1:9/v"
    assert norce.simulator.journal.read(limit=1) == [rows[3]]
    assert norce.simulator.journal.read(kind="validation") == [rows[2]]


def test_switches_are_read_and_set_over_http(norce: Shop) -> None:
    given = {"notification_body": "envelope", "hook_seconds": 0.5}
    answer = get(norce, "/simulator/switches", method="PUT", json=given)

    assert (answer.status_code, answer.json()["hook_seconds"]) == (200, 0.5)
    assert norce.simulator.switches == Switches(**given)
    assert get(norce, "/simulator/switches").json() == answer.json()
    wrong: list[Any] = [{"no_such": 1}, {"notification_body": "letter"}, {"hook_seconds": "soon"}, []]
    for body in wrong:
        assert get(norce, "/simulator/switches", method="PUT", json=body).status_code == 400
    assert norce.simulator.switches.hook_seconds == 0.5


@pytest.mark.parametrize("name", questions())
def test_every_switch_can_be_set_from_text_and_has_a_question(name: str) -> None:
    question, default = questions()[name]
    text = str(default).lower() if isinstance(default, bool) else str(default)

    assert Switches().with_values({name: text}) == Switches()
    assert "?" in question


def test_an_unknown_switch_is_named() -> None:
    with pytest.raises(SwitchInvalid, match="there is no switch colour"):
        Switches().with_values({"colour": "red"})


# --- faults -----------------------------------------------------------------------------------------------------------


def test_an_answer_may_be_slow_or_an_error(norce: Shop) -> None:
    norce.simulator.set_switches(answer_seconds=7)
    norce.ask("list_orders", status=200)
    assert norce.clock.slept == [7]

    norce.simulator.set_switches(server_errors=1)

    norce.ask("create_order", {}, status=500)
    assert norce.simulator.orders() == []


def test_transitions_need_not_be_enforced(norce: Shop) -> None:
    order_id = norce.create()
    norce.simulator.set_switches(transitions_enforced=False)

    norce.move(order_id, "completed")

    assert [each["status"] for each in norce.read(order_id)["state"]["transitions"]] == ["checkout", "completed"]


def test_norces_clock_may_be_ahead(norce: Shop) -> None:
    norce.simulator.set_switches(clock_skew_seconds=600)

    assert norce.read(norce.create())["created"] == "2026-02-03T08:10:00.000Z"


@pytest.mark.parametrize(("switch", "created"), [("answers_lost", 1), ("connections_broken", 0)])
def test_a_broken_connection_does_not_show_if_the_request_was_carried_out(switch: str, created: int) -> None:
    async def broken() -> int:
        async with Simulator(token="t") as simulator, httpx.AsyncClient(trust_env=False) as http:
            simulator.set_switches(**{switch: 1})
            listening = listen("127.0.0.1", 0)
            async with http_server(simulator.app, listening):
                url = BY_NAME["create_order"].url("http://{}:{}/checkout".format(*listening.getsockname()), "v0")
                with pytest.raises(httpx.RemoteProtocolError):
                    await http.post(url, json={}, headers={"authorization": "t", MERCHANT: "m", CHANNEL: "c"})
            return len(simulator.orders())

    assert asyncio.run(broken()) == created


def test_the_completed_sample_order_fits_the_schema() -> None:
    assert validator("order").is_valid(COMPLETED)
