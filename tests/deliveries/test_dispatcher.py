"""`adapter.deliveries.dispatcher`: outcomes, doubt, orders read again, deadlines and limits."""

import asyncio
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from adapter.conditions import Condition
from adapter.deliveries import dispatcher as dispatcher_module
from adapter.deliveries.dispatcher import SLACK
from adapter.identifiers import Channel
from adapter.ledger.claims import QueueLimits
from adapter.ledger.inbox import Inbox, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import LEASE_MS, Lease
from adapter.ledger.store import Store
from adapter.moments import to_datetime
from adapter.plugin import Context, Done, Misconfigured, NoSettings, Notification, Outcome, Reject, Retry, Skip, Unknown
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.deliveries.handlers import Blocks, Counting, LooksUp, Plain, Repeatable, Step, wait_forever
from tests.deliveries.harness import CANARY, NOON, NORCE_TIMEOUT, SECOND, SHORTLY, route, working
from tests.ledgers import POLICY, HandClock

# --- outcomes become rows -----------------------------------------------------------------------------------------


class OwnOutcome(Outcome):
    """An outcome of a plugin's own, which is a bug."""


@pytest.mark.parametrize(
    ("step", "handler", "expected"),
    [
        pytest.param(Done("shop-7"), Plain, ("done", "delivered", False, None, "shop-7"), id="done"),
        pytest.param(
            Skip("nothing-changed"), Plain, ("done", "skipped", False, "nothing-changed", None), id="skip"
        ),
        pytest.param(Retry("busy"), Plain, ("waiting", None, False, "busy", None), id="retry"),
        pytest.param(Reject("no-shop"), Plain, ("dead", "rejected", False, "no-shop", None), id="reject"),
        pytest.param(Unknown("no-answer"), Plain, ("dead", "unknown", True, "no-answer", None), id="unknown"),
        pytest.param(
            Unknown("no-answer"), LooksUp, ("waiting", None, True, "no-answer", None), id="unknown, looks up"
        ),
        pytest.param(
            Unknown("no-answer"), Repeatable, ("waiting", None, False, "no-answer", None), id="unknown, repeatable"
        ),
        pytest.param(
            Misconfigured("unauthorized"), Plain, ("waiting", None, False, "unauthorized", None), id="misconfigured"
        ),
        pytest.param(
            RuntimeError("bug"), LooksUp, ("waiting", None, True, "handler-failed", None), id="bug, looks up"
        ),
        pytest.param(RuntimeError("bug"), Plain, ("dead", "unknown", True, "handler-failed", None), id="bug"),
        pytest.param(None, Plain, ("dead", "unknown", True, "handler-failed", None), id="returns nothing"),
        pytest.param(OwnOutcome("mine"), Plain, ("dead", "unknown", True, "handler-failed", None), id="own outcome"),
        pytest.param(
            SystemExit(1), LooksUp, ("waiting", None, True, "handler-failed", None), id="tries to end the process"
        ),
    ],
)  # fmt: skip
@asynchronous
async def test_each_outcome_becomes_a_row(
    store_url: str, step: Step, handler: type[Plain], expected: tuple[Any, ...]
) -> None:
    async with working(store_url, route(handler(step))) as work:
        await work.owe()

        row = await work.settled()

        assert tuple(row[name] for name in ("state", "reason", "in_doubt", "code", "reference")) == expected


@asynchronous
async def test_a_handler_gets_the_current_and_the_received_order(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        await work.owe(currency="SEK")
        await work.settled()

        ((notification, context),) = handler.seen
        assert (notification.order.currency, notification.received.currency) == ("SEK", None)
        assert notification.raw == notification.received.raw
        assert (notification.merchant, notification.channel, notification.callback) == (
            "fjallboden", "1", "order-status",
        )  # fmt: skip
        assert (context.attempt, context.route, context.previous) == (1, "export", None)
        assert context.deadline == to_datetime(work.clock.now) + 30 * SECOND


@asynchronous
async def test_a_route_without_refetch_acts_on_the_received_order(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler, refetch=False)) as work:
        await work.owe(currency="SEK")
        await work.settled()

        assert handler.seen[0][0].order.currency is None
        assert work.norce.asked == []


