"""The conformance suites fail handlers that are wrong on purpose, and pass correct ones."""

import unittest
from typing import Any

import httpx
import pytest

from adapter.testing import CheckFailed, HandlerConformance, HookConformance, ValidationConformance
from tests import ROOT
from tests.test_layout import imported_names
from tests.testing.erp import SETTINGS, Export, ExportInTwoSteps, FakeErp
from tests.testing.wrong import WRONG_CHECKS, WRONG_EXPORTS, WRONG_HOOKS, FreightFee, StockCheck


class FakeStock:
    """Knows the stock of every order, and reserves."""

    def __init__(self) -> None:
        self.effects: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if "reserv" in request.url.path:
            self.effects.append("reserved")
        return httpx.Response(200, json={"stock": 7})


SYSTEMS = {HandlerConformance: FakeErp, ValidationConformance: FakeStock, HookConformance: FakeStock}


def suite(kind: Any, handler: Any, **members: Any) -> Any:
    return type("Suite", (kind,), {"handler": handler, "settings": SETTINGS, "system": SYSTEMS[kind], **members})


def failures(of: Any) -> dict[str, str]:
    return {each.name: each.failure for each in of.results() if each.failure}


class TestExport(HandlerConformance[Export]):
    settings = SETTINGS
    system = FakeErp


class TestExportInTwoSteps(HandlerConformance[ExportInTwoSteps]):
    settings = SETTINGS
    system = FakeErp


class TestStockCheck(ValidationConformance[StockCheck]):
    settings = SETTINGS
    system = FakeStock


class TestFreightFee(HookConformance[FreightFee]):
    settings = SETTINGS


WRONG = [
    pytest.param(kind, handler, check, id=f"{check}-{handler.__name__}")
    for kind, wrong in (
        (HandlerConformance, WRONG_EXPORTS),
        (ValidationConformance, WRONG_CHECKS),
        (HookConformance, WRONG_HOOKS),
    )
    for check, handlers in wrong.items()
    for handler in handlers
]


@pytest.mark.parametrize(("kind", "handler", "check"), WRONG)
def test_a_wrong_handler_fails_its_check(kind: Any, handler: Any, check: str) -> None:
    test = getattr(suite(kind, handler)(), f"test_{check.replace('-', '_')}")

    with pytest.raises(CheckFailed):
        test()


def test_every_check_has_a_handler_that_fails_it() -> None:
    of_hooks = HookConformance.checks.keys() - ValidationConformance.checks.keys()

    assert WRONG_EXPORTS.keys() == HandlerConformance.checks.keys()
    assert WRONG_HOOKS.keys() == of_hooks
    assert WRONG_CHECKS.keys() | HandlerConformance.checks.keys() == ValidationConformance.checks.keys()


def test_a_failure_says_what_happened_and_where() -> None:
    found = failures(suite(HandlerConformance, WRONG_EXPORTS["slow"][0]))

    assert found["slow"] == (
        'CheckFailed: an effect is there 2 times: "orders oKvRmTzQwYbLsXnHdJcFgPeAu" '
        "(POST /orders: no answer before the deadline, although the system acted)"
    )


def test_a_waived_check_is_skipped_with_its_reason() -> None:
    waived = suite(HandlerConformance, WRONG_EXPORTS["slow"][0], waivers={"slow": "the ERP ignores repeats"})

    with pytest.raises(unittest.SkipTest, match="waived: the ERP ignores repeats"):
        waived().test_slow()
    (result,) = (each for each in waived.results() if each.name == "slow")
    assert (result.waiver, result.failure is None) == ("the ERP ignores repeats", False)


def test_a_waiver_of_a_check_that_passes_fails() -> None:
    with pytest.raises(CheckFailed, match="refused is waived, but passes"):
        suite(HandlerConformance, Export, waivers={"refused": "once"})().test_refused()


@pytest.mark.parametrize(
    ("waivers", "says"),
    [({"slow": " "}, "needs a reason"), ({"slwo": "typo"}, "there is no check slwo; there are ")],
)
def test_a_waiver_has_a_reason_and_names_a_check(waivers: dict[str, str], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        suite(HandlerConformance, Export, waivers=waivers)


def test_the_kit_needs_no_pytest() -> None:
    for path in (ROOT / "adapter" / "testing").glob("*.py"):
        imported = imported_names(path.read_text("utf-8"), ("adapter", "testing"))

        assert not any(each.startswith("pytest") for each in imported)
