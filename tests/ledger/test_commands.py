"""Commands on the ledger and the actions that record them, on both databases."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, event

from adapter.ledger import selection
from adapter.ledger.commands import Commands, NoSuchCommand, QueueChange, QueueOrphaned, Step, StepResult
from adapter.ledger.lanes import Lanes
from adapter.ledger.maintenance import faults
from adapter.ledger.queries import Author, DeliveryFilter, Queries
from adapter.ledger.settlement import FOR_EVER, Ending
from adapter.ledger.store import Store
from adapter.plugin import Retry
from tests.databases import Server
from tests.ledgers import (
    CONDITION,
    DELIVERED,
    DOUBT,
    EXHAUSTED,
    EXPORT,
    HOUR,
    LOOKS_UP,
    MISCONFIGURED,
    NOON,
    NOT_THERE,
    PAUSES,
    POLICY,
    REJECTED,
    UNKNOWN,
    Ends,
    HandClock,
    Ledger,
    in_doubt,
    opened,
    receipt,
    waiting,
)

BY = Author(who="anna@shop", why="the shop is mended")


def retry(ledger: Ledger, *ids: int, **more: Any) -> StepResult:
    return run(ledger, "retry", *ids, **more)


def discard(ledger: Ledger, *ids: int, **more: Any) -> StepResult:
    return run(ledger, "discard", *ids, **more)


def run(ledger: Ledger, name: str, *ids: int, **more: Any) -> StepResult:
    """Run one step. Arguments that a step does not have are conditions."""
    of_step = {each: more.pop(each) for each in ("by", "most", "after", "action", "unknown") if each in more}
    step = Step(matching=DeliveryFilter(**{"ids": ids, **more}), **{"by": BY, **of_step})
    return ledger.do(getattr(Commands(ledger.store), name)(step))


def test_ids_in_an_orphaned_queue_are_refused_with_that_word_and_others_are_left_alone(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    dead(ledger, "order-2", refetch=False)
    commands = Commands(ledger.store, {ledger.history, ledger.other})

    def step(*ids: int) -> Step:
        return Step(matching=DeliveryFilter(ids=ids), by=BY)

    with pytest.raises(QueueOrphaned, match=r"delivery 1: its queue, export of fjallboden/1, is orphaned\."):
        ledger.do(commands.retry(step(2, 1)))
    assert [row[1] for row in stands(ledger)] == ["dead", "dead"]
    assert ledger.do(commands.retry(step())).changed == 1
    assert [row[1] for row in stands(ledger)] == ["dead", "waiting"]
    assert ledger.do(commands.discard(step(1))).changed == 1


def pause(ledger: Ledger, name: str = "pause", **given: Any) -> int:
    return ledger.do(getattr(Commands(ledger.store), name)(QueueChange(**{"route": "export", "by": BY, **given})))


def dead(ledger: Ledger, *orders: str, ends: Ends = REJECTED, refetch: bool = True, **more: Any) -> None:
    """Make a dead letter for each of these orders."""
    for order in orders:
        ledger.owed(1 if refetch else 2, order_id=order, refetch=refetch)
        queue = ledger.export if refetch else ledger.history
        (claim,) = [each for each in ledger.claim(queue) if each.order_id == order]
        ledger.settle(claim, ends, refetch=refetch, **more)


def query(ledger: Ledger, look: Callable[[Queries], Any]) -> Any:
    with ledger.store.read_connection() as connection:
        return look(Queries(connection))


def counted(ledger: Ledger, **given: Any) -> int:
    """Count like a dry run."""
    return sum(
        row["count"] for row in query(ledger, lambda queries: queries.count(DeliveryFilter(state="dead", **given)))
    )


def stands(ledger: Ledger) -> list[tuple[int, str, str | None]]:
    return ledger.rows("SELECT id, state, reason FROM deliveries ORDER BY id")


def written(ledger: Ledger) -> list[tuple[Any, ...]]:
    rows = ledger.rows("SELECT command, who, why, matching, changed FROM actions ORDER BY id")
    return [(*row[:3], json.loads(row[3]), row[4]) for row in rows]


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check the ledger after each test."""
    ledger: Ledger | None = request.getfixturevalue("ledger") if "ledger" in request.fixturenames else None
    yield
    if ledger is not None:
        with ledger.store.read_connection() as connection:
            assert faults(connection) == []


# --- retry ---------------------------------------------------------------------------------------------------------


