"""`play` against services that lose, double or refuse orders."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from adapter.identifiers import Channel
from adapter.sandbox.scenarios import SCENARIOS, ServiceUnderTest, Shop, description, play
from tests import ROOT

Ledger = Callable[[list[str]], list[dict[str, Any]]]


def delivery(order_id: str, route: str = "export", reason: str = "delivered") -> dict[str, Any]:
    state = "done" if reason == "delivered" else "dead"
    whose = {"merchant": "norce", "channel": "1"}
    return {"order_id": order_id, "route": route, "state": state, "reason": reason, **whose}


def played(name: str, ledger: Ledger, **settings: Any) -> dict[str, Any]:
    """Play a scenario with a service that registers nothing and has these deliveries."""

    async def on_stage() -> dict[str, Any]:
        def deliveries(state: str | None) -> list[dict[str, Any]]:
            return [each for each in ledger(list(shop.channels)) if state in (None, each["state"])]

        channels = (Channel("norce", "1"),)
        service = ServiceUnderTest(channels=channels, registrations=lambda *_: (), deliveries=deliveries)
        shop = Shop("a token", service)
        async with shop:
            return await play(name, shop, **settings)

    return asyncio.run(on_stage())


def once(order_ids: list[str]) -> list[dict[str, Any]]:
    return [delivery(each) for each in order_ids]


@pytest.mark.parametrize(
    ("ledger", "lost", "doubled", "says"),
    [
        (once, 0, 0, None),
        (lambda ids: [*once(ids), delivery("of-somebody-else"), delivery("of-somebody-else")], 0, 0, None),
        (lambda ids: once(ids)[1:], 1, 0, "deliveries: "),
        (lambda ids: [*once(ids), delivery(ids[0])], 0, 1, "deliveries: "),
        (lambda ids: [*once(ids[1:]), delivery(ids[0], reason="rejected")], 0, 0, "reasons: "),
    ],
    ids=["each once", "with others", "one is lost", "one is doubled", "one is dead"],
)
def test_a_burst_finds_lost_and_doubled_orders(ledger: Ledger, lost: int, doubled: int, says: str | None) -> None:
    summary = played("burst", ledger, orders=5)

    assert (summary["lost"], summary["doubled"]) == (lost, doubled)
    assert summary["unmet"] is None if says is None else summary["unmet"].startswith(says)
    assert summary["orders"] == {"completed": 5}


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_service_that_does_nothing_passes_no_scenario(name: str) -> None:
    assert played(name, lambda _ids: [])["unmet"]


def test_a_delivery_of_a_declined_order_is_found() -> None:
    assert played("declined-after-acceptance", once)["unmet"] == "deliveries: ['delivered'], not []"


def test_every_scenario_is_described_in_one_line() -> None:
    assert all(description(name).endswith(".") and "\n" not in description(name) for name in SCENARIOS)


# --- an order of the author's own -------------------------------------------------------------------------------------


def bought(name: str, sample: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Play a scenario with copies of a sample; return the result and the orders that Norce has then."""

    async def on_stage() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def deliveries(state: str | None) -> list[dict[str, Any]]:
            completed = [
                each["id"] for each in shop.simulator.orders() if each["state"]["currentStatus"] == "completed"
            ]
            whose = {each: shop.channels[each]._asdict() for each in completed}
            found = [
                delivery(each) | {"merchant": its["merchant"], "channel": its["name"]} for each, its in whose.items()
            ]
            return [each for each in found if state in (None, each["state"])]

        channels = (Channel("norce", "1"), Channel("fjallboden", "se-b2c"))
        service = ServiceUnderTest(channels=channels, registrations=lambda *_: (), deliveries=deliveries)
        shop = Shop("a token", service, sample=sample)
        async with shop:
            return await play(name, shop, **settings), shop.simulator.orders()

    return asyncio.run(on_stage())


def completed_order() -> dict[str, Any]:
    order: dict[str, Any] = json.loads((ROOT / "adapter/sandbox/demo/orders/order-completed.json").read_text("utf-8"))
    return order


def test_an_order_of_the_author_keeps_its_payments_of_any_adapter() -> None:
    sample = completed_order()

    summary, [order] = bought("burst", sample, orders=1)

    assert summary["unmet"] is None
    assert [(each["adapterId"], each["amount"]) for each in order["payments"]] == [
        ("awardit_adapter", 200.0),
        ("klarna_checkout_adapter", 1678.1),
    ]
    assert [each["state"] for each in order["shippings"]] == ["confirmed"]
    assert (order["total"], order["customer"], order["attributes"]) == tuple(
        sample[name] for name in ("total", "customer", "attributes")
    )
    assert (order["merchant"], order["channel"]) == ("fjallboden", "se-b2c")
    assert {order["id"], order["reference"]}.isdisjoint({sample["id"], sample["reference"]})
    assert order["hooks"] == []


def test_an_order_of_the_author_without_payments_is_paid() -> None:
    _, [order] = bought("burst", completed_order() | {"payments": []}, orders=1)

    assert [(each["amount"], each["state"]) for each in order["payments"]] == [(1878.1, "reserved")]


@pytest.mark.parametrize("name", ["declined-after-acceptance", "captured-after-completion", "two-merchants"])
def test_other_scenarios_take_an_order_of_the_author(name: str) -> None:
    summary, _ = bought(name, completed_order())

    # This service has no registrations, so Norce sends no events.
    assert summary["unmet"] is None or summary["unmet"].startswith("events: ")
