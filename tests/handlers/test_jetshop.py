"""The export to Jetshop: the mapping, the requests to the stand-in, and the stand-in itself."""

import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.handlers.jetshop import JetshopExport
from adapter.handlers.jetshop.contract import contract, schema, violations
from adapter.handlers.jetshop.mapping import canonical, order_key, payment_information, payment_path
from adapter.handlers.jetshop.settings import JetshopSettings
from adapter.orders import Order, read_order
from adapter.outgoing import Outgoing, Traffic
from adapter.plugin import (
    Done,
    Misconfigured,
    Outcome,
    Previous,
    Reject,
    Retry,
    Skip,
    Unknown,
    Url,
)
from adapter.sandbox.jetshop_stand_in import (
    BROKEN,
    DROPPED_AFTER,
    DROPPED_BEFORE,
    MALFORMED,
    Accepted,
    Fault,
    JetshopStandIn,
)
from adapter.testing import ABSENT, context, notification, order
from tests import ORDERS
from tests.simulators import in_thread

COMPLETED = json.loads((ORDERS / "order-completed.json").read_text())
NOW = datetime(2026, 2, 3, 8, 16, 40, tzinfo=UTC)
CANARY = "CANARY"

SETTINGS = {
    "base_url": "http://localhost:8000",
    "shop_id": "1",
    "auth": {"type": "basic", "username": "stand-in", "password": "stand-in"},
    "method_map": {
        "awardit_adapter:Presentkort": {"code": "giftcard", "name": "Gift card"},
        "klarna_checkout_adapter": {"code": "klarna"},
    },
}


def settings(**changes: Any) -> JetshopSettings:
    tree = {name: value for name, value in (SETTINGS | changes).items() if value is not ABSENT}
    return msgspec.convert(tree, JetshopSettings, dec_hook=lambda type_, value: type_(value))


def refusal(changes: Mapping[str, Any], **changed_settings: Any) -> Reject:
    with pytest.raises(Reject) as raised:
        payment_information(order(changes), settings(**changed_settings))
    return raised.value


# --- the mapping ----------------------------------------------------------------------------------------------------

ADDRESS = {
    "firstName": "Tove",
    "lastName": "Testsson",
    "street": "Provgatan 12",
    "street2": "Lgh 1203",
    "postalCode": "411 23",
    "city": "Göteborg",
    "countryCode": "SE",
}

DOCUMENT = {
    "schemaVersion": "1",
    "source": {
        "system": "norce-checkout",
        "orderId": "oKvRmTzQwYbLsXnHdJcFgPeAu",
        "merchant": "fjallboden",
        "channel": "se-b2c",
    },
    "orderReference": "100245",
    "cartReference": "56393",
    "state": "completed",
    "completedAt": "2026-02-03T08:16:35.870Z",
    "currency": "SEK",
    "country": "SE",
    "culture": "sv-SE",
    "payments": [
        {
            "id": "pVbNmQwErTyUiOpAsDfGhJkL",
            "providerId": "awardit_adapter",
            "type": "voucher",
            "state": "confirmed",
            "method": {"code": "giftcard", "name": "Gift card"},
            "transactionId": "GC-7710-0042",
            "amount": "200.00",
            "currency": "SEK",
        },
        {
            "id": "pKbXuYjvYxsezKCQAMuuSKGD",
            "providerId": "klarna_checkout_adapter",
            "type": "default",
            "state": "reserved",
            "method": {"code": "klarna"},
            "transactionId": "7d31e2cf-2d46-4db0-b87d-d65dfaae298f",
            "amount": "1678.10",
            "currency": "SEK",
        },
    ],
    "shippings": [
        {
            "id": "sWbKpXvRqLzTnHyMdGfJcEa",
            "providerId": "ingrid_adapter",
            "reference": "e8ed2091-c34c-4837-a3a8-bc827b0dc183",
            "tmsReference": "a935a628-f70c-47a4-a9f6-98c6d08c2ba3",
            "name": "PostNord MyPack Collect",
            "carrier": "PostNord",
            "productReference": "pn-mypack-collect",
            "pickupLocationReference": "SE-1148",
            "total": {"incVat": "59.00", "exVat": "47.20", "vat": "11.80"},
            "vatRate": "0.25",
        }
    ],
    "totals": {
        "order": {"incVat": "1878.10", "exVat": "1532.88", "vat": "345.22"},
        "cart": {"incVat": "1819.10", "exVat": "1485.68", "vat": "333.42"},
        "shipping": {"incVat": "59.00", "exVat": "47.20", "vat": "11.80"},
        "payments": "1878.10",
    },
    "customer": {
        "type": "person",
        "email": "tove.testsson@example.com",
        "phone": "+46701740606",
        "billing": ADDRESS,
        "shipping": ADDRESS,
    },
}


def test_a_completed_order_becomes_exactly_this_document():
    assert payment_information(order(), settings()) == DOCUMENT


def test_enumerations_country_and_currency_come_in_either_case():
    changes = {
        "/state/currentStatus": "Completed",
        "/state/transitions/3/status": "Completed",
        "/currency": "sek",
        "/country": "se",
        "/customer/type": "Person",
        "/customer/billing/country": "se",
        "/payments/0/type": "Voucher",
        "/payments/0/state": "Confirmed",
        "/payments/0/currency": "sek",
        "/shippings/0/state": "Removed",
    }

    assert payment_information(order(changes), settings()) == DOCUMENT


def test_the_last_completion_counts_and_is_exported_in_utc():
    transitions = [
        {"status": "completed", "timeStamp": "2026-02-03T08:00:00Z"},
        {"status": "accepted", "timeStamp": "2026-02-03T09:00:00Z"},
        {"status": "completed", "timeStamp": "2026-02-03T10:00:00.1234567+01:00"},
        {"status": "removed", "timeStamp": "2026-02-03T11:00:00Z"},
    ]

    document = payment_information(order({"/state/transitions": transitions}), settings())

    assert document["completedAt"] == "2026-02-03T09:00:00.123Z"