def test_a_retried_letter_is_due_at_once_with_its_whole_schedule(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + 5000))
    ledger.clock.now += HOUR
    ledger.settle(ledger.claim_one(), EXHAUSTED)

    stepped = retry(ledger, 1)

    assert (stepped.changed, stepped.after) == (1, None)
    assert ledger.rows("SELECT state, reason, attempts, first_attempt_at, ended_at FROM deliveries") == [
        ("waiting", None, 0, None, None)
    ]
    claim = ledger.claim_one()
    assert (claim.attempt, claim.in_doubt, claim.number) == (1, False, 3)


def test_a_letter_is_retried_once_however_often_the_command_runs(ledger: Ledger) -> None:
    dead(ledger, "order-1")

    assert [retry(ledger, 1).changed for _ in range(3)] == [1, 0, 0]
    assert len(ledger.claim()) == 1
    assert retry(ledger, 1).changed == 0  # it is being tried


@pytest.mark.parametrize("name", ["retry", "discard"])
def test_deliveries_that_are_not_dead_stay_unchanged(ledger: Ledger, name: str) -> None:
    ledger.owed(1, order_id="waits")
    ledger.owed(1, order_id="is-tried")
    ledger.owed(1, order_id="is-done")
    by_order = {claim.order_id: claim for claim in ledger.claim()}
    ledger.settle(by_order["is-done"])
    ledger.settle(by_order["waits"], waiting(NOON + 5000))
    before = ledger.rows("SELECT * FROM deliveries ORDER BY id"), ledger.rows("SELECT * FROM lanes ORDER BY id")

    assert run(ledger, name, 1, 2, 3, 4711).changed == 0
    assert run(ledger, name, route="export").changed == 0
    assert before == (
        ledger.rows("SELECT * FROM deliveries ORDER BY id"),
        ledger.rows("SELECT * FROM lanes ORDER BY id"),
    )
    assert ledger.settle(by_order["is-tried"])


FILTERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "id": ({"ids": (2, 5)}, [2, 5]),
    "route": ({"route": "history"}, [3]),
    "merchant": ({"merchant": "annan"}, [5]),
    "channel": ({"channel": "1"}, [1, 2, 3, 4, 5]),
    "no such channel": ({"channel": "2"}, []),
    "order": ({"order_id": "order-2"}, [2, 3]),
    "beginning of an order id": ({"order_id": "order_5"}, [5]),
    "reference": ({"reference": "100-2"}, [2, 3]),
    "no such reference": ({"reference": "\0"}, []),
    "reason": ({"reason": "exhausted"}, [2, 4]),
    "code": ({"code": "busy"}, [2]),
    "since": ({"since": NOON + HOUR}, [4, 5]),
    "until": ({"until": NOON + HOUR}, [1, 2, 3]),
    "since and until": ({"since": NOON + 1, "until": NOON + 2 * HOUR}, [4]),
    "before an end": ({"ended_before": NOON + 2 * HOUR + 1}, [1, 2, 3, 4]),
    "notification": ({"notification_id": 1}, [1]),
    "all at once": ({"route": "export", "order_id": "order-2", "reason": "exhausted", "code": "busy"}, [2]),
    "ids and a filter": ({"ids": (1, 2), "reason": "rejected"}, [1]),
}


