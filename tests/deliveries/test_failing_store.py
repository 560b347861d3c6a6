"""`adapter.deliveries.dispatcher`: a store that fails, also after a commit."""

import asyncio
from datetime import timedelta

import pytest

from adapter.plugin import Done, Reject, Retry, Unknown
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Counting, LooksUp, Plain, Step
from tests.deliveries.harness import route, working


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_settling_is_retried_until_the_store_recovers(store_url: str) -> None:
    handler = Plain(Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        work.lanes.failures["settle"] = 3
        await work.owe()

        row = await work.settled()

        assert handler.calls == ["deliver"]
        assert (row["state"], row["reference"]) == ("done", "shop-7")


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_claiming_is_retried_until_the_store_recovers(store_url: str) -> None:
    async with working(store_url, route(Plain())) as work:
        work.lanes.failures["claim"] = 3
        await work.owe()

        assert (await work.settled())["state"] == "done"


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_an_attempt_that_is_never_stored_leaves_its_lane_in_doubt(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await handler.has_begun(1)
        work.lanes.failures["settle"] = 1_000_000
        handler.go_on.set()

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"]) == ("waiting", True)


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_claims_committed_without_an_answer_run_once_and_without_doubt(store_url: str) -> None:
    busy, handler = Counting(), LooksUp()
    async with working(store_url, route(busy), route(handler, name="other")) as work:
        await work.owe("order-1")
        await busy.has_begun(1)
        work.lanes.left_open["claim"] = 1
        await work.owe("order-2", route="other")
        await work.owe("order-3", route="other")

        rows_ = [await work.settled(), await work.settled()]

        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "deliver"]
        assert [context.attempt for _, context in handler.seen] == [1, 1]
        assert [(row["state"], row["tries"], len(row["attempts"])) for row in rows_] == [("done", 1, 1)] * 2
        busy.go_on.set()  # the running attempt has kept its lane
        row = await work.settled()
        assert (row["order_id"], row["state"], row["tries"]) == ("order-1", "done", 1)
        assert busy.peak == 1


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_claim_committed_without_an_answer_keeps_earlier_doubt(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        work.lanes.left_open["claim"] = 1
        work.move_to(row["next_at"])
        row = await work.settled()

        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "lookup"]
        assert (row["state"], row["tries"]) == ("done", 2)


@asynchronous
async def test_stopping_releases_claims_committed_without_an_answer(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        await work.a_turn()  # the next claim follows only a wake-up
        work.lanes.left_open["claim"] = 1
        await work.owe()
        await asyncio.wait_for(work.lanes.lost.get(), PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)
        assert work.rows("SELECT holder FROM lanes") == [(None,)]


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_lane_whose_attempt_met_our_own_bug_stays_in_doubt(
    store_url: str,
) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.lanes.mistakes.add("order-1")
        await work.owe("order-1")
        while not handler.calls or work.dispatcher.running:
            await work.a_turn()
        work.lanes.left_open["claim"] = 1
        await work.owe("order-2")
        row = await work.settled()
        await work.quiet()

        assert (row["order_id"], row["state"]) == ("order-2", "done")
        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "deliver"]
        assert (work.shown(1)["state"], work.shown(1)["in_doubt"]) == ("waiting", True)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("step", [Done("shop-7"), Retry("busy"), Reject("no-shop")], ids=repr)
@asynchronous
async def test_an_attempt_settled_without_an_answer_is_not_settled_again(store_url: str, step: Step) -> None:
    handler = Plain(step)
    async with working(store_url, route(handler)) as work:
        work.lanes.left_open["settle"] = 1
        await work.owe()

        record, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        await work.quiet()

        assert not work.lanes.lost.empty()
        row = work.shown()
        assert settlement is not None
        assert settlement.state.value == row["state"]
        assert (row["tries"], row["in_doubt"], len(row["attempts"])) == (1, False, 1)
        labels = {"route": "export", "outcome": record.outcome}
        assert work.metrics.registry.get_sample_value("norce_adapter_delivery_attempts_total", labels) == 1
        assert handler.calls == ["deliver"]