def test_an_order_that_costs_nothing_needs_no_payment():
    free = {"includingVat": 0, "excludingVat": 0.0}
    changes = {"/total": free, "/payments": [], "/shippings": [], "/cart/total": free}

    document = payment_information(order(changes), settings())

    assert document["payments"] == []
    assert document["totals"] == {
        "order": {"incVat": "0.00", "exVat": "0.00", "vat": "0.00"},
        "cart": {"incVat": "0.00", "exVat": "0.00", "vat": "0.00"},
        "payments": "0.00",
    }


def test_payments_in_other_states_are_left_out():
    failed = COMPLETED["payments"][1] | {"state": "failed", "amount": 99}

    document = payment_information(order({"/payments": [failed, *COMPLETED["payments"]]}), settings())

    assert document["payments"] == DOCUMENT["payments"]


NOTHING = {"incVat": "0.00", "exVat": "0.00", "vat": "0.00"}
RATES = {
    "from the amounts": ({"includingVat": 59, "excludingVat": 47.2}, "0.25"),
    "12 %": ({"includingVat": 112, "excludingVat": 100}, "0.12"),
    "rounded": ({"includingVat": 49, "excludingVat": 46.23}, "0.05991780"),
    "without VAT": ({"includingVat": 59, "excludingVat": 59}, "0"),
    "nothing": ({"includingVat": 0, "excludingVat": 0.0}, "0"),
}


@pytest.mark.parametrize(("total", "rate"), RATES.values(), ids=RATES)
@pytest.mark.parametrize("missing", [None, ABSENT], ids=["null", "absent"])
def test_a_shipping_without_a_vat_rate_has_that_of_its_amounts(total, rate, missing):
    document = payment_information(order({"/shippings/1/total": total, "/shippings/1/vatRate": missing}), settings())

    assert Decimal(document["shippings"][0]["vatRate"]) == Decimal(rate)


@pytest.mark.parametrize(
    "total", [None, ABSENT, {}, {"includingVat": None, "excludingVat": None}], ids=["null", "absent", "empty", "nulls"]
)
@pytest.mark.parametrize(("given", "rate"), [(None, "0"), (0.25, "0.25")], ids=["no rate", "a rate"])
def test_a_shipping_without_a_total_costs_nothing(total, given, rate):
    document = payment_information(order({"/shippings/1/total": total, "/shippings/1/vatRate": given}), settings())

    assert (document["shippings"][0]["total"], document["shippings"][0]["vatRate"]) == (NOTHING, rate)
    assert document["totals"] == DOCUMENT["totals"] | {"shipping": NOTHING}


@pytest.mark.parametrize("missing", [None, ABSENT, ""], ids=["null", "absent", "empty"])
def test_a_payment_without_currency_and_type_is_a_default_one_in_the_orders_currency(missing):
    changes = {"/payments/1/currency": missing, "/payments/1/type": missing}

    assert payment_information(order(changes), settings()) == DOCUMENT


def test_shippings_that_failed_are_left_out():
    failed = COMPLETED["shippings"][1] | {"state": "failed"}

    document = payment_information(order({"/shippings": [failed, *COMPLETED["shippings"]]}), settings())

    assert document == DOCUMENT


@pytest.mark.parametrize(
    ("level", "members"),
    [("full", {"type", "email", "phone", "billing", "shipping"}), ("contact", {"type", "email", "phone"})],
)
def test_the_settings_limit_the_members_of_the_customer(level, members):
    assert set(payment_information(order(), settings(customer=level))["customer"]) == members


def test_no_customer_at_all():
    document = payment_information(order({"/customer/billing/country": "Sweden"}), settings(customer="none"))

    assert "customer" not in document


def test_identity_numbers_are_never_sent():
    changes = {
        f"/customer/{address}/{name}IdentificationNumber": CANARY
        for address in ("billing", "shipping")
        for name in ("national", "organization")
    }

    assert CANARY not in canonical(payment_information(order(changes), settings())).decode()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["klarna_checkout_adapter:Klarna Checkout", "klarna_checkout_adapter", "Klarna Checkout", "*"], 0),
        (["klarna_checkout_adapter", "Klarna Checkout", "*"], 0),
        (["*", "Klarna Checkout"], 1),
        (["something-else", "*"], 1),
    ],
    ids=["adapter-and-name", "adapter", "name", "star"],
)
def test_the_most_exact_entry_of_method_map_counts(keys, expected):
    method_map = {key: {"code": f"code-{index}"} for index, key in enumerate(keys)}

    document = payment_information(order(), settings(method_map={"*": {"code": "other"}} | method_map))

    assert document["payments"][1]["method"] == {"code": f"code-{expected}"}


def test_passthrough_sends_the_method_as_norce_names_it():
    document = payment_information(order(), settings(method_map={}, unmapped="passthrough"))

    assert document["payments"][1]["method"] == {"code": "klarna_checkout_adapter", "name": "Klarna Checkout"}


