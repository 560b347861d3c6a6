"""The builders of the test kit."""

import asyncio
from datetime import timedelta

import httpx
import pytest

from adapter.plugin import Misconfigured, Retry
from adapter.testing import ABSENT, FakeNorce, HandClock, context, notification, order
from adapter.testing.bundled import RulesConformance
from tests.testing.erp import SETTINGS, Export, FakeErp


def test_an_order_is_a_complete_one_with_the_given_changes() -> None:
    changed = order({"/currency": "NOK", "/cart/items/0/name": "Jacket", "/customer/billing": ABSENT})

    assert (changed.currency, changed.cart.items[0].name, changed.customer.billing.email) == ("NOK", "Jacket", None)
    assert (order().currency, order().cart.items[1].quantity) == ("SEK", 2)


@pytest.mark.parametrize("base", ['{"id": "mine"}', b'{"id": "mine"}', {"id": "mine"}, order({"/id": "mine"})])
def test_an_order_may_be_the_authors_own(base: object) -> None:
    built = order({"/currency": "EUR"}, base=base)

    assert (built.id, built.currency) == ("mine", "EUR")


def test_a_notification_is_about_its_order() -> None:
    about = order({"/merchant": "mine"})

    built = notification(about, received=None)

    assert (built.merchant, built.order, built.received, built.raw) == ("mine", about, None, about.raw)


def test_a_context_has_the_clients_of_the_service() -> None:
    erp, clock = FakeErp(), HandClock()
    made = context(Export, SETTINGS, erp, clock=clock)

    done = asyncio.run(Export().deliver(notification(), made))

    assert done.reference == "N-1"
    with pytest.raises(Misconfigured, match="host-not-allowed"):
        asyncio.run(made.http.get("https://elsewhere.example"))
    clock.move(timedelta(seconds=30))
    with pytest.raises(Retry, match="no-time-left"):
        asyncio.run(made.http.get("https://erp.example/orders/1"))


def test_a_context_reads_and_changes_orders_at_norce() -> None:
    about = order({"/id": "o-1"})
    norce = FakeNorce(about)

    async def work() -> str | None:
        orders = context(Export, SETTINGS, of=about, norce=norce).orders
        await orders.set_attributes("o-1", {"erp": "N-1"})
        return (await orders.read("o-1")).attributes["erp"]

    assert asyncio.run(work()) == "N-1"
    assert norce.order("o-1")["attributes"]["erp"] == "N-1"


def test_settings_are_read_as_from_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"^colour is not a key here.*; url must.*https:.*; token is a secret"):
        context(Export, {"url": "ftp://erp", "token": 7, "colour": "red"})


def test_a_handler_that_only_computes_reaches_nothing() -> None:
    made = context(RulesConformance.handler, RulesConformance.settings, FakeErp())

    with pytest.raises(Misconfigured, match="computes-only"):
        asyncio.run(made.http.get("https://erp.example"))


def test_a_context_refuses_a_connection_without_a_fake_system() -> None:
    async def work() -> httpx.Response:
        return await context(Export, SETTINGS).http.get("https://erp.example/orders/1")

    with pytest.raises(Retry, match="destination-unreachable"):
        asyncio.run(work())
