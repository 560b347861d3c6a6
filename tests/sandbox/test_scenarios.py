"""`play` against services that lose, double or refuse orders."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.identifiers import Channel
from adapter.sandbox.scenarios import SCENARIOS, ServiceUnderTest, Shop, description, play

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