REFUSALS = {
    "currency-missing": ({"/currency": None}, "order-validation", "currency is missing"),
    "currency": ({"/currency": f"{CANARY}"}, "order-validation", "currency is not three letters (ISO 4217)"),
    "country": ({"/country": CANARY}, "order-validation", "country is not two letters (ISO 3166-1)"),
    "culture": ({"/culture": f"{CANARY}!"}, "order-validation", "culture is not a language and a country"),
    "not-completed": ({"/state/currentStatus": CANARY}, "order-validation", "state.currentStatus is not completed"),
    "never-completed": ({"/state/transitions": []}, "order-validation", "state.transitions: none is completed"),
    "no-moment": ({"/state/transitions/3/timeStamp": CANARY}, "order-validation", "has no valid timeStamp"),
    "order-id": ({"/id": None}, "order-validation", "id is missing"),
    "merchant": ({"/merchant": " "}, "order-validation", "merchant is missing"),
    "channel": ({"/channel": ABSENT}, "order-validation", "channel is missing"),
    "total-missing": ({"/total": None}, "order-validation", "total.includingVat is missing"),
    "total-negative": ({"/total/excludingVat": -1}, "order-validation", "total.excludingVat is negative"),
    "total-infinite": (
        {"/total/includingVat": "Infinity"},
        "order-validation",
        "total.includingVat holds a value of a wrong type",
    ),
    "total-nan": (
        {"/total/excludingVat": "NaN"},
        "order-validation",
        "total.excludingVat holds a value of a wrong type",
    ),
    "total-text": ({"/total/includingVat": CANARY}, "order-validation", "total.includingVat holds a value of a wrong"),
    "total-huge": ({"/total/includingVat": 10**12}, "order-validation", "total.includingVat has more than twelve"),
    "total-vat": ({"/total/excludingVat": 1879}, "order-validation", "total is less with VAT than without"),
    "cart-total": ({"/cart/total/excludingVat": None}, "order-validation", "cart.total.excludingVat is missing"),
    "cart-total-type": ({"/cart/total": CANARY}, "order-validation", "cart.total holds a value of a wrong type"),
    "cart-type": ({"/cart": CANARY}, "order-validation", "cart holds a value of a wrong type"),
    "payment-id": ({"/payments/0/id": ""}, "order-validation", "payments[0].id is missing"),
    "payment-adapter": ({"/payments/1/adapterId": None}, "order-validation", "payments[1].adapterId is missing"),
    "payment-type": ({"/payments/1/type": CANARY}, "order-validation", "payments[1].type is not default, prepaid or"),
    "payment-amount": ({"/payments/1/amount": None}, "order-validation", "payments[1].amount is missing"),
    "payment-negative": ({"/payments/1/amount": -0.01}, "order-validation", "payments[1].amount is negative"),
    "payment-nan": (
        {"/payments/1/amount": "NaN"},
        "order-validation",
        "payments[1].amount holds a value of a wrong type",
    ),
    "payment-amount-type": ({"/payments/0/amount": CANARY}, "order-validation", "payments[0].amount holds a value"),
    "payments-type": ({"/payments": CANARY}, "order-validation", "payments holds a value of a wrong type"),
    "payment-method": ({"/payments/1/adapterId": CANARY}, "order-validation", "payments[1] has no entry in method_map"),
    "payment-currency": ({"/payments/0/currency": "NOK"}, "payment-error", "payments[0].currency is not the order's"),
    "no-payment": ({"/payments": []}, "payment-error", "payments: none is reserved, captured, confirmed or pending"),
    "all-removed": (
        {"/payments/0/state": "removed", "/payments/1/state": "removed"},
        "payment-error",
        "payments: none is reserved, captured, confirmed or pending",
    ),
    "sum": ({"/payments/1/amount": 1678.12}, "payment-error", "do not add up to total.includingVat within"),
    "refunded": (
        {"/payments/1/state": "Refunded"},
        "payment-error",
        "(left out by their state: payments[1] is refunded",
    ),
    "odd-state": ({"/payments/1/state": CANARY}, "payment-error", "(left out by their state: payments[1])"),
    "shipping-id": ({"/shippings/1/id": None}, "order-validation", "shippings[1].id is missing"),
    "shipping-total": (
        {"/shippings/1/total": {"excludingVat": 47.2}},
        "order-validation",
        "shippings[1].total.includingVat is missing",
    ),
    "shipping-vat": ({"/shippings/1/vatRate": 25}, "order-validation", "shippings[1].vatRate is not a fraction"),
    "shipping-all-vat": (
        {"/shippings/1/vatRate": None, "/shippings/1/total/excludingVat": 0},
        "order-validation",
        "shippings[1].vatRate is not a fraction",
    ),
    "payment-currency-type": ({"/payments/1/currency": 7}, "order-validation", "payments[1].currency holds a value"),
    "payment-type-type": ({"/payments/1/type": 7}, "order-validation", "payments[1].type holds a value of a wrong"),
    "shipping-total-type": ({"/shippings/1/total": CANARY}, "order-validation", "shippings[1].total holds a value"),
    "shipping-type": ({"/shippings/1/vatRate": CANARY}, "order-validation", "shippings[1].vatRate holds a value of a"),
    "customer-type": ({"/customer/type": CANARY}, "order-validation", "customer.type is not person or organization"),
    "address-country": (
        {"/customer/shipping/country": CANARY},
        "order-validation",
        "customer.shipping.country is not two letters",
    ),
}
PERSONAL = {
    f"/customer/{address}/{member}": f"{CANARY} {member}"
    for address in ("billing", "shipping")
    for member in ("givenName", "familyName", "streetAddress", "postalCode", "city", "phone", "email")
}


@pytest.mark.parametrize(("changes", "code", "text"), REFUSALS.values(), ids=REFUSALS.keys())
def test_an_order_that_cannot_be_exported_is_refused_with_member_and_rule(changes, code, text):
    reject = refusal(PERSONAL | changes)

    assert reject.code == code
    assert text in reject.message
    assert CANARY.lower() not in str(reject).lower()


def test_all_problems_of_an_order_are_reported_at_once():
    """Problems with payments are reported beside others."""
    reject = refusal({"/currency": "string", "/payments": [], "/shippings/1/id": None, "/country": "Sweden"})

    assert str(reject) == (
        "order-validation: currency is not three letters (ISO 4217); "
        "payments: none is reserved, captured, confirmed or pending; "
        "shippings[1].id is missing; "
        "country is not two letters (ISO 3166-1)"
    )