@pytest.mark.parametrize("given", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("name", ["retry", "discard"])
def test_a_command_changes_what_matches_and_a_dry_run_counts_the_same(
    ledger: Ledger, name: str, given: tuple[dict[str, Any], list[int]]
) -> None:
    matching, expected = given
    dead(ledger, "order-1")
    dead(ledger, "order-2", ends=Ends(Retry("busy")))
    dead(ledger, "order-2", refetch=False)
    ledger.clock.now += HOUR
    dead(ledger, "order-4", ends=EXHAUSTED)
    ledger.clock.now += HOUR
    ledger.receive(receipt("order_5!", wanted=[(ledger.other, True)]))
    ledger.clock.now += 1
    ledger.settle(ledger.claim_one(ledger.other), REJECTED)
    ledger.rows("UPDATE notifications SET reference = '100-2' WHERE id = 2")
    before = stands(ledger)

    number = counted(ledger, **matching)
    untouched = stands(ledger)
    changed = run(ledger, name, **matching).changed

    assert (number, changed) == (len(expected), len(expected))
    assert untouched == before
    assert [row[0] for row, was in zip(stands(ledger), before, strict=True) if row != was] == expected


def test_a_command_runs_in_steps_and_is_one_row_of_the_actions(ledger: Ledger) -> None:
    dead(ledger, *(f"order-{number}" for number in range(5)))

    first = retry(ledger, route="export", most=2)
    second = retry(ledger, route="export", most=2, after=first.after, action=first.action)
    third = retry(ledger, route="export", most=2, after=second.after, action=second.action)

    assert [each.changed for each in (first, second, third)] == [2, 2, 1]
    assert third.after is None
    assert written(ledger) == [("retry", "anna@shop", "the shop is mended", {"route": "export"}, 5)]


def test_a_command_that_was_broken_off_continues_when_started_again(ledger: Ledger) -> None:
    dead(ledger, *(f"order-{number}" for number in range(5)))
    retry(ledger, route="export", most=2)

    again = retry(ledger, route="export")

    assert again.changed == 3
    assert [row[4] for row in written(ledger)] == [2, 3]
    assert len(ledger.claim()) == 5
    assert [row[0] for row in ledger.rows("SELECT max(claim) FROM lanes")] == [2]


def test_a_command_retries_a_letter_that_dies_again_only_once(ledger: Ledger) -> None:
    dead(ledger, "order-1", "order-2")
    first = retry(ledger, route="export", most=1)
    ledger.settle(ledger.claim_one(), REJECTED)

    second = retry(ledger, route="export", most=1, after=first.after, action=first.action)
    third = retry(ledger, route="export", most=1, after=second.after, action=first.action)

    assert (second.changed, third.changed, third.after) == (1, 0, None)
    assert stands(ledger) == [(1, "dead", "rejected"), (2, "waiting", None)]


def test_a_step_is_not_added_to_the_action_of_another_person(ledger: Ledger) -> None:
    dead(ledger, "order-1", "order-2")
    hers = retry(ledger, 1)

    other = retry(ledger, 2, action=hers.action, by=Author(who="bertil", why="of no reason"))
    unheard = retry(ledger, 2, action=4711)

    assert len({hers.action, other.action, unheard.action}) == 3
    assert [(row[1], row[4]) for row in written(ledger)] == [("anna@shop", 1), ("bertil", 1), ("anna@shop", 0)]


def test_a_step_reads_a_limited_number_of_letters_and_returns_where_the_next_begins(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_READ_PER_STEP", 2)
    dead(ledger, "order-1", "order-2", "order-3", "order-4", "order-5")

    steps = [retry(ledger, order_id="order-5")]
    while steps[-1].after is not None:
        steps.append(retry(ledger, order_id="order-5", after=steps[-1].after, action=steps[-1].action))

    assert [(each.changed, each.after) for each in steps] == [(0, 2), (0, 4), (1, None)]
    assert [row[4] for row in written(ledger)] == [1]


def test_the_number_of_statements_does_not_grow_with_the_number_of_letters(ledger: Ledger) -> None:
    dead(ledger, *(f"order-{number}" for number in range(30)))
    one, many = (statements(ledger, lambda most=most: retry(ledger, route="export", most=most)) for most in (1, 29))

    assert one == many <= 8


def statements(ledger: Ledger, do: Callable[[], Any]) -> int:
    seen: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    event.listen(ledger.store.engine, "before_cursor_execute", hear)
    try:
        do()
    finally:
        event.remove(ledger.store.engine, "before_cursor_execute", hear)
    return len(seen)


# --- unknown names ----------------------------------------------------------------------------------------------------


def test_unknown_ones_are_left_out_unless_somebody_says_so(ledger: Ledger) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)
    dead(ledger, "order-2", ends=CONDITION)

    assert retry(ledger, 1, 2).changed == 1
    assert stands(ledger) == [(1, "dead", "unknown"), (2, "waiting", None)]
    assert [claim.order_id for claim in ledger.claim()] == ["order-2"]


def test_look_up_keeps_the_doubt(ledger: Ledger) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)

    retry(ledger, 1, unknown="look-up")

    assert ledger.claim() == []  # the request in doubt has its time
    ledger.clock.now += DOUBT
    claim = ledger.claim_one()
    assert claim.in_doubt
    ledger.settle(claim, Ends(Ending.NOT_THERE, due=NOON, handling=LOOKS_UP))
    assert not ledger.claim_one().in_doubt
    assert written(ledger)[0][3] == {"ids": [1], "unknown": "look-up"}


def test_send_ends_the_doubt_and_says_so_in_the_audit(ledger: Ledger) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)

    retry(ledger, 1, unknown="send")

    assert not ledger.claim_one().in_doubt
    assert written(ledger)[0][3] == {"ids": [1], "unknown": "send"}


def test_a_change_needs_more_of_an_id_if_several_orders_begin_so(ledger: Ledger) -> None:
    dead(ledger, "order-1", "order-22", "order-23")

    for name in ("retry", "discard"):
        with pytest.raises(ValueError, match="several orders begin like this"):
            run(ledger, name, order_id="order-2")

    assert {state for _, state, _ in stands(ledger)} == {"dead"}
    assert retry(ledger, order_id="order-1").changed == 1
    assert retry(ledger, order_id="order-22").changed == 1