@asynchronous
async def test_a_retry_is_due_on_time_with_the_same_key_and_the_next_number(store_url: str) -> None:
    handler = Plain(Retry("busy", after=90 * SECOND), Done())
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        assert row["next_at"] == "2026-02-03T12:01:30.000Z"

        work.move_to(NOON + 89_999)
        assert await work.a_turn() == []
        work.move_to(NOON + 90_000)
        row = await work.settled()

        assert (row["state"], row["tries"]) == ("done", 2)
        first, second = (context for _, context in handler.seen)
        assert (first.attempt, second.attempt) == (1, 2)
        assert first.first_attempt_at == second.first_attempt_at
        assert first.key() == second.key()


@asynchronous
async def test_a_delivery_is_dead_when_its_schedule_is_used_up(store_url: str) -> None:
    handler = Plain(*(Retry("busy") for _ in range(10)))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        while row["state"] == "waiting":
            work.move_to(row["next_at"])
            row = await work.settled()

        assert (row["state"], row["reason"], row["tries"]) == ("dead", "exhausted", 4)


@asynchronous
async def test_the_next_delivery_of_a_lane_gets_its_last_done(store_url: str) -> None:
    handler = Plain(Done("shop-7", {"digest": "abc"}))
    async with working(store_url, route(handler)) as work:
        await work.owe(snapshot=1)
        await work.settled()
        await work.owe(snapshot=2)
        await work.settled()

        previous = handler.seen[1][1].previous
        assert previous is not None
        assert (previous.reference, previous.facts) == ("shop-7", {"digest": "abc"})


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        pytest.param(Done("shop-7", {"a": Decimal("1.50")}), "shop-7", id="facts that are no JSON"),  # type: ignore[dict-item]
        pytest.param(Done({"id": 7}), None, id="a reference that is no text"),  # type: ignore[arg-type]
        pytest.param(Done("\ud800"), None, id="a text that is no Unicode"),
    ],
)
@asynchronous
async def test_a_done_that_cannot_be_stored_is_done_without_its_texts(
    store_url: str, said: Done, kept: str | None
) -> None:
    async with working(store_url, route(Plain(said))) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["reason"], row["reference"]) == ("done", "delivered", kept)
        assert not work.store.failing