def test_problems_beyond_the_limit_are_counted():
    reject = refusal({"/payments": [{"state": "captured"}] * 30})

    assert reject.message.count(";") == 25
    assert reject.message.endswith("more")


def test_the_sample_of_the_api_reference_is_refused_with_its_problems():
    sample = json.loads((ORDERS / "order-api-request-sample.json").read_text())
    sample |= {"id": "o_1", "merchant": "norce", "channel": "1", "lastModified": "2026-02-03T08:16:35.870Z"}
    sample["state"]["currentStatus"] = "completed"

    with pytest.raises(Reject) as raised:
        payment_information(order(base=sample), settings())

    assert str(raised.value) == (
        "order-validation: currency is not three letters (ISO 4217); "
        "payments: none is reserved, captured, confirmed or pending; "
        "state.transitions: none is completed, so there is no time to export; "
        "country is not two letters (ISO 3166-1); "
        "culture is not a language and a country such as sv-SE"
    )


def test_the_mapped_document_is_checked_against_the_contract():
    many = [COMPLETED["payments"][1] | {"amount": 999_999_999_999}] * 2

    reject = refusal({"/payments": many}, amount_tolerance="10000000000000")

    assert reject.message == "the document violates the contract: /totals/payments breaks `pattern`"


def test_other_members_may_have_wrong_types():
    document = payment_information(order({"/cart/items/0/quantity": "three", "/consents": 7}), settings())

    assert document == DOCUMENT


def test_a_difference_equal_to_the_tolerance_is_tolerated():
    payments = payment_information(order({"/payments/1/amount": 1678.11}), settings())["totals"]["payments"]

    assert payments == "1878.11"


ROUNDINGS = {
    "half-up": ("0.005", 2, "0.01"),
    "half-of-even": ("0.025", 2, "0.03"),
    "below-half": ("0.0149999", 2, "0.01"),
    "to-nothing": ("0.0049", 2, "0.00"),
    "four-decimals": ("1.00005", 4, "1.0001"),
    "integer": ("7", 3, "7.000"),
    "exponent": ("1e2", 2, "100.00"),
    "negative-zero": ("-0.0", 2, "0.00"),
}


@pytest.mark.parametrize(("amount", "scale", "text"), ROUNDINGS.values(), ids=ROUNDINGS.keys())
def test_amounts_are_rounded_half_up_to_the_scale(amount, scale, text):
    raw = json.dumps(COMPLETED | {"payments": [COMPLETED["payments"][1] | {"amount": "AMOUNT"}]})
    paid = read_order(raw.replace('"AMOUNT"', amount).encode())

    document = payment_information(paid, settings(money_scale=scale, amount_tolerance="2000"))

    assert document["payments"][0]["amount"] == text


@given(
    amounts=st.lists(st.decimals(min_value=0, max_value=10**9, places=6), min_size=1, max_size=6),
    vat=st.decimals(min_value=0, max_value=1, places=6),
    scale=st.sampled_from([2, 3, 4]),
)
def test_money_adds_up_in_the_document_and_is_rounded_half_up(amounts, vat, scale):
    total = sum(amounts)
    raw = json.dumps(
        COMPLETED | {"payments": "PAYMENTS", "total": {"includingVat": "INC", "excludingVat": "EX"}, "shippings": []}
    )
    payments = [
        json.dumps(COMPLETED["payments"][1] | {"amount": "AMOUNT"}).replace('"AMOUNT"', str(amount))
        for amount in amounts
    ]
    raw = raw.replace('"PAYMENTS"', f"[{','.join(payments)}]")
    raw = raw.replace('"INC"', f"{total:f}").replace('"EX"', f"{total * (1 - vat):f}")

    document = payment_information(read_order(raw.encode()), settings(money_scale=scale, amount_tolerance="0.03"))

    sent = [Decimal(payment["amount"]) for payment in document["payments"]]
    prices = document["totals"]["order"]
    unit = Decimal(1).scaleb(-scale)
    assert sent == [amount.quantize(unit, ROUND_HALF_UP) for amount in amounts]
    assert sum(sent) == Decimal(document["totals"]["payments"])
    assert Decimal(prices["exVat"]) + Decimal(prices["vat"]) == Decimal(prices["incVat"])
    texts = [payment["amount"] for payment in document["payments"]] + [*prices.values(), document["totals"]["payments"]]
    assert all(not violations("Money", text) and len(text.partition(".")[2]) == scale for text in texts)


@pytest.mark.parametrize(
    ("source", "changes", "key"),
    [
        (["reference", "cart.reference"], {}, "100245"),
        (["reference", "cart.reference"], {"/reference": ""}, "56393"),
        (["id"], {}, "oKvRmTzQwYbLsXnHdJcFgPeAu"),
        (["/attributes/shopOrder", "id"], {"/attributes/shopOrder": 4711}, "4711"),
        (["/cart/attributes/a~1b"], {"/cart/attributes/a~1b": "x"}, "x"),
        (["/attributes/none", "cart.reference"], {}, "56393"),
    ],
    ids=["reference", "cart-reference", "id", "number", "escaped", "absent"],
)
def test_the_first_key_source_with_a_value_names_the_order(source, changes, key):
    assert order_key(order(changes), settings(key_source=source)) == key


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"/reference": None, "/cart/reference": " "}, "none of reference, cart.reference has a value"),
        ({"/reference": 100245}, "reference is not text"),
        ({"/reference": None, "/cart/reference": 56393}, "cart.reference is not text"),
        ({"/reference": None, "/cart": 7}, "cart.reference is not text"),
        ({"/reference": ".."}, "reference cannot be part of an address"),
    ],
    ids=["none", "number", "cart-number", "odd-cart", "dots"],
)
def test_an_order_without_a_clear_key_is_refused(changes, text):
    with pytest.raises(Reject) as raised:
        order_key(order(changes), settings())

    assert (raised.value.code, text in raised.value.message) == ("order-validation", True)


