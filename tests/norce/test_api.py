"""The table of Norce's APIs is complete, and its schemas accept Norce's own samples."""

import re
from collections import Counter

import jsonschema_rs
import pytest
from jsonschema import Draft202012Validator

from adapter.norce.api import BY_NAME, CODES, OPERATIONS, Operation, schema

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)


def test_names_and_addresses_of_operations_are_unique() -> None:
    addresses = Counter((each.method, each.template(version)) for each in OPERATIONS for version in each.versions)

    assert len(BY_NAME) == len(OPERATIONS)
    assert set(addresses.values()) == {1}


SCHEMAS = {name for each in OPERATIONS for name in (each.body, each.error, *each.answers.values()) if name}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_body_has_a_schema_that_both_libraries_accept(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))

    assert not jsonschema_rs.validator_for(schema(name)).is_valid(1.5)


@each_operation
def test_every_operation_is_declared_for_each_of_its_versions(operation: Operation) -> None:
    assert set(operation.errors) == set(operation.versions)
    assert set(operation.query) <= set(operation.versions)
    assert all(200 <= status < 300 for status in operation.answers)
    assert all(400 <= status < 600 for errors in operation.errors.values() for status in errors)


def test_every_declared_error_has_a_code() -> None:
    declared = {status for each in OPERATIONS for errors in each.errors.values() for status in errors}

    assert declared <= {status for statuses in CODES.values() for status in statuses}


@each_operation
def test_an_address_is_filled_in_and_quoted(operation: Operation) -> None:
    parameters = dict.fromkeys(re.findall(r"\{(\w+)\}", operation.template("v1")), "a/b ö")

    url = operation.url("http://127.0.0.1:1/checkout/", "v1", **parameters)

    assert url.startswith(f"http://127.0.0.1:1/checkout/{operation.service}/api/")
    assert url.count("a%2Fb%20%C3%B6") == len(parameters)
    assert "{" not in url


def test_the_address_is_the_documented_one() -> None:
    base = "https://slug.api-se.stage.norce.tech/checkout"

    assert BY_NAME["create_order"].url(base, "v0") == f"{base}/order/api/v0/checkout/orders"
    assert (
        BY_NAME["add_transaction"].url(base, "v1", order_id="o1", payment_id="p1")
        == f"{base}/order/api/v1/checkout/orders/o1/payments/p1/transactions"
    )
    assert (
        BY_NAME["read_configuration"].url(base, "v1", merchant="m", channel="c", name="jetshop_adapter")
        == f"{base}/configuration/api/v1/configuration/merchants/m/channels/c/configurations/jetshop_adapter"
    )
    assert BY_NAME["retry_event"].url(base, "v1", event_id="e") == f"{base}/notification/api/v1/events/e/retry"


@pytest.mark.parametrize(
    ("name", "body", "holds"),
    [
        ("order", {"merchant": "norce", "channel": "1"}, True),
        ("order", {"channel": "1"}, False),
        ("order", {"merchant": "norce", "channel": "1", "payments": [{"actions": [{"type": "capture"}]}]}, False),
        ("order-create", {"culture": "string"}, True),
        ("order-create", {"hooks": {}}, False),
        ("order-page", {"data": [], "pagination": {"offset": 0, "limit": 10, "size": 0, "totalSize": 0}}, True),
        ("created", "o1", True),
        ("created", {"id": "o1"}, True),
        ("created", {}, False),
        ("shipping", {"total": None}, False),
        ("cart", None, False),
        ("errors", [{"adapterId": "a", "code": "c"}], True),
        ("errors", {"errors": [{"code": "c"}]}, True),
        ("error", {"code": "order-not-found"}, True),
        ("error", {"title": "Not Found", "status": 404}, True),
        ("error", {"message": "?"}, False),
        ("hook-response", [{"op": "add", "path": "/cart", "value": None}], True),
    ],
)
def test_schemas_accept_valid_bodies_only(name: str, body: object, holds: bool) -> None:
    assert jsonschema_rs.validator_for(schema(name)).is_valid(body) is holds
