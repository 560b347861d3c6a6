"""`adapter.deliveries.dispatcher`: handlers that block their thread."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from adapter.ledger.dead_letters import retry_dead_letters
from adapter.ledger.selection import LaneDelivery
from adapter.ledger.settlement import Reason
from adapter.plugin import Context, Done, NoSettings, Notification, Retry
from adapter.routing.routes import Route
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Blocks, LooksUp, Plain, wait_forever
from tests.deliveries.harness import NOON, SHORTLY, Work, route, working
from tests.ledgers import POLICY

HELD = timedelta(seconds=1)


@asynccontextmanager
async def watched(url: str, *routes: Route, **more: Any) -> AsyncIterator[Work]:
    async with working(url, *routes, patience=HELD, **more) as work:
        watching = asyncio.create_task(work.runner.watch(every=timedelta(milliseconds=10)))
        try:
            yield work
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@asynchronous
async def test_a_blocked_delivery_is_a_dead_letter_whose_lane_stays_claimed(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY, concurrency=2), slots=1) as work:
        await work.owe("order-1")
        row = await work.settled()
        assert (row["state"], row["reason"], row["in_doubt"]) == ("dead", "unknown", True)
        assert [each["outcome"] for each in row["attempts"]] == ["blocked"]
        assert work.rows("SELECT holder, next_at FROM lanes") == [(work.lease.process_id, None)]

        await work.owe("order-2")  # in the only slot, on the new loop
        row = await work.settled()
        assert (row["order_id"], row["state"], row["tries"]) == ("order-2", "done", 1)

        await holds.ends()
        await asyncio.wait_for(work.lanes.released.get(), PATIENCE)
        assert work.rows("SELECT holder, next_at, settled FROM lanes WHERE order_id = 'order-1'") == [(None, None, 0)]
        assert (work.shown(1)["state"], len(work.shown(1)["attempts"])) == ("dead", 1)

    (line,) = [line for line in lines() if line["event"] == "plugins_loop_replaced"]
    assert (line["route"], line["level"]) == ("export", "error")
    labels = {"loop": "plugins-deliveries", "route": "export"}
    assert work.metrics.registry.get_sample_value("norce_adapter_plugin_loops_replaced_total", labels) == 1


@asynchronous
async def test_a_blocked_lane_counts_for_the_concurrency_of_its_queue(store_url: str) -> None:
    holds, other = Blocks(), Plain()
    routes = route(Plain(holds), timeout=SHORTLY, concurrency=1), route(other, name="other")
    async with watched(store_url, *routes, slots=1) as work:
        await work.owe("order-1")
        await work.settled()
        await work.owe("order-2")
        await work.owe("order-3", route="other")
        row = await work.settled()
        assert row["order_id"] == "order-3"
        assert await work.a_turn() == []

        await holds.ends()
        row = await work.settled()

        assert (row["order_id"], row["state"]) == ("order-2", "done")


@asynchronous
async def test_a_queue_whose_only_lane_is_blocked_starts_another_beyond_the_slots(store_url: str) -> None:
    holds = Blocks()
    slow = Plain(wait_forever)
    routes = route(Plain(holds), timeout=SHORTLY, concurrency=2), route(slow, name="slow")
    async with watched(store_url, *routes, slots=1) as work:
        await work.owe("order-1")
        await work.settled()
        await work.owe("order-2", route="slow")
        await slow.has_begun()
        await work.owe("order-3")

        row = await work.settled()

        assert (row["order_id"], row["state"]) == ("order-3", "done")
        await holds.ends()


@asynchronous
async def test_a_blocked_lane_takes_no_probe_of_its_queue(store_url: str) -> None:
    holds = Blocks()
    handler = Plain(holds, Retry("destination-busy"), Retry("destination-busy"))
    policy = replace(POLICY, after_failures=2)
    async with watched(store_url, route(handler, timeout=SHORTLY, concurrency=2), policy=policy) as work:
        for order in ("order-1", "order-2", "order-3"):
            await work.owe(order)
            await work.settled()
        await work.owe("order-4")

        work.move_to(work.paused_until())
        row = await work.settled()

        assert (row["order_id"], row["state"]) == ("order-4", "done")
        assert work.pauses() == {}
        await holds.ends()


@asynchronous
async def test_other_handlers_on_an_abandoned_loop_are_in_doubt_and_do_nothing_more(store_url: str) -> None:
    holds, began, effects = Blocks(), asyncio.Event(), []
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def waits(_notification: Notification, _context: Context[NoSettings]) -> Done:
        loop.call_soon_threadsafe(began.set)
        await go_on.wait()
        effects.append("sent")
        return Done()

    async def wakes_it_and_holds(notification: Notification, context: Context[NoSettings]) -> Done:
        go_on.set()
        return await holds(notification, context)

    neighbour = LooksUp(waits, Done("shop-7"))
    holder = route(Plain(wakes_it_and_holds), name="holder", timeout=SHORTLY)
    async with watched(store_url, route(neighbour), holder) as work:
        await work.owe("order-1")
        await began.wait()
        await work.owe("order-2", route="holder")
        rows_ = {row["order_id"]: row for row in [await work.settled(), await work.settled()]}
        assert rows_["order-2"]["reason"] == "unknown"
        beside = rows_["order-1"]
        assert (beside["state"], beside["in_doubt"], beside["code"]) == ("waiting", True, "loop-abandoned")
        await holds.ends()
        assert effects == []

        work.move_to(beside["next_at"])
        row = await work.settled()

        assert neighbour.calls == ["deliver", "lookup"]
        assert (row["state"], row["reference"]) == ("done", "shop-7")
        assert effects == []


@asynchronous
async def test_a_delivery_that_had_not_begun_on_an_abandoned_loop_runs_on_the_next(store_url: str) -> None:
    holds, waiting = Blocks(), Plain()
    routes = route(Plain(holds), name="holder", timeout=SHORTLY), route(waiting)
    async with watched(store_url, *routes) as work:
        await work.owe("order-1", route="holder")
        await holds.has_begun()
        await work.owe("order-2")
        settled = [await work.settled() for _ in range(3)]

        row = next(row for row in settled if row["state"] == "done")
        assert [each["outcome"] for each in row["attempts"]] == ["released", "done"]
        assert (row["order_id"], row["tries"], row["in_doubt"]) == ("order-2", 1, False)
        await holds.ends()
        assert waiting.calls == ["deliver"]


@asynchronous
async def test_stopping_does_not_wait_for_a_blocked_thread(store_url: str) -> None:
    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY)) as work:
        await work.owe()
        await work.settled()

        async with asyncio.timeout(PATIENCE):
            await work.dispatcher.stop(timedelta(seconds=PATIENCE * 5))

        assert (work.shown()["state"], work.shown()["reason"]) == ("dead", "unknown")
        assert work.rows("SELECT holder FROM lanes") == [(work.lease.process_id,)]
    assert not holds.go_on.is_set()
    await holds.ends()


@asynchronous
async def test_a_dead_letter_is_not_retried_while_its_handler_still_runs(store_url: str) -> None:
    def retry(connection: Connection, items: Sequence[None]) -> list[int]:
        return [
            retry_dead_letters(connection, [LaneDelivery(1, 1)], NOON, reasons=Reason, ends_doubt=True) for _ in items
        ]

    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY)) as work:
        await work.owe()
        await work.settled()
        assert await work.store.write(retry, None) == 0

        await holds.ends()
        await asyncio.wait_for(work.lanes.released.get(), PATIENCE)
        assert await work.store.write(retry, None) == 1
        work.dispatcher.wake()
        row = await work.settled()

        assert (row["state"], row["tries"]) == ("done", 1)