def test_send_needs_ids_or_the_time_of_the_look(ledger: Ledger) -> None:
    """A command that is started again must not send deliveries whose outcome became unknown in its first run."""
    for given in ({}, {"until": NOON + HOUR}):
        with pytest.raises(ValueError, match="needs the ids"):
            retry(ledger, route="export", unknown="send", **given)

    dead(ledger, "order-1", ends=UNKNOWN)
    looked_at = ledger.clock.now = NOON + HOUR
    assert retry(ledger, route="export", ended_before=looked_at, unknown="send").changed == 1
    ledger.clock.now += HOUR
    ledger.settle(ledger.claim_one(), UNKNOWN)
    assert retry(ledger, route="export", ended_before=looked_at, unknown="send").changed == 0


@pytest.mark.parametrize("unknown", ["look-up", "send"])
def test_a_letter_stays_dead_while_its_blocked_handler_holds_the_lane(ledger: Ledger, unknown: str) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    ledger.settle(claim, Ends(Ending.BLOCKED, "unknown"), keeps_lane=True)

    assert retry(ledger, 1, unknown=unknown).changed == 0
    ledger.do(ledger.lanes.release(claim))
    assert retry(ledger, 1, unknown=unknown).changed == 1

    ledger.clock.now += DOUBT
    assert ledger.claim_one().in_doubt == (unknown == "look-up")


# --- places in the lane ---------------------------------------------------------------------------------------------


def test_a_letter_behind_another_waits_for_it(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), UNKNOWN)

    assert retry(ledger, 1).changed == 1
    assert ledger.claim() == []  # the unknown one stops the lane

    assert discard(ledger, 2).changed == 1
    ledger.clock.now += DOUBT
    assert ledger.claim_one().delivery_id == 1


def test_a_letter_retried_with_the_one_that_stops_its_lane_comes_after_it(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), UNKNOWN)

    retry(ledger, 1, 2, unknown="send")

    order = []
    while claims := ledger.claim():
        (claim,) = claims
        order.append((claim.delivery_id, claim.in_doubt))
        ledger.settle(claim)
    assert order == [(2, False), (1, False)]


def test_a_letter_in_a_held_lane_is_next(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(2)
    held = ledger.claim_one()

    assert retry(ledger, 1).changed == 1
    assert ledger.claim() == []
    assert ledger.settle(held)

    assert ledger.claim_one().delivery_id == 1


def test_a_letter_in_a_lane_that_waits_for_a_retry_does_not_hurry_it(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), in_doubt(NOON + HOUR))

    retry(ledger, 1)

    assert ledger.claim() == []
    ledger.clock.now += HOUR
    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.in_doubt) == (2, True)
    ledger.settle(claim, Ends(NOT_THERE.result, due=ledger.clock.now, handling=LOOKS_UP))
    ledger.settle(ledger.claim_one())
    assert ledger.claim_one().delivery_id == 1


def test_without_refetch_a_letter_stops_its_lane_and_comes_before_later_deliveries(ledger: Ledger) -> None:
    dead(ledger, "order-1", refetch=False)
    ledger.owed(3, 4, refetch=False)
    assert ledger.claim(ledger.history) == []

    retry(ledger, 1)

    order = []
    while claims := ledger.claim(ledger.history):
        (claim,) = claims
        order.append(claim.delivery_id)
        ledger.settle(claim, refetch=False)
    assert order == [1, 2, 3]


# --- discard --------------------------------------------------------------------------------------------------------


def test_a_discarded_letter_is_done_and_its_lane_continues_without_doubt(ledger: Ledger) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)
    ledger.owed(2)
    assert ledger.claim() == []
    ledger.clock.now += HOUR

    discard(ledger, 1)

    assert stands(ledger) == [(1, "done", "discarded"), (2, "waiting", None)]
    assert ledger.rows("SELECT ended_at FROM deliveries WHERE id = 1") == [(ledger.clock.now,)]
    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.in_doubt) == (2, False)
    assert written(ledger) == [("discard", "anna@shop", "the shop is mended", {"ids": [1]}, 1)]


def test_a_lane_with_nothing_left_takes_the_next_notification(ledger: Ledger) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)
    discard(ledger, 1)
    ledger.clock.now += DOUBT
    assert ledger.claim() == []

    ledger.owed(2)

    assert ledger.claim_one().delivery_id == 2


