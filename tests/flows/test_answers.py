"""What Norce is answered, row by row of its documented tables for validations and hooks, over HTTP."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.stage import Service, Stage, order, signed_url

HOOK_REQUEST: dict[str, Any] = json.loads(Path(__file__).with_name("hook-request.json").read_text("utf-8"))
PRICE_LIST = {"op": "add", "path": "/cart/attributes/priceList", "value": "volume"}


def with_quantity(quantity: int, **changed: Any) -> dict[str, Any]:
    first, *others = HOOK_REQUEST["cart"]["items"]
    items = [{**first, "quantity": quantity}, *others]
    return {**HOOK_REQUEST, "cart": {**HOOK_REQUEST["cart"], "items": items}} | changed


@pytest.fixture
def service(stage: Stage) -> Service:
    stage.config["callbacks"] |= {
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart"},
        "customer-changed": {"kind": "hook", "watch": "/customer"},
    }
    rules: dict[str, Any] = {"handler": "rules", "no_answer": "reject"}
    stage.config["routes"] |= {
        "kronor": {**rules, "callback": "order-rules", "settings": {"rules": [
            {"scope": "/currency", "schema": {"const": "SEK"}, "code": "not-sek", "message": "Kronor only."},
            {"scope": "/country", "schema": {"const": "SE"}, "code": "not-sweden", "message": "Sweden only."}]}},
        "ten-of-a-kind": {**rules, "callback": "cart-changed", "settings": {"rules": [
            {"scope": "/cart/items", "schema": {"items": {"properties": {"quantity": {"maximum": 10}}}},
             "code": "too-many", "message": {"default": "At most ten.", "sv": "Högst tio."}}]}},
        "many-pay-less": {"callback": "cart-changed", "handler": "patch", "no_answer": "approve", "settings": {
            "changes": [{"scope": "/cart/items", "schema": {"contains": {"properties": {"quantity": {"minimum": 5}}}},
                         "path": "/cart/attributes/priceList", "value": "volume"}]}},
    }  # fmt: skip
    return stage.start()


def hook(stage: Stage, service: Service, body: dict[str, Any], callback: str = "cart-changed") -> httpx.Response:
    return stage.http.post(signed_url(service.address, callback, body), json=body)


def told(answer: httpx.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json() if answer.content else None


# --- validations (section 6) ------------------------------------------------------------------------------------------


def test_a_validation_passes_with_200_and_nothing(stage: Stage, service: Service) -> None:
    assert told(stage.validate(service, order("passes"))) == (200, None)


def test_a_validation_fails_with_every_reason_in_their_order_however_often_it_is_asked(
    stage: Stage, service: Service
) -> None:
    fails = order("fails", currency="EUR", country="FI")

    answers = [told(stage.validate(service, fails)) for _ in range(3)]

    assert answers == [
        (400, [
            {"adapterId": "jetshop_adapter", "code": "not-sek", "message": "Kronor only."},
            {"adapterId": "jetshop_adapter", "code": "not-sweden", "message": "Sweden only."},
        ])
    ] * 3  # fmt: skip
    assert stage.deliveries() == []


def test_a_validation_of_an_order_that_norce_does_not_know_is_404(stage: Stage, service: Service) -> None:
    answer = stage.http.post(signed_url(service.address, "order-rules", order("unknown")))

    assert (answer.status_code, answer.json()["code"]) == (404, "order-not-found")


def test_a_validation_is_asked_by_get_as_well_and_its_body_is_not_looked_at(stage: Stage, service: Service) -> None:
    body = order("passes")
    stage.norce.orders["passes"] = body
    url = signed_url(service.address, "order-rules", body)

    assert told(stage.http.get(url)) == told(stage.http.post(url, content=b"{")) == (200, None)


# --- hooks (section 7) ------------------------------------------------------------------------------------------------


def test_a_change_is_accepted_with_an_empty_array(stage: Stage, service: Service) -> None:
    assert told(hook(stage, service, HOOK_REQUEST)) == (200, [])


def test_a_change_is_answered_with_further_changes_until_they_are_there(stage: Stage, service: Service) -> None:
    body = with_quantity(6)

    assert told(hook(stage, service, body)) == (200, [PRICE_LIST])
    body["cart"]["attributes"] = {"priceList": "volume"}
    assert told(hook(stage, service, body)) == (200, [])


def test_a_change_is_refused_with_one_reason_in_the_words_of_the_order(stage: Stage, service: Service) -> None:
    refused = {"code": "too-many", "message": "Högst tio.", "innerErrorCode": None}

    assert told(hook(stage, service, with_quantity(12))) == (400, refused)
    assert told(hook(stage, service, with_quantity(12, culture="en-GB")))[1]["message"] == "At most ten."


def test_a_hook_that_nobody_answers_is_accepted(stage: Stage, service: Service) -> None:
    assert told(hook(stage, service, HOOK_REQUEST, "customer-changed")) == (200, [])


def test_members_that_only_one_version_has_stop_no_hook(stage: Stage, service: Service) -> None:
    leaner = {name: HOOK_REQUEST[name] for name in ("id", "merchant", "channel", "cart")}

    assert told(hook(stage, service, leaner)) == (200, [])
    assert told(hook(stage, service, {**HOOK_REQUEST, "version": "v1", "shippings": None})) == (200, [])


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], int, str]] = {
    "another order": (lambda _: {"content": json.dumps(order("another"))}, 400, "order-bad-request"),
    "no json": (lambda _: {"content": "{"}, 400, "order-bad-request"),
    "no media type": (lambda body: {"content": json.dumps(body), "headers": {}}, 415, "unsupported-media-type"),
}


@pytest.mark.parametrize(("spoil", "status", "code"), SPOILED.values(), ids=SPOILED.keys())
def test_what_is_no_hook_is_answered_with_a_code(
    stage: Stage, service: Service, spoil: Callable[[dict[str, Any]], dict[str, Any]], status: int, code: str
) -> None:
    sent = {"headers": {"content-type": "application/json"}} | spoil(HOOK_REQUEST)

    answer = stage.http.post(signed_url(service.address, "cart-changed", HOOK_REQUEST), **sent)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_hook_that_is_signed_for_another_order_is_not_answered(stage: Stage, service: Service) -> None:
    url = signed_url(service.address, "cart-changed", order("another"))

    answer = stage.http.post(url.replace("/another/", f"/{HOOK_REQUEST['id']}/"), json=HOOK_REQUEST)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