def test_values_in_the_path_are_percent_encoded():
    path = payment_path("a/b %?ö", settings(shop_id="se/1", path_payment_information="/x/{shopId}/{orderKey}"))

    assert path == "/x/se%2F1/a%2Fb%20%25%3F%C3%B6"


# --- the settings ---------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "no-method-map": ({"method_map": {}}, "every paid order would be refused"),
    "host-http": ({"base_url": "http://shop.example"}, "https://"),
    "auth-type": ({"auth": {"type": "digest"}}, "digest"),
    "user-colon": ({"auth": {"type": "basic", "username": "a:b", "password": "c"}}, "must not hold a colon"),
    "bearer-lines": (
        {"auth": {"type": "bearer", "token": f"{CANARY}\n"}},
        "token must be plain ASCII text on one line",
    ),
    "auth-header": ({"auth": {"type": "header", "name": "Content-Type", "value": CANARY}}, "is set by this handler"),
    "header-name": ({"headers": {"a b": "c"}}, "is not the name of a header"),
    "header-reserved": ({"headers": {"Idempotency-Key": "c"}}, "Idempotency-Key is set by this handler"),
    "header-value": ({"headers": {"x": f"{CANARY}\r\n"}}, "x must have a value of plain ASCII text"),
    "header-twice": (
        {"auth": {"type": "header", "name": "X-Key", "value": "v"}, "headers": {"x-key": "w"}},
        "leave it out of headers",
    ),
    "path-key": ({"path_payment_information": "/shops/{shopId}"}, "needs {orderKey}"),
    "path-name": ({"path_payment_information": "/{shop}/{orderKey}"}, "not {shop}"),
    "path-query": ({"path_payment_information": "/{orderKey}?a=b"}, "must be a plain path"),
    "path-relative": ({"path_payment_information": "{orderKey}"}, "must be a plain path"),
    "path-dots": ({"path_payment_information": "/../{orderKey}"}, "must be a plain path"),
    "key-source": ({"key_source": ["/customer/billing/email"]}, "key_source takes"),
    "states": ({"include_states": ["refunded"]}, "Invalid enum value"),
    "scale": ({"money_scale": 5}, "<= 4"),
    "tolerance": ({"amount_tolerance": "-0.01"}, "amount_tolerance must be zero or more"),
    "tolerance-nan": ({"amount_tolerance": "NaN"}, "amount_tolerance must be zero or more"),
    "unknown": ({"transport": "soap12"}, "unknown field"),
}