@asynchronous
async def test_an_exception_is_logged_once_with_its_frames_and_without_its_message(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    async def bug(_notification: Notification, _context: Context[NoSettings]) -> Done:
        number = CANARY
        raise RuntimeError(f"cannot parse {number}")

    async with working(store_url, route(LooksUp(bug))) as work:
        await work.owe(customer={"billing": {"nationalIdentificationNumber": CANARY}})
        row = await work.settled()

    failed = [line for line in lines() if line["event"] == "handler_failed"]
    assert len(failed) == 1
    assert failed[0]["exception"][0]["type"] == "builtins.RuntimeError"
    assert any(" in bug" in frame for frame in failed[0]["exception"][0]["frames"])
    assert CANARY not in json.dumps(lines())
    assert CANARY not in json.dumps(row)


@asynchronous
async def test_every_attempt_is_logged_and_counted_once(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    async with working(store_url, route(Plain(Retry("busy"), Done("shop-7")))) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()

    told = [(line["event"], line["attempt"]) for line in lines() if line["event"].startswith("delivery_")]
    assert told == [("delivery_retried", 1), ("delivery_done", 2)]
    counted = {
        outcome: work.metrics.registry.get_sample_value(
            "norce_adapter_delivery_attempts_total", {"route": "export", "outcome": outcome}
        )
        for outcome in ("retry", "done")
    }
    assert counted == {"retry": 1, "done": 1}


@asynchronous
async def test_a_delivery_that_becomes_due_right_after_a_claim_is_claimed_at_once(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "POLL", timedelta(hours=1))

    async with working(store_url, route(Plain(Retry("busy"), Done("shop-7")))) as work:
        await work.owe()
        due = int(datetime.fromisoformat((await work.settled())["next_at"]).timestamp() * 1000)

        def later() -> None:
            work.clock.now = max(work.clock.now, due)

        work.lanes.after_claim = later  # the next claim finds nothing, and the delivery becomes due
        work.dispatcher.wake()

        row = await work.settled()  # long before the next poll
        assert row["state"] == "done"


class Busier(Retry):
    """A subclass of an outcome in a plugin."""


@asynchronous
async def test_a_subclass_of_an_outcome_is_counted_under_the_name_of_its_base(store_url: str) -> None:
    async with working(store_url, route(Plain(Busier("busy")))) as work:
        await work.owe()

        row = await work.settled()

        assert [attempt["outcome"] for attempt in row["attempts"]] == ["retry"]


# --- doubt --------------------------------------------------------------------------------------------------------


@asynchronous
async def test_a_lane_in_doubt_is_looked_up_before_anything_is_sent_again(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), None, Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()
        row = await work.settled()

        assert handler.calls == ["deliver", "lookup", "deliver"]
        assert (row["state"], row["reason"]) == ("done", "delivered")
        assert [each["outcome"] for each in row["attempts"]] == ["unknown", "not_there", "done"]


@asynchronous
async def test_an_order_that_a_lookup_finds_is_not_sent_again(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        row = await work.settled()

        assert handler.calls == ["deliver", "lookup"]
        assert (row["state"], row["in_doubt"], row["reference"]) == ("done", False, "shop-7")


@asynchronous
async def test_a_lookup_waits_until_the_deadline_of_the_attempt_in_doubt(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done())
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await work.settled()
        doubt_ends = NOON + int((30 * SECOND + NORCE_TIMEOUT + SLACK).total_seconds() * 1000)

        work.move_to(doubt_ends - 1)
        assert await work.a_turn() == []
        assert handler.calls == ["deliver"]
        work.move_to(doubt_ends)
        await work.settled()

        assert handler.calls == ["deliver", "lookup"]


@pytest.mark.parametrize("step", [Reject("refused"), Retry("busy"), Unknown("no-answer"), RuntimeError()], ids=repr)
@asynchronous
async def test_a_lookup_that_fails_leaves_the_doubt(store_url: str, step: Exception) -> None:
    async with working(store_url, route(LooksUp(Unknown("no-answer"), step))) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])

        row = await work.settled()

        assert (row["state"], row["in_doubt"]) == ("waiting", True)


async def died_in_hand(store: Store, queue_id: int) -> None:
    """A process claimed the delivery and died. Its doubt has ended."""
    await Inbox(store).receive(
        ReceivedNotification(
            identity=b"in-hand", channel=Channel("fjallboden", "1"), callback="order-status", order_id="order-1",
            snapshot_at=1, source="callback", body=b'{"id": "order-1"}',
            wanted=(Wanted(queue_id=queue_id, refetch=True),),
        )
    )  # fmt: skip
    lease = Lease(store, version="test")
    await lease.enter()
    ask = QueueLimits(queue_id=queue_id, concurrency=1, doubt_ms=LEASE_MS + 1, schedule=())
    taken = await Lanes(store, lease, policy=POLICY).claim([ask], 1)
    assert isinstance(store.clock, HandClock)
    store.clock.now = taken.claims[0].doubt_ends_at


@pytest.mark.parametrize(
    ("handler", "calls", "expected"),
    [
        pytest.param(LooksUp, ["lookup"], ("done", "delivered"), id="looked up"),
        pytest.param(Repeatable, ["deliver"], ("done", "delivered"), id="repeated"),
        pytest.param(Plain, [], ("dead", "unknown"), id="for a person"),
    ],
)
@asynchronous
async def test_after_a_crash_nothing_is_sent_without_a_lookup(
    store_url: str, handler: type[Plain], calls: list[str], expected: tuple[str, str]
) -> None:
    shop = handler()
    async with working(store_url, route(shop, refetch=False), before=died_in_hand) as work:
        row = await work.settled()

        assert shop.calls == calls
        assert (row["state"], row["reason"]) == expected


@asynchronous
async def test_a_repeatable_handler_gets_the_same_key_again(store_url: str) -> None:
    shop = Repeatable(Unknown("no-answer"), Done())
    async with working(store_url, route(shop)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()

        first, second = (context.key("order") for _, context in shop.seen)
        assert first == second


# --- the order as norce has it now --------------------------------------------------------------------------------

COMPLETED = Condition("/state/currentStatus", {"const": "completed"}).compile()


@asynchronous
async def test_an_order_that_no_longer_meets_the_condition_has_moved_on(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler, when=(COMPLETED,))) as work:
        await work.owe(state={"currentStatus": "declined"})

        row = await work.settled()

        assert handler.calls == []
        assert (row["state"], row["reason"]) == ("done", "moved_on")


@asynchronous
async def test_a_condition_that_cannot_be_evaluated_makes_a_dead_letter(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler, when=(COMPLETED,))) as work:
        await work.owe(state=[{"currentStatus": "completed"}])  # the scope names a member of an array

        row = await work.settled()

        assert handler.calls == []
        assert (row["state"], row["reason"]) == ("dead", "condition")