def test_discarding_a_letter_that_did_not_stop_its_lane_does_not_change_the_lane(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(2)
    ledger.settle(ledger.claim_one(), UNKNOWN)
    before = ledger.rows("SELECT * FROM lanes")

    assert discard(ledger, 1).changed == 1
    assert ledger.rows("SELECT * FROM lanes") == before


def test_a_blocked_letter_can_be_discarded_once_its_handler_has_ended(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    ledger.settle(claim, Ends(Ending.BLOCKED, "unknown"), keeps_lane=True)

    assert discard(ledger, 1).changed == 0
    ledger.owed(2)
    ledger.do(ledger.lanes.release(claim))
    assert ledger.claim() == []
    assert discard(ledger, 1).changed == 1

    ledger.clock.now += DOUBT
    after = ledger.claim_one()
    assert (after.delivery_id, after.in_doubt) == (2, False)


# --- discard what waits ---------------------------------------------------------------------------------------------


def discard_waiting(ledger: Ledger, *ids: int, **given: Any) -> StepResult:
    return discard(ledger, *ids, state="waiting", **given)


def test_a_waiting_delivery_is_discarded_and_the_next_one_of_its_lane_comes(ledger: Ledger) -> None:
    ledger.owed(1, 2, refetch=False)

    assert discard_waiting(ledger, 1).changed == 1

    assert stands(ledger) == [(1, "done", "discarded"), (2, "waiting", None)]
    assert ledger.claim_one(ledger.history).delivery_id == 2
    assert written(ledger) == [("discard", "anna@shop", "the shop is mended", {"ids": [1], "state": "waiting"}, 1)]


def test_the_last_waiting_delivery_of_a_lane_leaves_it_idle(ledger: Ledger) -> None:
    ledger.owed(1)

    assert discard_waiting(ledger, route="export").changed == 1

    assert ledger.claim() == []
    assert ledger.next_due_at() is None
    ledger.owed(2)
    assert ledger.claim_one().delivery_id == 2


def test_a_delivery_that_waits_for_its_retry_is_discarded(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + HOUR))
    ledger.owed(2)

    assert discard_waiting(ledger, 1).changed == 1

    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.in_doubt) == (2, False)


@pytest.mark.parametrize("ends", [in_doubt(NOON + 6 * HOUR), UNKNOWN], ids=["waiting", "dead"])
def test_after_a_discard_the_next_delivery_waits_for_the_end_of_the_doubt_and_no_longer(
    ledger: Ledger, ends: Ends
) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), ends)
    ledger.owed(2)

    ledger.clock.now += DOUBT - 1
    assert discard(ledger, 1, state="waiting" if ends.due else "dead").changed == 1

    assert ledger.claim() == []
    assert ledger.next_due_at() == NOON + DOUBT
    ledger.clock.now += 1
    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.in_doubt) == (2, False)


def test_a_discard_after_the_end_of_the_doubt_makes_the_next_delivery_due_at_once(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), in_doubt(NOON + 6 * HOUR))
    ledger.owed(2)
    ledger.clock.now += HOUR

    assert discard_waiting(ledger, 1).changed == 1

    assert ledger.claim_one().delivery_id == 2


