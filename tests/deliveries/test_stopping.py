"""`adapter.deliveries.dispatcher`: the lease, and the end of the service."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from adapter.deliveries import dispatcher as dispatcher_module
from adapter.ledger.lease import LEASE_MS
from adapter.plugin import Context, Done, NoSettings, Notification
from adapter.routing.routes import Route
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Counting, LooksUp, Plain, wait_forever
from tests.deliveries.harness import BEAT_MS, SECOND, Work, route, working

# --- the lease ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def leased(url: str, *routes: Route) -> AsyncIterator[Work]:
    """Run a dispatcher that renews its lease all the time."""
    async with working(url, *routes) as work:
        beating = asyncio.create_task(work.dispatcher.keep_lease())
        try:
            yield work
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


@pytest.mark.usefixtures("fast_heartbeat")
@asynchronous
async def test_the_lease_is_renewed_with_every_heartbeat(store_url: str) -> None:
    async with leased(store_url, route(Plain())) as work:
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - 1
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - 1
        await work.lease.two_beats()

        held = work.rows("SELECT id, lease_until FROM processes")
        assert held == [(work.lease.process_id, work.clock.now + LEASE_MS)]
        assert work.lease.until == work.clock.now + LEASE_MS
        assert work.lease.entered.qsize() == 1


@pytest.mark.usefixtures("fast_heartbeat")
@asynchronous
async def test_a_lost_lease_cancels_all_handlers_and_work_continues_under_a_new_one(store_url: str) -> None:
    handler = LooksUp(wait_forever, Done("shop-2"), Done("shop-1"))
    async with leased(store_url, route(handler)) as work:
        await work.owe("order-1")
        while not handler.calls:
            await work.a_turn()
        work.lease.entered.get_nowait()
        work.rows("DELETE FROM processes")

        record, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        assert (record.code, settlement) == ("lease-lost", None)
        await asyncio.wait_for(work.lease.entered.get(), PATIENCE)
        assert work.rows("SELECT id FROM processes") == [(work.lease.process_id,)]
        await work.owe("order-2")
        row = await work.settled()
        assert (row["order_id"], row["state"]) == ("order-2", "done")

        assert work.shown(1)["in_doubt"]
        ((due,),) = work.rows("SELECT next_at FROM lanes WHERE order_id = 'order-1'")
        work.move_to(due)
        row = await work.settled()
        assert handler.calls == ["deliver", "deliver", "lookup"]
        assert (row["order_id"], row["state"], row["reference"]) == ("order-1", "done", "shop-1")


@pytest.mark.usefixtures("fast_heartbeat")
@asynchronous
async def test_a_store_that_fails_until_the_lease_ends_cancels_only_if_it_is_shared(
    store_url: str,
) -> None:
    """No other process can take the lanes of a SQLite file."""
    handler = Counting()
    async with leased(store_url, route(handler, timeout=60 * SECOND)) as work:
        await work.owe()
        await handler.has_begun(1)
        await work.lease.two_beats()
        work.lease.failing = True
        work.clock.now = work.lease.until - BEAT_MS
        await work.lease.two_beats()
        assert work.dispatcher.running == 1
        assert work.lanes.settled.empty()

        work.clock.now = work.lease.until
        await work.lease.two_beats()
        if not work.store.shared:
            handler.go_on.set()
        row = await work.settled()

        if work.store.shared:
            assert (row["state"], row["in_doubt"], row["code"]) == ("dead", True, "lease-lost")
        else:
            assert (row["state"], row["in_doubt"]) == ("done", False)
        handler.go_on.set()


@pytest.mark.usefixtures("fast_heartbeat")
@asynchronous
async def test_a_store_that_recovers_before_the_lease_ends_cancels_nothing(store_url: str) -> None:
    handler = Counting()
    async with leased(store_url, route(handler, timeout=60 * SECOND)) as work:
        await work.owe()
        await handler.has_begun(1)
        work.lease.failing = True
        await work.lease.two_beats()
        work.clock.now = work.lease.until - BEAT_MS
        work.lease.failing = False
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - BEAT_MS
        await work.lease.two_beats()

        handler.go_on.set()

        assert (await work.settled())["state"] == "done"
        assert work.lease.entered.qsize() == 1


# --- stopping -----------------------------------------------------------------------------------------------------


@asynchronous
async def test_stopping_waits_for_running_attempts_and_claims_nothing(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler)) as work:
        await work.owe("order-1")
        await handler.has_begun(1)
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(seconds=PATIENCE)))
        await work.owe("order-2")

        handler.go_on.set()
        await stopping

        assert (work.shown(1)["state"], work.shown(2)["state"]) == ("done", "waiting")
        assert work.shown(2)["tries"] == 0


@asynchronous
async def test_attempts_longer_than_the_grace_are_cancelled_and_in_doubt(store_url: str) -> None:
    begun = threading.Event()

    async def hangs(_notification: Notification, _context: Context[NoSettings]) -> Done:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with working(store_url, route(LooksUp(hangs))) as work:
        await work.owe()
        await asyncio.to_thread(begun.wait, PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"], row["code"]) == ("waiting", True, "shutdown")


@asynchronous
async def test_a_lane_whose_handler_cannot_be_cancelled_stays_claimed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "CANCEL_GRACE", timedelta(milliseconds=1))

    entered, go_on = threading.Event(), threading.Event()

    async def blocks(_notification: Notification, _context: Context[NoSettings]) -> Done:
        entered.set()
        go_on.wait(PATIENCE)
        return Done()

    async with working(store_url, route(LooksUp(blocks))) as work:
        await work.owe()
        await asyncio.to_thread(entered.wait, PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"], row["attempts"]) == ("waiting", True, [])
        go_on.set()


@asynchronous
async def test_a_lane_claimed_while_the_service_stops_is_released(store_url: str) -> None:
    """Otherwise an order that was never sent would be in doubt, and might wait for a person."""
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.lanes.keep_back = asyncio.Event()
        await work.owe()
        while not await asyncio.wait_for(work.lanes.claimed.get(), PATIENCE):
            pass
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(0)))
        await asyncio.sleep(0)
        work.lanes.keep_back.set()

        await stopping

        assert work.dispatcher.running == 0
        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)


@asynchronous
async def test_a_lane_whose_order_is_being_read_while_the_service_stops_is_released(store_url: str) -> None:
    handler, reading, go_on = Plain(), asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        reading.set()
        await go_on.wait()

    async with working(store_url, route(handler)) as work:
        work.norce.answers = [slowly]
        await work.owe()
        await reading.wait()
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(seconds=PATIENCE)))
        await asyncio.sleep(0)
        go_on.set()

        await stopping

        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)