@asynchronous
async def test_a_lookup_runs_although_the_condition_no_longer_holds(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler, when=(COMPLETED,))) as work:
        await work.owe()
        row = await work.settled()
        work.norce.orders["order-1"]["state"] = {"currentStatus": "declined"}
        work.move_to(row["next_at"])

        row = await work.settled()

        assert handler.calls == ["deliver", "lookup"]
        assert row["reason"] == "delivered"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(httpx.Response(429, headers={"retry-after": "120"}), ("waiting", None, 120), id="429"),
        pytest.param(httpx.Response(503), ("waiting", None, 5), id="503"),
        pytest.param(httpx.Response(500), ("waiting", None, 5), id="500"),
        pytest.param(httpx.ConnectError("refused"), ("waiting", None, 5), id="no connection"),
        pytest.param(httpx.ReadTimeout("slow"), ("waiting", None, 5), id="no answer"),
        pytest.param(httpx.Response(200, text="<html>"), ("waiting", None, 5), id="a page in place of an order"),
        pytest.param(httpx.Response(200, json={}), ("waiting", None, 5), id="an object that is no order"),
        pytest.param(httpx.Response(200, json={"id": "order-2"}), ("waiting", None, 5), id="another order"),
        pytest.param(httpx.Response(404), ("dead", "rejected", None), id="404"),
    ],
)
@asynchronous
async def test_an_order_that_cannot_be_read_again_is_not_delivered(
    store_url: str, answer: httpx.Response | Exception, expected: tuple[str, str | None, int | None]
) -> None:
    handler = Plain()
    async with working(store_url, route(handler, when=(COMPLETED,))) as work:
        work.norce.answers = [answer, answer]  # a read without an answer is repeated once
        await work.owe()

        row = await work.settled()

        assert handler.calls == []
        due = row["next_at"] and datetime.fromisoformat(row["next_at"]) - to_datetime(work.clock.now)
        assert (row["state"], row["reason"], due and due.total_seconds()) == expected


@asynchronous
async def test_deliveries_of_a_channel_wait_while_it_is_switched_off(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler), merchants=("fjallboden", "annan")) as work:
        off = {("fjallboden", "1")}
        work.dispatcher.switched_off = off
        await work.owe()
        await work.owe("order-2", merchant="annan")

        assert (await work.settled())["order_id"] == "order-2"
        await work.a_turn()
        assert handler.calls == ["deliver"]
        off.clear()
        work.dispatcher.wake()

        assert (await work.settled())["order_id"] == "order-1"


@pytest.mark.parametrize("status", [401, 403])
@asynchronous
async def test_a_refused_token_at_norce_pauses_the_queue_and_keeps_the_work(store_url: str, status: int) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.norce.answers = [httpx.Response(status)] * 5
        for number in range(5):
            await work.owe(f"order-{number}")
        rows = [await work.settled() for _ in range(5)]
        await work.owe("order-5")

        assert await work.a_turn() == []
        assert handler.calls == []
        assert [(row["state"], row["tries"]) for row in rows] == [("waiting", 1)] * 5
        assert work.pauses() == {("export", "fjallboden", "1"): "norce-unauthorized"}


