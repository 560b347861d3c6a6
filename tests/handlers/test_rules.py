"""The handlers `rules` and `log`."""

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from adapter.handlers.log import LogHandler
from adapter.handlers.patch import PatchHandler
from adapter.handlers.rules import Rules, RulesSettings
from adapter.orders import Order, read_order
from adapter.plugin import (
    Done,
    HookHandler,
    Patch,
    Problem,
    Refuse,
    Undecided,
    ValidationHandler,
)
from adapter.testing import context, notification
from tests import ORDERS

COMPLETED = (ORDERS / "order-completed.json").read_bytes()
PERSON = {
    "scope": "/customer/billing/nationalIdentificationNumber",
    "schema": {"type": "string"},
    "code": "national-id-missing",
    "message": "We need your national identification number.",
}
SWEDISH = {"scope": "/country", "schema": {"const": "SE"}, "code": "not-swedish", "message": "We sell in Sweden only."}
LOYAL = {"scope": "/customer/loyalty", "code": "not-a-member", "message": "This sale is for members."}


def rules(*rules: dict[str, Any]) -> RulesSettings:
    return msgspec.convert({"rules": rules}, RulesSettings)


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    debug = warning = error = info


def validate(order: Order, *given: dict[str, Any]) -> list[Problem]:
    return asyncio.run(Rules().validate(order, context(Rules, rules(*given))))


def change(order: Order, *given: dict[str, Any]) -> list[Patch]:
    return asyncio.run(Rules().change(order, context(Rules, rules(*given))))


def test_rules_that_hold_report_no_problem():
    assert validate(read_order(COMPLETED), SWEDISH, LOYAL) == []


def test_broken_rules_are_reported_in_order():
    order = read_order(b'{"id": "o", "country": "NO", "customer": {"billing": {}}}')

    problems = validate(order, PERSON, SWEDISH, LOYAL)

    assert [problem.code for problem in problems] == ["national-id-missing", "not-swedish", "not-a-member"]
    assert problems[0].message == "We need your national identification number."


@pytest.mark.parametrize(
    ("billing", "holds"),
    [
        ({}, False),
        (None, False),
        ({"nationalIdentificationNumber": None}, False),
        ({"nationalIdentificationNumber": "1"}, True),
    ],
    ids=["absent", "no-address", "null", "there"],
)
def test_a_rule_with_a_type_requires_the_member(billing, holds):
    order = read_order(json.dumps({"id": "o", "customer": {"billing": billing}}).encode())

    assert (validate(order, PERSON) == []) is holds


def test_a_rule_without_a_schema_holds_for_null_but_not_for_a_missing_member():
    assert validate(read_order(b'{"customer": {"loyalty": null}}'), LOYAL) == []
    assert len(validate(read_order(b'{"customer": {}}'), LOYAL)) == 1


def test_an_undecided_rule_raises():
    """A scope that leads through an array cannot be evaluated."""
    in_an_array = SWEDISH | {"scope": "/payments/0/state", "code": "unpaid"}

    with pytest.raises(Undecided) as raised:
        validate(read_order(COMPLETED), in_an_array)

    assert str(raised.value) == "the condition at /payments/0/state could not be evaluated: scope_in_array"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scope": "country"}, "scope_syntax"),
        ({"scope": ""}, "scope_empty"),
        ({"schema": {"type": "text"}}, "schema_invalid"),
        ({"schema": {"$ref": "https://example.com/schema"}}, "ref_remote"),
        ({"code": "Not kebab"}, "code"),
        ({"message": ""}, "length"),
        ({"message": {}}, "add it as default"),
        ({"message": {"sv-SE": "Bara i Sverige."}}, "add it as default"),
        ({"message": {"default": "x", "sv-SE": ""}}, "length"),
        ({"message": {"default": "x", "svenska": "y"}}, "culture such as sv-SE"),
        ({"message": {"default": "x", "sv_SE": "y"}}, "culture such as sv-SE"),
        ({"message": {"default": "x", "sv-SE": "y", "sv-se": "z"}}, "two texts for sv-se"),
    ],
    ids=[
        "scope", "no-scope", "schema", "remote", "code", "message",
        "no-messages", "no-default", "empty", "no-culture", "underscore", "twice",
    ],
)  # fmt: skip
def test_an_invalid_rule_is_refused_with_the_settings(change, text):
    with pytest.raises(msgspec.ValidationError, match=r"\$\.rules\[1\]") as raised:
        rules(PERSON, SWEDISH | change)

    assert text in str(raised.value)


TEXTS = {"sv-SE": "Sverige", "sv-FI": "Finland", "en": "English", "en-GB": "British", "default": "Other"}


