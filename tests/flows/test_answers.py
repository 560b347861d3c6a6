"""Answers to Norce over HTTP, for each row of its documented tables for validations and hooks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.site import ExternalServices, Service, Site, make_order, signed_url

HOOK_REQUEST: dict[str, Any] = json.loads(Path(__file__).with_name("hook-request.json").read_text("utf-8"))
PRICE_LIST = {"op": "add", "path": "/cart/attributes/priceList", "value": "volume"}


def with_quantity(quantity: int, **changed: Any) -> dict[str, Any]:
    first, *others = HOOK_REQUEST["cart"]["items"]
    items = [{**first, "quantity": quantity}, *others]
    return {**HOOK_REQUEST, "cart": {**HOOK_REQUEST["cart"], "items": items}} | changed


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, external_services: ExternalServices) -> Iterator[Site]:
    """One site for the module: no test here changes anything that another one reads."""
    with Site(tmp_path_factory.mktemp("answers"), external_services) as site:
        yield site


@pytest.fixture(scope="module")
def service(site: Site) -> Service:
    site.config["callbacks"] |= {
        "cart-changed": {"kind": "hook", "watch": "/cart", "target": "/cart", "deadline": "10s"},
        "customer-changed": {"kind": "hook", "watch": "/customer", "deadline": "10s"},
    }
    rules: dict[str, Any] = {"handler": "rules", "no_answer": "reject"}
    site.config["routes"] |= {
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
    return site.start()


def call_hook(site: Site, service: Service, body: dict[str, Any], callback: str = "cart-changed") -> httpx.Response:
    return site.http.post(signed_url(service.address, callback, body), json=body)


def status_and_body(answer: httpx.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json() if answer.content else None


# --- validations (section 6) ------------------------------------------------------------------------------------------


def test_a_validation_passes_with_200_and_nothing(site: Site, service: Service) -> None:
    assert status_and_body(site.validate(service, make_order("passes"))) == (200, None)


def test_a_repeated_validation_fails_with_the_same_reasons_in_the_same_order(site: Site, service: Service) -> None:
    fails = make_order("fails", currency="EUR", country="FI")

    answers = [status_and_body(site.validate(service, fails)) for _ in range(3)]

    assert answers == [
        (400, [
            {"adapterId": "jetshop_adapter", "code": "not-sek", "message": "Kronor only."},
            {"adapterId": "jetshop_adapter", "code": "not-sweden", "message": "Sweden only."},
        ])
    ] * 3  # fmt: skip
    assert site.deliveries() == []


def test_a_validation_of_an_order_that_norce_does_not_know_is_404(site: Site, service: Service) -> None:
    answer = site.http.post(signed_url(service.address, "order-rules", make_order("unknown")))

    assert (answer.status_code, answer.json()["code"]) == (404, "order-not-found")


def test_a_validation_may_be_a_get_and_its_body_is_ignored(site: Site, service: Service) -> None:
    body = make_order("passes")
    site.norce.put(body)
    url = signed_url(service.address, "order-rules", body)

    assert status_and_body(site.http.get(url)) == status_and_body(site.http.post(url, content=b"{")) == (200, None)


# --- hooks (section 7) ------------------------------------------------------------------------------------------------


def test_a_change_is_accepted_with_an_empty_array(site: Site, service: Service) -> None:
    assert status_and_body(call_hook(site, service, HOOK_REQUEST)) == (200, [])


def test_a_change_is_answered_with_further_changes_until_they_are_made(site: Site, service: Service) -> None:
    body = with_quantity(6)

    assert status_and_body(call_hook(site, service, body)) == (200, [PRICE_LIST])
    body["cart"]["attributes"] = {"priceList": "volume"}
    assert status_and_body(call_hook(site, service, body)) == (200, [])


def test_a_change_is_refused_with_one_reason_in_the_language_of_the_order(site: Site, service: Service) -> None:
    refused = {"code": "too-many", "message": "Högst tio.", "innerErrorCode": None}

    assert status_and_body(call_hook(site, service, with_quantity(12))) == (400, refused)
    assert status_and_body(call_hook(site, service, with_quantity(12, culture="en-GB")))[1]["message"] == "At most ten."


def test_a_hook_without_a_route_is_accepted(site: Site, service: Service) -> None:
    assert status_and_body(call_hook(site, service, HOOK_REQUEST, "customer-changed")) == (200, [])


def test_members_of_only_one_version_do_not_stop_a_hook(site: Site, service: Service) -> None:
    leaner = {name: HOOK_REQUEST[name] for name in ("id", "merchant", "channel", "cart")}

    assert status_and_body(call_hook(site, service, leaner)) == (200, [])
    assert status_and_body(call_hook(site, service, {**HOOK_REQUEST, "version": "v1", "shippings": None})) == (200, [])


INVALID: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], int, str]] = {
    "another order": (lambda _: {"content": json.dumps(make_order("another"))}, 400, "order-bad-request"),
    "no json": (lambda _: {"content": "{"}, 400, "order-bad-request"),
    "no media type": (lambda body: {"content": json.dumps(body), "headers": {}}, 415, "unsupported-media-type"),
}


@pytest.mark.parametrize(("change", "status", "code"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_hook_request_is_answered_with_a_code(
    site: Site, service: Service, change: Callable[[dict[str, Any]], dict[str, Any]], status: int, code: str
) -> None:
    sent = {"headers": {"content-type": "application/json"}} | change(HOOK_REQUEST)

    answer = site.http.post(signed_url(service.address, "cart-changed", HOOK_REQUEST), **sent)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_hook_that_is_signed_for_another_order_is_unauthorized(site: Site, service: Service) -> None:
    url = signed_url(service.address, "cart-changed", make_order("another"))

    answer = site.http.post(url.replace("/another/", f"/{HOOK_REQUEST['id']}/"), json=HOOK_REQUEST)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