@asynchronous
async def test_a_claim_with_too_little_time_left_is_released(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:

        async def dawdle() -> None:
            work.clock.now += int((NORCE_TIMEOUT + SLACK).total_seconds() * 1000) + 1

        work.norce.answers = [dawdle]
        await work.owe()
        released, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        row = await work.settled()

        assert (released.outcome, settlement and settlement.counts) == ("released", False)
        assert handler.calls == ["deliver"]
        assert (row["state"], row["tries"]) == ("done", 1)


# --- deadlines ----------------------------------------------------------------------------------------------------


@asynchronous
async def test_a_handler_is_cancelled_at_its_deadline_and_its_outcome_is_unknown(store_url: str) -> None:
    async with working(store_url, route(LooksUp(wait_forever), timeout=SHORTLY)) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["in_doubt"], row["code"]) == ("waiting", True, "deadline-passed")


@asynchronous
async def test_an_outcome_after_the_deadline_is_recorded(store_url: str) -> None:
    async def late(_notification: Notification, _context: Context[NoSettings]) -> Done:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Done("late")
        raise AssertionError

    async with working(store_url, route(Plain(late), timeout=SHORTLY)) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["reference"]) == ("done", "late")


@asynchronous
async def test_a_lane_stays_claimed_until_a_handler_that_blocks_has_ended(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    blocks = Blocks()
    async with working(store_url, route(Plain(blocks), timeout=SHORTLY)) as work:
        await work.owe()
        await blocks.has_begun()
        while not any(line["event"] == "deadline_passed" for line in lines()):
            await work.a_turn()
        work.move_to(NOON + 3_600_000)
        assert await work.a_turn() == []
        assert work.dispatcher.running == 1

        blocks.go_on.set()
        row = await work.settled()

        assert (row["state"], row["reference"]) == ("done", "late")


# --- limits -------------------------------------------------------------------------------------------------------


@asynchronous
async def test_the_concurrency_of_a_queue_limits_its_attempts(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler, concurrency=2)) as work:
        for number in range(5):
            await work.owe(f"order-{number}")
        await handler.has_begun(2)
        assert work.dispatcher.running == 2

        handler.go_on.set()
        for _ in range(5):
            assert (await work.settled())["state"] == "done"

        assert handler.peak == 2


@asynchronous
async def test_the_slots_limit_all_attempts(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler, concurrency=8), slots=3) as work:
        for number in range(8):
            await work.owe(f"order-{number}")
        await handler.has_begun(3)

        handler.go_on.set()
        for _ in range(8):
            await work.settled()

        assert handler.peak == 3


@asynchronous
async def test_slow_queues_in_all_slots_do_not_delay_a_queue_that_runs_nothing(store_url: str) -> None:
    slow, quick = Counting(), Plain()
    routes = [route(slow, name=f"slow-{number}", concurrency=8) for number in range(4)]
    async with working(store_url, *routes, route(quick), merchants=("fjallboden", "annan"), slots=4) as work:
        for number in range(8):
            for each in routes:
                await work.owe(f"order-{number}", route=each.name)
        await slow.has_begun(4)

        for merchant in ("fjallboden", "annan"):
            await work.owe(f"of-{merchant}", merchant=merchant)
            row = await work.settled()
            assert (row["order_id"], row["state"]) == (f"of-{merchant}", "done")
        assert slow.peak <= 4 + 3  # all slots of one queue, and one beyond for each of the others

        slow.go_on.set()


@asynchronous
async def test_a_full_queue_does_not_delay_another(store_url: str) -> None:
    full, free = Counting(), Plain()
    async with working(store_url, route(full, concurrency=1), route(free, name="other")) as work:
        await work.owe("order-1")
        await work.owe("order-2")
        await full.has_begun(1)

        await work.owe("order-3", route="other")
        row = await work.settled()

        assert (row["route"], row["state"]) == ("other", "done")
        full.go_on.set()
