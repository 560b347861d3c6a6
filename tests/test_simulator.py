"""`adapter.simulator`: every operation, every error, and the rules of an order. Callbacks have a file of their own."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from simulators import COMPLETED, PRICE, SAMPLE, Shop, shop, validator

from adapter.app import listen, served
from adapter.norce.operations import BY_NAME, CHANNEL, CODES, MERCHANT, OPERATIONS, Operation
from adapter.simulator import Simulator, StoreUnusable, Switches, SwitchInvalid
from adapter.simulator.switches import questions

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
    """An order with one of everything, so that every operation has something to be carried out on."""

    def __init__(self, norce: Shop) -> None:
        self.order_id = norce.create(consents=[{"id": "c1", "text": "Ja", "checked": True}])
        ask = {"order_id": self.order_id}
        payment_id, to = norce.pay(self.order_id), norce.receiver.to("/act", None)
        norce.ask("add_actions", [{"adapterId": "p", "type": "capture", "url": to}], payment_id=payment_id, **ask)
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
            "consent_id": "c1",
            "item_id": order["cart"]["items"][0]["id"],
            "validation_id": order["validations"][0]["id"],
            "hook_id": order["hooks"][0]["id"],
            "notification_id": order["notifications"][0]["id"],
            "payment_id": payment_id,
            "action_id": order["payments"][0]["actions"][0]["id"],
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
    "add_consent": {"text": "Nyhetsbrev", "checked": False, "required": True},
    "patch_consents": [{"id": "c1", "checked": False}],
    "patch_consent": {"checked": False},
    "add_validation": {"adapterId": "a", "url": "http://127.0.0.1:9/v"},
    "put_validation": {"adapterId": "b", "invoke": "http://127.0.0.1:9/v"},
    "add_hook": HOOK,
    "add_notification": NOTIFICATION,
    "add_payment": {"adapterId": "p", "amount": 1.5},
    "put_payment": {"adapterId": "p", "amount": 150, "state": "captured"},
    "add_actions": [{"adapterId": "p", "type": "refund", "url": "http://127.0.0.1:9/act"}],
    "add_transaction": {"event": "capture", "requestJson": '{"a": 1}', "isSuccess": True},
    "add_shipping": {"total": PRICE, "vatRate": 0.25},
    "put_shipping": {"total": PRICE, "vatRate": 0.25, "state": "confirmed", "tmsReference": "t1"},
    "put_configurations": [DOCUMENT, {"$schema": "configuration.json", "id": "admin_meta"}],
    "put_configuration": DOCUMENT,
    "create_from_basket": {"cartReference": 11, "culture": "sv-SE"},
    "patch_item": {"quantity": 3},
    "add_discount": {"code": "VINTER10"},
}
BODIES["put_configurations"][1]["$schema"] = DOCUMENT["$schema"]
EACH = [pytest.param(each, version, id=f"{each.name}-{version}") for each in OPERATIONS for version in each.versions]
EACH_ERROR = [
    pytest.param(each, version, status, id=f"{each.name}-{version}-{status}")
    for each in OPERATIONS
    for version, errors in each.errors.items()
    for status in errors
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
    stage, given = Stage(norce), {}
    if status in (401, 403):
        given = {"headers": {"authorization": "Bearer another"}}
    elif status == 404 and operation.name in ("create_order", "list_orders", "create_from_basket"):
        norce.simulator.throw(channels_unknown=True)
        given = {"headers": {CHANNEL: "2"}}
    elif status == 404:
        stage.path |= {"order_id": "o0", "event_id": "e0", "channel": "0", "merchant": "nobody"}
        given = {"headers": {MERCHANT: "nobody"}} if operation.service == "configuration" else {}
    elif status == 409:
        norce.simulator.throw(cart_reference_unique=True)
        stage.ask(operation, version)
    elif status == 500:
        norce.simulator.throw(server_errors=1)
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