@pytest.mark.parametrize("culture", ['"sv-SE"', "7", "null"])
def test_a_broken_rule_does_not_decode_the_view_of_the_order(culture: str) -> None:
    raw = b'{"id": "o", "culture": %s}' % culture.encode()
    order = Order(raw, json.loads(raw))

    assert [problem.code for problem in validate(order, SWEDISH)] == ["not-swedish"]
    assert "id" not in order.__dict__


@pytest.mark.parametrize(
    ("culture", "text"),
    [
        ("sv-FI", "Finland"),
        ("SV-fi", "Finland"),
        ("sv", "Sverige"),
        ("sv-NO", "Sverige"),
        ("en-US", "English"),
        ("en-GB", "British"),
        ("de-DE", "Other"),
        ("", "Other"),
        (None, "Other"),
        (7, "Other"),
        ("default", "Other"),
    ],
)
def test_the_culture_of_the_order_chooses_the_message(culture, text):
    """Its own message, then that of its language, then the default."""
    order = read_order(json.dumps({"id": "o", "culture": culture}).encode())
    spoken = SWEDISH | {"message": TEXTS}

    assert validate(order, spoken) == [Problem("not-swedish", text)]
    with pytest.raises(Refuse, match=f"not-swedish: {text}"):
        change(order, spoken)


def test_a_change_that_meets_the_rules_is_accepted():
    assert change(read_order(COMPLETED), SWEDISH, LOYAL) == []


def test_a_change_is_refused_with_the_first_rule_that_does_not_hold():
    order = read_order(b'{"id": "o", "country": "NO", "customer": {"loyalty": 1}}')
    undecided = SWEDISH | {"scope": "/payments/0/state", "code": "unpaid"}

    with pytest.raises(Refuse) as refused:
        change(order, LOYAL, SWEDISH, PERSON, undecided)

    assert (refused.value.code, refused.value.message) == ("not-swedish", "We sell in Sweden only.")
    assert refused.value.inner is None


def test_an_undecided_rule_raises_for_a_change():
    with pytest.raises(Undecided):
        change(read_order(COMPLETED), SWEDISH | {"scope": "/payments/0/state"}, LOYAL)


def pauses(coroutine: Coroutine[Any, Any, Any]) -> int:
    """Run a coroutine that only pauses, and count its pauses."""
    number = 0
    try:
        while coroutine.send(None) is None:
            number += 1
    except StopIteration:
        return number
    raise AssertionError("it waits for something")


def order_of(size: int) -> Order:
    return read_order(b'{"id": "o", "country": "SE", "filler": "%s"}' % (b"x" * (size - 42)))


@pytest.mark.parametrize(
    ("size", "number", "expected"),
    [(5_000, 30, 0), (5_000, 100, 0), (100_000, 30, 5), (600_000, 30, 29), (2**20, 30, 29), (2**20, 1, 0)],
)
def test_rules_pause_between_each_other_on_a_large_order(size: int, number: int, expected: int):
    """At most 512 KiB are evaluated between two pauses, or one rule."""
    settings = context(Rules, rules(*[SWEDISH] * number))

    assert len(order_of(size).raw) == size
    assert pauses(Rules().validate(order_of(size), settings)) == expected
    assert pauses(Rules().change(order_of(size), settings)) == expected


def test_changes_pause_between_each_other_on_a_large_order():
    change = {"scope": "/country", "path": "/country", "value": "SE"}
    settings = context(PatchHandler, {"changes": [change] * 30})

    assert pauses(PatchHandler().change(order_of(2**20), settings)) == 29
    assert pauses(PatchHandler().change(order_of(5_000), settings)) == 0


def test_one_name_serves_validations_and_hooks():
    assert issubclass(Rules, ValidationHandler)
    assert issubclass(Rules, HookHandler)
    assert Rules.computes
    assert Rules.settings_type is RulesSettings


def test_there_is_at_least_one_rule():
    with pytest.raises(msgspec.ValidationError, match="length >= 1"):
        rules()


def test_conditions_are_compiled_once():
    settings = rules(PERSON)

    assert settings.rules[0].compiled is settings.rules[0].compiled


def seen(order: Order) -> tuple[Done, list[tuple[str, dict[str, Any]]]]:
    log = Lines()
    made = replace(context(LogHandler), log=log)
    return asyncio.run(LogHandler().deliver(notification(order), made)), log.lines


def test_log_writes_one_line_without_the_order():
    outcome, lines = seen(read_order(COMPLETED))

    assert outcome == Done()
    assert lines == [("order_seen", {"callback": "order-status", "status": "completed"})]


def test_log_writes_only_states_that_norce_has():
    _, lines = seen(
        read_order(
            b'{"id": "o", "merchant": "fjallboden", "channel": "1", "state": {"currentStatus": "19 Main Street"}}'
        )
    )

    assert lines[0][1]["status"] == "other"
