"""The three handlers: their conformance, and what is special about them."""

import pytest

from adapter.plugin import Order, Reject
from adapter.testing import NetworkFault, ask, notification, order, play
from norce_adapter_erp.conformance import ExportConformance, FreightConformance, StockConformance
from norce_adapter_erp.export import ErpExport
from norce_adapter_erp.freight import Freight
from norce_adapter_erp.stand_in import StandIn
from norce_adapter_erp.stock import StockCheck

EXPORT = ExportConformance.settings
STOCK = StockConformance.settings
BANDS = {"bands": [{"cart": 0, "freight": 79}, {"cart": 500, "freight": 0}]}


class TestExport(ExportConformance):
    pass


class TestStock(StockConformance):
    pass


class TestFreight(FreightConformance):
    pass


def test_an_order_is_created_and_released() -> None:
    erp = StandIn()

    played = play(ErpExport, notification(), erp, settings=EXPORT)

    assert played.outcome.reference == "SO-1001"
    document = erp.orders["SO-1001"]
    assert (document["status"], document["company"], document["terms"]) == ("released", 7, "K30")
    assert (document["total"], len(document["lines"])) == ("1878.1", 3)
    assert [each["name"] for each in document["freight"]] == ["PostNord MyPack Collect"]


def test_a_draft_of_a_broken_attempt_is_released_and_not_created_again() -> None:
    erp = StandIn()

    # The requests are: find, create, release. The answer to `create` gets lost.
    played = play(ErpExport, notification(), erp, settings=EXPORT, faults={1: NetworkFault.RESET_AFTER})

    assert [each.kind for each in played.attempts] == ["deliver", "lookup", "deliver"]
    assert (played.reason, len(erp.orders), erp.effects[-1]) == ("delivered", 1, "released")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"/payments": []}, "erp-terms"),
        ({"/payments/1/adapterId": "another_adapter"}, "erp-terms"),
        ({"/total": {}}, "erp-total"),
        ({"/cart/items/0/quantity": "one"}, "erp-order"),
    ],
)
def test_an_order_that_the_erp_cannot_take_is_rejected_unsent(changes: dict, code: str) -> None:
    erp = StandIn()

    played = play(ErpExport, notification(order(changes)), erp, settings=EXPORT)

    assert isinstance(played.outcome, Reject)
    assert (played.outcome.code, erp.effects) == (code, [])


def test_articles_that_are_sold_out_are_named() -> None:
    erp = StandIn()
    erp.stock = {"SOCK-3P": 1, "BOOK-77": 0}

    asked = ask(StockCheck, order({"/cart/items/2/productType": "digital"}), erp, settings=STOCK)

    assert [(each.code, each.message) for each in asked.problems] == [
        ("item-out-of-stock", "Article SOCK-3P is sold out.")
    ]


def freight(of: Order) -> list[float]:
    asked = ask(Freight, of, settings=BANDS, kind="hook", target="/shippings")
    return [each["total"]["includingVat"] for each in asked.order["shippings"]]


def test_the_freight_depends_on_the_cart_and_a_removed_shipping_keeps_its_own() -> None:
    assert freight(order()) == [99, 0]
    assert freight(order({"/cart/total/includingVat": 499.99})) == [99, 79]


def test_the_freight_has_the_vat_of_its_shipping() -> None:
    asked = ask(Freight, order({"/cart/total/includingVat": 10}), settings=BANDS, kind="hook", target="/shippings")

    assert asked.order["shippings"][1]["total"] == {"includingVat": 79, "excludingVat": 63.2}
    assert [each.path for each in asked.patches] == ["/shippings"]