def test_a_discard_after_a_crash_leaves_the_request_its_time(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.claim_one()
    ledger.owed(2)
    after = ledger.reopened()
    try:
        assert discard_waiting(after, 1).changed == 1

        assert after.claim() == []
        after.clock.now += DOUBT
        assert after.claim_one().delivery_id == 2
    finally:
        after.store.close()


def test_a_delivery_that_is_being_attempted_is_not_discarded(ledger: Ledger) -> None:
    ledger.owed(1, refetch=False)
    claim = ledger.claim_one(ledger.history)
    ledger.owed(2, refetch=False)

    assert discard_waiting(ledger, route="history").changed == 1

    assert stands(ledger) == [(1, "waiting", None), (2, "done", "discarded")]
    assert ledger.settle(claim)


def test_waiting_and_dead_deliveries_are_discarded_apart(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    ledger.owed(1, order_id="order-2")

    assert discard_waiting(ledger, 1).changed == 0
    assert discard(ledger, 2).changed == 0
    assert discard_waiting(ledger, 1, 2).changed == 1


def test_waiting_deliveries_are_found_in_steps(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_IDS_PER_STEP", 3)
    for number in range(8):
        ledger.owed(1, order_id=f"order-{number}")
    ledger.settle(ledger.claim(most=1)[0])

    steps = [discard_waiting(ledger, route="export")]
    while steps[-1].after is not None:
        steps.append(discard_waiting(ledger, route="export", after=steps[-1].after, action=steps[-1].action))

    assert sum(each.changed for each in steps) == 7
    assert [each.after for each in steps] == [3, 6, None]


def test_only_dead_letters_are_retried(ledger: Ledger) -> None:
    ledger.owed(1)

    with pytest.raises(ValueError, match="only dead letters"):
        retry(ledger, 1, state="waiting")
    with pytest.raises(ValueError, match="`dead` or `waiting`"):
        discard(ledger, 1, state="done")


def test_a_discarded_letter_is_not_retried_by_a_repeat(ledger: Ledger) -> None:
    dead(ledger, "order-1")
    discard(ledger, 1)
    ledger.clock.now += 2 * HOUR

    ledger.owed(1)

    assert stands(ledger) == [(1, "done", "discarded")]


# --- queues ---------------------------------------------------------------------------------------------------------


def queue_state(ledger: Ledger) -> list[tuple[Any, ...]]:
    keys = ("route", "merchant", "state", "paused_by", "reason")
    return [
        tuple(each[key] for key in keys)
        for each in query(ledger, lambda queries: queries.queues(ledger.clock.now, ledger.queues))
    ]


def test_nothing_is_claimed_from_a_paused_queue(ledger: Ledger) -> None:
    ledger.owed(1)

    assert pause(ledger, merchant="fjallboden") == 1
    assert ledger.claim(ledger.export) == []
    ledger.owed(1, order_id="order-2")
    assert pause(ledger, "resume", merchant="fjallboden") == 1

    assert len(ledger.claim(ledger.export)) == 2
    assert [row[:2] + row[3:] for row in written(ledger)] == [
        ("pause", "anna@shop", {"route": "export", "merchant": "fjallboden"}, 1),
        ("resume", "anna@shop", {"route": "export", "merchant": "fjallboden"}, 1),
    ]


def test_a_pause_without_a_merchant_pauses_the_whole_route(ledger: Ledger) -> None:
    assert pause(ledger) == 2
    assert queue_state(ledger) == [
        ("export", "annan", "paused", "person", "the shop is mended"),
        ("export", "fjallboden", "paused", "person", "the shop is mended"),
        ("history", "fjallboden", "running", None, None),
    ]


@pytest.mark.parametrize("given", [{"route": "nothing"}, {"merchant": "nobody"}, {"channel": "2"}], ids=str)
def test_a_queue_that_is_not_there_is_none_and_the_try_is_written_down(ledger: Ledger, given: dict[str, str]) -> None:
    assert pause(ledger, **given) == 0
    assert [(row[0], row[4]) for row in written(ledger)] == [("pause", 0)]


OUTCOMES = {
    "done": DELIVERED,
    "retry": waiting(NOON + 5000),
    "unknown": in_doubt(NOON + 5000),
    "rejected": REJECTED,
    "misconfigured": MISCONFIGURED,
}


@pytest.mark.parametrize("ends", OUTCOMES.values(), ids=OUTCOMES)
def test_a_persons_pause_survives_outcomes_and_restarts(ledger: Ledger, ends: Ends) -> None:
    ledger.owed(1)
    under_way = ledger.claim_one()
    pause(ledger)

    ledger.settle(under_way, ends)
    after = ledger.reopened()
    try:
        assert after.rows(f"SELECT paused_until, paused_by FROM queues WHERE id = {after.export}") == [
            (FOR_EVER, "person")
        ]
        assert pause(after, "resume") == 2
        assert after.rows("SELECT paused_until, paused_by, pause_reason FROM queues") == [(None, None, None)] * 3
    finally:
        after.store.close()
        ledger.store = Store.open(ledger.url, clock=ledger.clock)


def test_resume_ends_every_kind_of_pause(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), PAUSES)
    ledger.owed(1, order_id="order-2")
    assert ledger.claim() == []

    pause(ledger, "resume", route="export")

    assert ledger.claim_one().delivery_id == 2


# --- the audit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retry", "discard", "pause", "resume"])
def test_a_command_whose_action_cannot_be_stored_changes_nothing(ledger: Ledger, name: str) -> None:
    dead(ledger, "order-1", ends=UNKNOWN)
    pause(ledger, route="history")
    tables = ("deliveries", "lanes", "queues")
    before = [ledger.rows(f"SELECT * FROM {table} ORDER BY id") for table in tables]
    ledger.rows("ALTER TABLE actions RENAME TO elsewhere")

    command: dict[str, Callable[[], Any]] = {
        "retry": lambda: retry(ledger, 1, unknown="send"),
        "discard": lambda: discard(ledger, 1),
        "pause": lambda: pause(ledger, route="export"),
        "resume": lambda: pause(ledger, "resume", route="history"),
    }
    with pytest.raises(Exception, match="actions"):
        command[name]()
    ledger.rows("ALTER TABLE elsewhere RENAME TO actions")

    assert [ledger.rows(f"SELECT * FROM {table} ORDER BY id") for table in tables] == before


def test_actions_are_listed(ledger: Ledger) -> None:
    pause(ledger)
    dead(ledger, "order-1", refetch=False)
    ledger.clock.now += HOUR
    retry(ledger, 1)

    newest, oldest = query(ledger, lambda queries: queries.actions())

    assert (newest["command"], newest["changed"], newest["at"]) == ("retry", 1, "2026-02-03T13:00:00.000Z")
    assert (oldest["command"], oldest["who"], oldest["why"]) == ("pause", "anna@shop", "the shop is mended")


# --- as they come over the wire -------------------------------------------------------------------------------------

GOOD = {"matching": {"ids": [1]}, "by": {"who": "anna", "why": "mended"}}
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated"),
    "no JSON": (b"{", "truncated"),
    "no object": (b"[]", "Expected `object`"),
    "not UTF-8": (b'{"matching": "\xff"}', ""),
    "a lone surrogate": (json.dumps(GOOD | {"by": {"who": "\ud800", "why": "x"}}).encode(), ""),
    "nested deeply": (b'{"unheard": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "unheard"),
    "an unheard member": (json.dumps(GOOD | {"rate": 1}).encode(), "unknown field `rate`"),
    "a filter that is a typo": (json.dumps(GOOD | {"matching": {"rout": "x"}}).encode(), "unknown field `rout`"),
    "a blank name": (json.dumps(GOOD | {"by": {"who": " ", "why": "x"}}).encode(), "must not be blank"),
    "no reason": (json.dumps(GOOD | {"by": {"who": "x", "why": ""}}).encode(), "$.by.why"),
    "a NUL": (json.dumps(GOOD | {"by": {"who": "x", "why": "a\0b"}}).encode(), "$.by.why"),
    "a NUL in a filter": (json.dumps(GOOD | {"matching": {"order_id": "a\0"}}).encode(), "$.matching.order_id"),
    "a huge id": (json.dumps(GOOD | {"matching": {"ids": [10**30]}}).encode(), "$.matching.ids[0]"),
    "an id beyond 64 bits": (json.dumps(GOOD | {"matching": {"ids": [2**63]}}).encode(), "$.matching.ids[0]"),
    "a negative id": (json.dumps(GOOD | {"matching": {"ids": [-1]}}).encode(), "$.matching.ids[0]"),
    "an id as a text": (json.dumps(GOOD | {"matching": {"ids": ["1"]}}).encode(), "$.matching.ids[0]"),
    "too many ids": (json.dumps(GOOD | {"matching": {"ids": list(range(10_001))}}).encode(), "length <= 10000"),
    "a moment far away": (json.dumps(GOOD | {"matching": {"since": 10**300}}).encode(), "$.matching.since"),
    "a half moment": (json.dumps(GOOD | {"matching": {"since": 1.5}}).encode(), "$.matching.since"),
    "no most": (json.dumps(GOOD | {"most": 0}).encode(), "$.most"),
    "too many a step": (json.dumps(GOOD | {"most": 100_000}).encode(), "$.most"),
    "before the beginning": (json.dumps(GOOD | {"after": -1}).encode(), "$.after"),
    "another unknown": (json.dumps(GOOD | {"unknown": "guess"}).encode(), "$.unknown"),
    "send all": (json.dumps(GOOD | {"matching": {}, "unknown": "send"}).encode(), "needs the ids"),
}


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)  # no database has a say in it
@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
def test_an_invalid_body_is_refused_with_the_place(ledger: Ledger, given: tuple[bytes, str]) -> None:
    dead(ledger, "order-1")

    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the port answers with every such message
        ledger.do(Commands(ledger.store).run("retry", given[0]))

    assert given[1] in str(refused.value)
    assert written(ledger) == []
    assert not ledger.store.failing


def test_of_repeated_members_the_last_counts(ledger: Ledger) -> None:
    dead(ledger, "order-1", "order-2")
    body = json.dumps(GOOD)[:-1] + ', "matching": {"ids": [2]}}'

    assert ledger.do(Commands(ledger.store).run("retry", body.encode()))["changed"] == 1
    assert stands(ledger) == [(1, "dead", "rejected"), (2, "waiting", None)]


@pytest.mark.parametrize("name", ["", "erase", "do", "_retry", "retry "])
def test_an_unknown_command_is_refused_with_the_known_names(ledger: Ledger, name: str) -> None:
    with pytest.raises(NoSuchCommand) as refused:
        ledger.do(Commands(ledger.store).run(name, b"{}"))

    assert {"retry", "resend", "discard", "pause", "resume"} <= set(refused.value.names)


def test_as_many_ids_as_may_be_given_are_taken(ledger: Ledger) -> None:
    dead(ledger, "order-1")

    assert retry(ledger, *range(1, 10_001)).changed == 1


def test_a_key_error_inside_a_command_is_no_unknown_command(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_arguments: Any) -> Any:
        raise KeyError("queue")

    monkeypatch.setattr(Commands, "_step", breaks)

    with pytest.raises(KeyError):
        ledger.do(Commands(ledger.store).run("retry", msgspec.json.encode(GOOD)))


# --- two at once, on PostgreSQL -------------------------------------------------------------------------------------


@contextmanager
def several(postgres: Server, number: int) -> Iterator[tuple[Ledger, list[Ledger]]]:
    """Yield a ledger with `number` nodes, each with an event loop of its own."""
    url = postgres.fresh()
    try:
        with opened(url) as first:
            runners = [asyncio.Runner() for _ in range(number)]
            nodes = [Ledger(url, HandClock(), runner) for runner in runners]
            try:
                yield first, nodes
            finally:
                for node, runner in zip(nodes, runners, strict=True):
                    node.store.close()
                    runner.close()
    finally:
        postgres.drop(url)


def at_once(*works: Callable[[], None]) -> None:
    failed: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], None]) -> None:
        try:
            barrier.wait(10)
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=begin, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failed:
        raise failed[0]