@pytest.mark.parametrize(("changes", "text"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_invalid_settings_are_refused(changes, text):
    with pytest.raises(msgspec.ValidationError) as raised:
        settings(**changes)

    assert text in str(raised.value)
    assert CANARY not in str(raised.value)


def test_defaults():
    assert settings(method_map=ABSENT, unmapped="passthrough") == JetshopSettings(
        base_url=Url("http://localhost:8000"),
        shop_id="1",
        auth=settings().auth,
        headers={},
        path_payment_information="/shops/{shopId}/orders/{orderKey}/payment-information",
        key_source=("reference", "cart.reference"),
        include_states=("reserved", "captured", "confirmed", "pending"),
        method_map={},
        unmapped="passthrough",
        amount_tolerance=Decimal("0.01"),
        money_scale=2,
        customer="full",
        not_found_grace_seconds=600,
    )


# --- the export -----------------------------------------------------------------------------------------------------


def export(
    shop: JetshopStandIn | None,
    method: str = "deliver",
    *,
    of: Order | None = None,
    with_settings: JetshopSettings | None = None,
    **given: Any,
) -> Done | Skip | Outcome | None:
    """Call the handler once and return its outcome. Without a shop the request goes over TCP."""
    chosen, about = with_settings or settings(), notification(of)
    made = context(JetshopExport, chosen, shop, of=about.order, **given)

    async def call() -> Done | Skip | Outcome | None:
        outgoing = Outgoing()
        over_tcp = outgoing.client(chosen, made.deadline, made.clock, Traffic())
        try:
            return await getattr(JetshopExport(), method)(about, replace(made, http=over_tcp) if shop is None else made)
        except Outcome as outcome:
            return outcome
        finally:
            await outgoing.aclose()

    outcome = asyncio.run(call())
    assert shop is None or shop.violations == []
    return outcome


def test_an_export_is_done_with_the_shops_number():
    shop = JetshopStandIn()

    outcome = export(shop)

    assert isinstance(outcome, Done)
    assert outcome.reference == shop.order_number("100245")
    assert outcome.facts["result"] == "created"
    assert [(entry.order_key, entry.document, entry.result) for entry in shop.journal] == [
        ("100245", DOCUMENT, "created")
    ]


def test_an_export_of_the_same_document_is_skipped_without_a_request():
    shop = JetshopStandIn()
    first = export(shop)
    assert isinstance(first, Done)
    requests = shop.requests

    outcome = export(shop, previous=Previous(reference=first.reference, facts=first.facts, at=NOW))

    assert outcome == Skip("nothing-changed")
    assert shop.requests == requests


def test_an_export_of_another_document_replaces_the_first():
    shop = JetshopStandIn()
    first = export(shop)
    assert isinstance(first, Done)

    captured = order({"/payments/1/state": "captured"})
    outcome = export(shop, of=captured, previous=Previous(reference=None, facts=first.facts, at=NOW))

    assert isinstance(outcome, Done)
    assert outcome.facts["result"] == "updated"
    assert outcome.facts["payload"] != first.facts["payload"]
    assert len({entry.idempotency_key for entry in shop.journal}) == 2


def test_a_resend_of_the_same_document_is_sent_with_another_key():
    shop = JetshopStandIn()
    first = export(shop)
    assert isinstance(first, Done)
    previous = Previous(reference=first.reference, facts=first.facts, at=NOW)

    outcomes = [export(shop, previous=previous, is_resend=True) for _ in range(2)]

    assert [isinstance(each, Done) and each.facts["result"] for each in outcomes] == ["unchanged", "unchanged"]
    original, *again = [entry.idempotency_key for entry in shop.journal]
    assert again[0] == again[1] != original


def test_a_resend_updates_the_order_with_a_corrected_method_code():
    shop = JetshopStandIn()
    wrong = settings(method_map={"*": {"code": "wrong"}})
    first = export(shop, with_settings=wrong)
    assert isinstance(first, Done)
    assert {payment["method"]["code"] for payment in shop.documents["100245"]["payments"]} == {"wrong"}

    outcome = export(shop, previous=Previous(reference=first.reference, facts=first.facts, at=NOW), is_resend=True)

    assert isinstance(outcome, Done)
    assert outcome.facts["result"] == "updated"
    assert shop.documents["100245"] == DOCUMENT
    assert shop.order_number("100245") == outcome.reference == first.reference


@pytest.mark.parametrize(("fault", "finds"), [(DROPPED_AFTER, True), (DROPPED_BEFORE, False)])
def test_a_lookup_tells_a_resend_from_the_first_export(fault: Fault, finds: bool):
    shop = JetshopStandIn()
    export(shop, with_settings=settings(method_map={"*": {"code": "wrong"}}))
    shop.script("100245", fault)

    outcomes = [export(shop, is_resend=True), export(shop, "lookup", is_resend=True)]

    assert isinstance(outcomes[0], Unknown)
    assert isinstance(outcomes[1], Done) == finds


def test_a_repeated_attempt_has_the_same_idempotency_key_and_no_second_effect():
    shop = JetshopStandIn()

    outcomes = [export(shop), export(shop)]

    assert [outcome.facts["result"] for outcome in outcomes if isinstance(outcome, Done)] == ["created", "unchanged"]
    assert len({entry.idempotency_key for entry in shop.journal}) == 1
    assert shop.exports("100245") == 1


ANSWERS = {
    "202": (Fault(acts=True, status=202), Unknown, "jetshop-broken-answer", 1),
    "202-with-a-result": (
        Fault(acts=True, status=202, body=b'{"orderKey": "100245", "result": "created"}'),
        Unknown,
        "jetshop-broken-answer",
        1,
    ),
    "broken-body": (BROKEN, Unknown, "jetshop-broken-answer", 1),
    "malformed-body": (MALFORMED, Unknown, "jetshop-broken-answer", 1),
    "another-key": (
        Fault(acts=True, body=b'{"orderKey": "1", "result": "created"}'),
        Unknown,
        "jetshop-broken-answer",
        1,
    ),
    "307": (Fault(status=307, location="https://elsewhere.example"), Misconfigured, "jetshop-redirected", 0),
    "400": (Fault(status=400), Reject, "jetshop-bad-request", 0),
    "401": (Fault(status=401), Misconfigured, "jetshop-unauthorized", 0),
    "403": (Fault(status=403), Misconfigured, "jetshop-unauthorized", 0),
    "404": (Fault(status=404), Retry, "jetshop-order-not-found", 0),
    "408": (Fault(status=408), Unknown, "destination-busy", 0),
    "409": (Fault(status=409), Reject, "order-conflict", 0),
    "418": (Fault(status=418), Reject, "destination-refused", 0),
    "422": (Fault(status=422), Reject, "jetshop-validation", 0),
    "429": (Fault(status=429), Retry, "destination-busy", 0),
    "500": (Fault(status=500), Unknown, "destination-error", 0),
    "500-after-acting": (Fault(acts=True, status=500), Unknown, "destination-error", 1),
    "502": (Fault(status=502), Unknown, "destination-error", 0),
    "503": (Fault(status=503), Unknown, "destination-busy", 0),
    "dropped-before": (DROPPED_BEFORE, Unknown, "destination-no-answer", 0),
    "dropped-after": (DROPPED_AFTER, Unknown, "destination-no-answer", 1),
}


@pytest.mark.parametrize(("fault", "kind", "code", "effects"), ANSWERS.values(), ids=ANSWERS.keys())
def test_every_answer_has_its_outcome(fault, kind, code, effects):
    shop = JetshopStandIn()
    shop.script("100245", fault)

    outcome = export(shop)

    assert type(outcome) is kind
    assert outcome.code == code
    assert shop.exports("100245") == effects


@pytest.mark.parametrize(("status", "kind"), [(429, Retry), (503, Unknown)])
def test_retry_after_of_a_busy_shop_is_kept(status, kind):
    shop = JetshopStandIn()
    shop.script("100245", Fault(status=status, retry_after="120"))

    outcome = export(shop)

    assert isinstance(outcome, kind)
    assert outcome.after == timedelta(seconds=120)


@pytest.mark.parametrize(("seconds", "kind"), [(0, Retry), (599, Retry), (600, Reject)])
def test_an_unknown_order_is_retried_within_the_grace(seconds, kind):
    shop = JetshopStandIn()
    shop.script("100245", Fault(status=404))

    outcome = export(shop, first_attempt_at=NOW - timedelta(seconds=seconds))

    assert type(outcome) is kind
    assert outcome.code == "jetshop-order-not-found"


def test_an_order_that_the_shop_creates_later_is_exported():
    shop = JetshopStandIn()
    shop.script("100245", *[Fault(status=404)] * 2)

    outcomes = [export(shop) for _ in range(3)]

    assert [type(outcome) for outcome in outcomes] == [Retry, Retry, Done]


TEMPLATE = "/shops/{shopId}/orders/{orderKey}/payment-information"


def test_a_refusal_shows_only_its_code_and_places_in_our_document():
    shop = JetshopStandIn()
    paths = ("/payments/0/method/code", "/customer/CANARY", "CANARY", "")
    shop.script("100245", Fault(status=422, code="method-unknown", details=paths))

    outcome = export(shop)

    assert str(outcome) == (
        f"jetshop-validation: PUT {TEMPLATE} was answered 422 (method-unknown) for /payments/0/method/code"
    )


def test_a_refusal_in_free_text_shows_only_its_status():
    shop = JetshopStandIn()
    shop.script("100245", Fault(status=400, code="CANARY is no code"))

    assert str(export(shop)) == f"jetshop-bad-request: PUT {TEMPLATE} was answered 400"


def test_an_order_that_cannot_be_mapped_is_not_sent():
    shop = JetshopStandIn()

    outcome = export(shop, of=order({"/payments": []}))

    assert isinstance(outcome, Reject)
    assert shop.requests == 0


@pytest.mark.parametrize(
    ("auth", "header", "value"),
    [
        ({"type": "basic", "username": "å", "password": "ö"}, "authorization", "Basic w6U6w7Y="),
        ({"type": "bearer", "token": "t"}, "authorization", "Bearer t"),
        ({"type": "header", "name": "x-api-key", "value": "v"}, "x-api-key", "v"),
    ],
    ids=["basic", "bearer", "header"],
)
def test_each_kind_of_credentials_is_sent(auth, header, value):
    seen: list[httpx.Headers] = []

    class Looking(JetshopStandIn):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(httpx.Headers(scope["headers"]))
            await super().__call__(scope, receive, send)

    export(Looking(), with_settings=settings(auth=auth, headers={"channelid": "2"}))

    assert seen[0][header] == value
    assert seen[0]["channelid"] == "2"


# --- in doubt -------------------------------------------------------------------------------------------------------


def test_an_export_that_was_found_counts_as_exported():
    shop = JetshopStandIn()
    shop.script("100245", DROPPED_AFTER)
    export(shop)
    found = export(shop, "lookup")
    assert isinstance(found, Done)

    assert export(shop, previous=Previous(reference=found.reference, facts=found.facts, at=NOW)) == Skip(
        "nothing-changed"
    )


def test_another_document_in_the_shop_does_not_count_as_ours():
    shop = JetshopStandIn()
    export(shop)

    assert export(shop, "lookup", of=order({"/payments/1/state": "captured"})) is None


LOOKUPS = {
    "401": (Fault(status=401), Misconfigured, "jetshop-unauthorized"),
    "429": (Fault(status=429), Retry, "destination-busy"),
    "500": (Fault(status=500), Retry, "destination-error"),
    "dropped": (DROPPED_BEFORE, Retry, "destination-no-answer"),
    "malformed": (MALFORMED, Retry, "jetshop-broken-answer"),
    "broken": (BROKEN, Retry, "jetshop-broken-answer"),
}


@pytest.mark.parametrize(("fault", "kind", "code"), LOOKUPS.values(), ids=LOOKUPS.keys())
def test_an_inconclusive_lookup_leaves_the_doubt(fault, kind, code):
    shop = JetshopStandIn()
    export(shop)
    shop.script("100245", fault, method="GET")

    outcome = export(shop, "lookup")

    assert type(outcome) is kind
    assert outcome.code == code


# --- over TCP -------------------------------------------------------------------------------------------------------


def test_broken_connections_and_late_answers_over_tcp_are_unknown_until_looked_up():
    shop = JetshopStandIn()
    shop.script("100245", DROPPED_BEFORE, DROPPED_AFTER, Fault(acts=True, delay_seconds=60))
    late = order({"/payments/1/state": "captured"})
    with in_thread(shop.serve()) as url:
        there = settings(base_url=url)

        broken = [export(None, with_settings=there) for _ in range(2)]
        found = export(None, "lookup", with_settings=there)
        slow = export(None, of=late, with_settings=there, timeout=timedelta(seconds=2))
        found_late = export(None, "lookup", of=late, with_settings=there)

    assert [(type(outcome), outcome.code) for outcome in (*broken, slow)] == [(Unknown, "destination-no-answer")] * 3
    assert isinstance(found, Done)
    assert isinstance(found_late, Done)
    assert [entry.result for entry in shop.journal] == ["created", "updated"]
    assert shop.violations == []


def test_no_connection_is_a_retry():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    outcome = export(None, with_settings=settings(base_url=f"http://127.0.0.1:{port}"))

    assert isinstance(outcome, Retry)
    assert outcome.code == "destination-unreachable"


def test_a_key_with_a_slash_stays_one_key_over_tcp():
    shop = JetshopStandIn(shop_id="se 1")
    key = "2026/100245 å%"
    with in_thread(shop.serve()) as url:
        outcome = export(None, of=order({"/reference": key}), with_settings=settings(base_url=url, shop_id="se 1"))

    assert isinstance(outcome, Done)
    assert shop.exports(key) == 1


# --- the stand-in and the contract ----------------------------------------------------------------------------------

PATH = "/shops/1/orders/7/payment-information"
HEADERS = {"Idempotency-Key": "k" * 16}
AUTH = httpx.BasicAuth("stand-in", "stand-in")


def ask(shop: JetshopStandIn, method: str, path: str = PATH, **request: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=shop)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop.example", auth=AUTH) as client:
            return await client.request(method, path, **request)

    return asyncio.run(call())


def put(shop: JetshopStandIn, document: Any = DOCUMENT, path: str = PATH, **request: Any) -> httpx.Response:
    return ask(shop, "PUT", path, json=document, **({"headers": HEADERS} | request))


VIOLATIONS: dict[str, tuple[Callable[[JetshopStandIn], httpx.Response], str]] = {
    "unknown-path": (lambda shop: put(shop, path="/shops/1/orders/7"), "no such path and method"),
    "unknown-method": (lambda shop: ask(shop, "DELETE"), "no such path and method"),
    "query": (lambda shop: put(shop, path=f"{PATH}?a=b"), "the contract has no query"),
    "no-key": (lambda shop: put(shop, headers={}), "the header Idempotency-Key is missing"),
    "short-key": (lambda shop: put(shop, headers={"Idempotency-Key": "k"}), "the header Idempotency-Key is missing"),
    "no-json": (lambda shop: ask(shop, "PUT", content=b"{", headers=HEADERS), "the body is not JSON"),
    "undeclared": (lambda shop: ask(shop, "PUT", content=b"{}", headers=HEADERS), "not declared as application/json"),
    "missing-member": (lambda shop: put(shop, {}), "/ breaks `required`"),
    "unknown-member": (lambda shop: put(shop, DOCUMENT | {"note": CANARY}), "/ breaks `additionalProperties`"),
    "money": (lambda shop: put(shop, DOCUMENT | {"totals": {"payments": CANARY}}), "/totals/payments breaks `pattern`"),
    "body-of-get": (lambda shop: ask(shop, "GET", content=b"{}"), "this operation has no body"),
}


@pytest.mark.parametrize(("violate", "rule"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_the_stand_in_refuses_and_records_violations_of_the_contract(violate, rule):
    shop = JetshopStandIn()

    answer = violate(shop)

    assert answer.status_code == 400
    assert violations("Problem", answer.json()) == []
    assert any(rule in broken for broken in shop.violations[0].rules)
    assert CANARY not in repr(shop.violations)
    assert shop.journal == []


@pytest.mark.parametrize(
    ("auth", "path", "status"),
    [
        (None, PATH, 401),
        (httpx.BasicAuth("stand-in", "wrong"), PATH, 401),
        (AUTH, "/shops/2/orders/7/payment-information", 403),
    ],
    ids=["none", "wrong", "other-shop"],
)
def test_the_stand_in_checks_credentials(auth, path, status):
    shop = JetshopStandIn()

    answer = put(shop, path=path, auth=auth)

    assert answer.status_code == status
    assert (shop.journal, shop.violations) == ([], [])


def test_the_stand_in_creates_and_updates():
    shop, other = JetshopStandIn(), DOCUMENT | {"culture": "nb-NO"}

    answers = [put(shop), put(shop), put(shop, other, headers={"Idempotency-Key": "l" * 16})]

    assert [(answer.status_code, answer.json()["result"]) for answer in answers] == [
        (201, "created"),
        (200, "unchanged"),
        (200, "updated"),
    ]
    assert len({answer.json()["orderNumber"] for answer in answers}) == 1
    assert all(violations("ExportResult", answer.json()) == [] for answer in answers)
    assert ask(shop, "GET").json() == other
    assert shop.exports("7") == 2
    assert shop.journal[0] == Accepted(order_key="7", idempotency_key="k" * 16, document=DOCUMENT, result="created")


def test_the_stand_in_accepts_a_key_for_one_document_only():
    shop = JetshopStandIn()
    put(shop)

    assert put(shop, DOCUMENT | {"culture": "nb-NO"}).status_code == 409
    assert shop.exports("7") == 1


def test_the_stand_in_answers_404_for_an_unknown_order():
    assert ask(JetshopStandIn(), "GET").status_code == 404


def test_a_script_is_used_up_in_its_order_and_for_its_order_alone():
    shop = JetshopStandIn()
    shop.script("7", Fault(status=503, retry_after="3"), Fault(status=500))

    other = put(shop, path=PATH.replace("7", "8"), headers={"Idempotency-Key": "l" * 16})
    answers = [other, put(shop), put(shop), put(shop)]

    assert [answer.status_code for answer in answers] == [201, 503, 500, 201]
    assert answers[1].headers["retry-after"] == "3"


def test_a_scripted_status_has_no_effect_unless_it_acts_whatever_its_body():
    shop = JetshopStandIn()
    shop.script("7", Fault(status=200, body=b"{}"))

    answer = put(shop)

    assert (answer.status_code, answer.content, shop.exports("7")) == (200, b"{}", 0)


def test_the_stand_in_can_be_down_for_everything():
    shop = JetshopStandIn()
    shop.down = Fault(status=503)
    assert [put(shop).status_code, ask(shop, "GET").status_code] == [503, 503]

    shop.down = None

    assert put(shop).status_code == 201


@pytest.mark.parametrize(("fault", "effects"), [(DROPPED_BEFORE, 0), (DROPPED_AFTER, 1)], ids=["before", "after"])
def test_a_dropped_connection_looks_the_same_without_tcp_and_over_it(fault, effects):
    shop = JetshopStandIn()
    shop.script("7", fault, fault)

    with pytest.raises(httpx.RemoteProtocolError):
        put(shop)
    with in_thread(shop.serve()) as url, pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        httpx.put(url + PATH, json=DOCUMENT, headers=HEADERS, auth=AUTH, trust_env=False)

    assert shop.exports("7") == effects


def test_the_stand_in_stops_while_a_request_waits():
    arrived = asyncio.Event()

    class Announcing(JetshopStandIn):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            arrived.set()
            await super().__call__(scope, receive, send)

    async def walk() -> Any:
        shop = Announcing()
        shop.script("7", Fault(status=200, delay_seconds=3600))
        async with httpx.AsyncClient(auth=AUTH, trust_env=False) as client:
            async with shop.serve() as url:
                waiting = asyncio.create_task(client.put(url + PATH, json=DOCUMENT, headers=HEADERS))
                await arrived.wait()
            return (await asyncio.gather(waiting, return_exceptions=True))[0]

    assert isinstance(asyncio.run(walk()), httpx.TransportError)


def test_the_contract_says_whose_it_is_and_compiles():
    assert "project-defined, not published by Jetshop" in contract()["info"]["title"]
    for name in contract()["components"]["schemas"]:
        schema(name)
    assert violations("PaymentInformation", DOCUMENT) == []
