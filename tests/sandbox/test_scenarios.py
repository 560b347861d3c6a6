"""`play` against adapters that do it wrong: what is lost, doubled or refused is found, and told without an order."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapter.sandbox.scenarios import SCENARIOS, Adapter, Shop, play, promise

Ledger = Callable[[list[str]], list[dict[str, Any]]]


def delivery(order_id: str, route: str = "export", reason: str = "delivered") -> dict[str, Any]:
    state = "done" if reason == "delivered" else "dead"
    whose = {"merchant": "norce", "channel": "1"}
    return {"order_id": order_id, "route": route, "state": state, "reason": reason, **whose}


def played(name: str, ledger: Ledger, **settings: Any) -> dict[str, Any]:
    """The scenario with an adapter that registers nothing, and has these deliveries of the orders that were made."""

    async def on_stage() -> dict[str, Any]:
        def deliveries(state: str | None) -> list[dict[str, Any]]:
            return [each for each in ledger(list(shop.whose)) if state in (None, each["state"])]

        shops = (("norce", "1"),)
        shop = Shop("a token", Adapter(shops=shops, registrations=lambda *_: (), deliveries=deliveries))
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
        (lambda ids: [*once(ids[1:]), delivery(ids[0], reason="rejected")], 0, 0, "outcomes: "),
    ],
    ids=["each once", "others' too", "one is lost", "one is doubled", "one is dead"],
)
def test_a_burst_counts_what_the_ledger_has(ledger: Ledger, lost: int, doubled: int, says: str | None) -> None:
    summary = played("burst", ledger, orders=5)

    assert (summary["lost"], summary["doubled"]) == (lost, doubled)
    assert summary["unmet"] is None if says is None else summary["unmet"].startswith(says)
    assert summary["orders"] == {"completed": 5}


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_an_adapter_that_says_nothing_and_does_nothing_passes_no_scenario(name: str) -> None:
    assert played(name, lambda _ids: [])["unmet"]


def test_a_delivery_of_an_order_that_was_declined_is_found() -> None:
    assert played("declined-after-acceptance", once)["unmet"] == "deliveries: ['delivered'], not []"


def test_every_scenario_has_its_promise_in_one_line() -> None:
    assert all(promise(name).endswith(".") and "\n" not in promise(name) for name in SCENARIOS)