def test_two_operators_at_once_do_each_letter_once(postgres: Server) -> None:
    with several(postgres, 3) as (ledger, nodes):
        dead(ledger, *(f"order-{number}" for number in range(60)))
        done: dict[str, int] = {"retry": 0, "discard": 0}

        def work(node: Ledger, name: str) -> Callable[[], None]:
            def through() -> None:
                step = run(node, name, route="export", most=7)
                done[name] += step.changed
                while step.after is not None:
                    step = run(node, name, route="export", most=7, after=step.after, action=step.action)
                    done[name] += step.changed

            return through

        at_once(work(nodes[0], "retry"), work(nodes[1], "discard"))

        assert done["retry"] + done["discard"] == 60
        by_reason = dict(ledger.rows("SELECT state, count(*) FROM deliveries GROUP BY state"))
        assert by_reason == {
            state: done[name] for state, name in (("waiting", "retry"), ("done", "discard")) if done[name]
        }
        assert sum(row[4] for row in written(ledger)) == 60


def test_commands_beside_intake_claims_and_settlements_lose_nothing(postgres: Server) -> None:
    with several(postgres, 3) as (ledger, nodes):
        for node in (ledger, *nodes):
            node.lanes = Lanes(node.store, node.lease, policy=replace(POLICY, after_failures=0))
        orders = [f"order-{number}" for number in range(20)]
        dead(ledger, *orders, ends=UNKNOWN)

        def operator() -> None:
            for _ in range(15):
                run(nodes[0], "retry", route="export", unknown="send", ended_before=NOON + 1, most=5)
                run(nodes[0], "discard", reason="unknown", most=3)
                pause(nodes[0])
                pause(nodes[0], "resume")

        def intake() -> None:
            for snapshot in range(2, 12):
                for order in orders:
                    nodes[1].owed(snapshot, order_id=order)

        def worker() -> None:
            for number in range(60):
                for claim in nodes[2].claim(most=5):
                    nodes[2].settle(claim, (DELIVERED, UNKNOWN, REJECTED)[number % 3])

        at_once(operator, intake, worker)
        while ledger.rows("SELECT 1 FROM deliveries WHERE state = 'dead'"):
            run(ledger, "discard", route="export")
        ledger.clock.now += DOUBT
        while claims := ledger.claim():
            for claim in claims:
                ledger.settle(claim)

        assert ledger.rows("SELECT 1 FROM deliveries WHERE state <> 'done'") == []
        assert len(ledger.rows("SELECT 1 FROM deliveries")) == 220
        with ledger.store.read_connection() as connection:
            assert faults(connection) == []


def test_a_letter_that_became_unknown_meanwhile_is_left_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the query and the lock, another person retried it, and its outcome became unknown."""
    dead(ledger, "order-1")
    matching = Commands._matching

    def then_unknown(self: Commands, connection: Connection, *rest: Any) -> Any:
        found = matching(self, connection, *rest)
        connection.exec_driver_sql("UPDATE deliveries SET reason = 'unknown'")
        return found

    monkeypatch.setattr(Commands, "_matching", then_unknown)

    assert retry(ledger, 1).changed == 0


def test_a_queue_of_no_other_route_is_touched(ledger: Ledger) -> None:
    pause(ledger, route=EXPORT.route, merchant="annan", channel="1")

    assert [row[2] for row in queue_state(ledger)] == ["paused", "running", "running"]
