"""Resends: delivered again by a person, once per command, and beside everything else that happens in a lane."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as replace_member

from adapter.ledger import resends, selection
from adapter.ledger.commands import Commands, QueueInShadow, QueueOrphaned, Step, StepResult
from adapter.ledger.inbox import Received
from adapter.ledger.maintenance import faults
from adapter.ledger.queries import Author, DeliveryFilter
from adapter.ledger.resends import ResendFilter
from adapter.ledger.settlement import Handling
from adapter.plugin import Unknown
from tests.ledgers import (
    CONDITION,
    DELIVERED,
    DOUBT,
    EXHAUSTED,
    HOUR,
    MOVED_ON,
    NOON,
    REJECTED,
    RELEASED,
    SKIPPED,
    UNKNOWN,
    Ends,
    Ledger,
    body_of,
    delivered,
    in_doubt,
    receipt,
    waiting,
)

BY = Author(who="anna@shop", why="the mapping was wrong")
ROUTES = ("export",)  # that read the order again


def steps(ledger: Ledger, *ids: int, **more: Any) -> list[StepResult]:
    """Run a resend to its end, as the command does."""
    of_step = {each: more.pop(each) for each in ("by", "most", "after", "action", "unknown") if each in more}
    step = Step(matching=DeliveryFilter(**{"ids": ids, **more}), **{"by": BY, **of_step})
    results = []
    while True:
        results.append(ledger.do(Commands(ledger.store, refetching=ROUTES).resend(step)))
        if results[-1].after is None:
            return results
        step = Step(
            matching=step.matching, by=BY, unknown=step.unknown, most=step.most,
            after=results[-1].after, action=results[-1].action,
        )  # fmt: skip


def resend(ledger: Ledger, *ids: int, **more: Any) -> int:
    return sum(step.changed for step in steps(ledger, *ids, **more))


def left_out(ledger: Ledger, *ids: int, **more: Any) -> dict[str, list[int]]:
    """Resend, and return what was left out."""
    every: dict[str, list[int]] = {}
    for step in steps(ledger, *ids, **more):
        for why, some in step.left_out.items():
            every.setdefault(why, []).extend(some)
    return every


def previewed(ledger: Ledger, *ids: int, unknown: str = "leave", **more: Any) -> Any:
    with ledger.store.read_connection() as connection:
        matching = DeliveryFilter(**{"ids": ids, **more})
        return resends.preview(connection, ResendFilter.of(matching, unknown, ROUTES))


def table(ledger: Ledger) -> list[tuple[Any, ...]]:
    return ledger.rows("SELECT id, state, reason, again_of FROM deliveries ORDER BY id")


def deliver(ledger: Ledger, *snapshots: int, ends: Ends = DELIVERED, refetch: bool = True, **more: Any) -> None:
    """Receive a notification for each snapshot, and attempt each at once."""
    for snapshot in snapshots:
        ledger.owed(snapshot, refetch=refetch, **more)
        claim = ledger.claim_one(ledger.export if refetch else ledger.history)
        ledger.settle(claim, ends, refetch=refetch)


@pytest.fixture(autouse=True)
def no_faults(ledger: Ledger) -> Iterator[None]:
    """Check the ledger after each test."""
    yield
    with ledger.store.read_connection() as connection:
        assert faults(connection) == []


# --- a new delivery --------------------------------------------------------------------------------------------------


def test_a_resend_is_a_new_delivery_with_a_fresh_schedule_and_the_last_result(ledger: Ledger) -> None:
    ledger.owed(1)
    ledger.settle(ledger.claim_one(), waiting(NOON + 5000))
    ledger.clock.now += 5000
    ledger.settle(ledger.claim_one(), delivered("JS-1", payload="a"))
    ledger.clock.now += HOUR

    assert resend(ledger, 1) == 1

    claim = ledger.claim_one()
    assert (claim.delivery_id, claim.again_of, claim.attempt, claim.in_doubt) == (2, 1, 1, False)
    assert claim.first_attempt_at == ledger.clock.now
    assert claim.previous is not None
    assert (claim.previous.reference, claim.previous.facts) == ("JS-1", {"payload": "a"})
    ledger.settle(claim)
    assert table(ledger) == [(1, "done", "delivered", None), (2, "done", "delivered", 1)]
    assert ledger.claim() == []


def test_a_command_is_recorded_before_anything_is_sent(ledger: Ledger) -> None:
    deliver(ledger, 1)

    first, *others = steps(ledger, route="export")

    assert (first.changed, first.after) == (0, 0)
    assert [step.changed for step in others] == [1]
    assert ledger.rows("SELECT id, command, who, why, matching, changed FROM actions") == [
        (first.action, "resend", BY.who, BY.why, '{"route":"export"}', 1)
    ]
    assert ledger.rows("SELECT command FROM deliveries WHERE again_of = 1") == [(first.action,)]


@pytest.mark.parametrize("ends", [SKIPPED, MOVED_ON, DELIVERED, REJECTED], ids=lambda ends: ends.reason)
def test_ids_select_deliveries_that_ended_in_any_way(ledger: Ledger, ends: Ends) -> None:
    deliver(ledger, 1, ends=ends)

    assert resend(ledger, 1) == 1
    assert ledger.claim_one().again_of == 1


def test_ids_select_superseded_and_discarded_deliveries_and_several_of_a_lane(ledger: Ledger) -> None:
    ledger.owed(1, 2)
    ledger.settle(ledger.claim_one())
    deliver(ledger, 3, ends=REJECTED)
    ledger.do(Commands(ledger.store).discard(Step(matching=DeliveryFilter(ids=(3,)), by=BY)))

    assert resend(ledger, 1, 2, 3) == 3
    assert [row[3] for row in table(ledger)[3:]] == [1, 2, 3]


def test_a_delivery_that_waits_is_left_out(ledger: Ledger) -> None:
    ledger.owed(1)

    assert left_out(ledger, 1) == {"waiting": [1]}
    assert len(table(ledger)) == 1


def test_a_resend_can_be_sent_again(ledger: Ledger) -> None:
    deliver(ledger, 1)
    for again in (1, 2):
        resend(ledger, again)
        ledger.settle(ledger.claim_one())

    assert [row[3] for row in table(ledger)] == [None, 1, 2]


# --- filters ---------------------------------------------------------------------------------------------------------


def test_a_filter_selects_the_newest_delivered_or_dead_delivery_of_each_lane(ledger: Ledger) -> None:
    deliver(ledger, 1, 2, order_id="order-1")
    deliver(ledger, 3, ends=SKIPPED, order_id="order-1")
    deliver(ledger, 1, order_id="order-2")
    deliver(ledger, 2, ends=REJECTED, order_id="order-2")
    ledger.owed(1, order_id="order-3")

    queue = {"route": "export", "merchant": "fjallboden", "channel": "1"}
    assert previewed(ledger, route="export") == (
        [
            queue | {"state": "dead", "reason": "rejected", "count": 1},
            queue | {"state": "done", "reason": "delivered", "count": 1},
        ],
        {},
    )
    assert resend(ledger, route="export") == 2
    assert [row[3] for row in table(ledger) if row[3]] == [2, 5]


def test_an_order_whose_newest_delivery_does_not_match_stays(ledger: Ledger) -> None:
    deliver(ledger, 1, ends=REJECTED)
    deliver(ledger, 2)

    assert resend(ledger, reason="rejected") == 0
    assert resend(ledger, reason="delivered") == 1


def test_on_a_route_that_takes_every_snapshot_the_newest_is_that_of_the_last_snapshot(ledger: Ledger) -> None:
    ledger.owed(5, refetch=False)
    ledger.settle(ledger.claim_one(ledger.history), refetch=False)
    ledger.owed(3, refetch=False)  # late
    ledger.settle(ledger.claim_one(ledger.history), refetch=False)

    resend(ledger, route="history")

    assert [row[3] for row in table(ledger) if row[3]] == [1]


def test_a_resent_snapshot_comes_before_the_later_ones_that_wait(ledger: Ledger) -> None:
    deliver(ledger, 1, refetch=False)
    ledger.owed(2, refetch=False)

    resend(ledger, 1)

    first = ledger.claim_one(ledger.history)
    ledger.settle(first, refetch=False)
    assert (first.again_of, ledger.claim_one(ledger.history).again_of) == (1, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"reason": "skipped"}, "give ids"), ({"state": "dead"}, "no `state`"), ({"unknown": "look-up"}, "retry")],
    ids=str,
)
def test_conditions_that_do_not_fit_are_refused(ledger: Ledger, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        steps(ledger, **given)
    assert ledger.rows("SELECT * FROM actions") == []


@pytest.mark.parametrize("most", [1, 2, 500])
def test_a_resend_ends_whatever_its_steps_and_however_much_it_makes(
    ledger: Ledger, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new deliveries are delivered while the command still runs, and match its filter."""
    monkeypatch.setattr(selection, "MAX_IDS_PER_STEP", 3)
    monkeypatch.setattr(selection, "MAX_READ_PER_STEP", 2)
    for number in range(7):
        deliver(ledger, 1, order_id=f"order-{number}")
    step = Step(matching=DeliveryFilter(route="export"), by=BY, most=most)
    commands = Commands(ledger.store, refetching=ROUTES)
    result = ledger.do(commands.resend(step))
    changed = 0
    while result.after is not None:
        next_step = Step(matching=DeliveryFilter(), by=BY, most=most, after=result.after, action=result.action)
        result = ledger.do(commands.resend(next_step))
        changed += result.changed
        for claim in ledger.claim():
            ledger.settle(claim)

    assert changed == 7
    assert [row[3] for row in table(ledger) if row[3]] == [1, 2, 3, 4, 5, 6, 7]


def test_deliveries_that_end_after_the_command_was_given_are_none_of_its_business(ledger: Ledger) -> None:
    deliver(ledger, 1, order_id="before")
    first = ledger.do(
        Commands(ledger.store, refetching=ROUTES).resend(Step(matching=DeliveryFilter(route="export"), by=BY))
    )
    ledger.clock.now += 1
    deliver(ledger, 1, order_id="after")

    assert resend(ledger, action=first.action) == 1
    assert [row[3] for row in table(ledger) if row[3]] == [1]


# --- once ------------------------------------------------------------------------------------------------------------


def test_a_command_that_is_resumed_sends_nothing_twice(ledger: Ledger) -> None:
    """Neither what it sent, nor an older delivery of the same lane, after a dead letter was ended by it."""
    deliver(ledger, 1, order_id="order-1")
    deliver(ledger, 2, ends=REJECTED, order_id="order-1")
    deliver(ledger, 1, order_id="order-2")
    first = steps(ledger, route="export")[0]
    for _ in range(2):
        for claim in ledger.claim():
            ledger.settle(claim)
        ledger.clock.now += 1

        assert resend(ledger, action=first.action) == 0

    assert [row[3] for row in table(ledger) if row[3]] == [2, 3]
    assert ledger.rows("SELECT changed FROM actions") == [(2,)]


def test_a_step_that_is_repeated_sends_nothing_twice(ledger: Ledger) -> None:
    deliver(ledger, 1, ends=REJECTED)
    action = steps(ledger, 1)[0].action
    step = Step(matching=DeliveryFilter(), by=BY, action=action)

    assert [ledger.do(Commands(ledger.store).resend(step)).changed for _ in range(2)] == [0, 0]
    assert len(table(ledger)) == 2


def test_another_command_sends_again(ledger: Ledger) -> None:
    deliver(ledger, 1)

    assert [resend(ledger, 1), resend(ledger, 1)] == [1, 1]
    assert [row[3] for row in table(ledger)] == [None, 1, 1]


@pytest.mark.parametrize("action", [1, 4711])
def test_only_a_resend_can_be_resumed(ledger: Ledger, action: int) -> None:
    deliver(ledger, 1, ends=REJECTED)
    ledger.do(Commands(ledger.store).retry(Step(matching=DeliveryFilter(ids=(1,)), by=BY)))

    with pytest.raises(ValueError, match=f"no resend has the number {action}"):
        steps(ledger, action=action)


# --- dead letters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [REJECTED, EXHAUSTED, CONDITION], ids=lambda ends: ends.reason)
@pytest.mark.parametrize("refetch", [True, False])
def test_a_dead_letter_is_ended_and_its_lane_goes_on(ledger: Ledger, ends: Ends, refetch: bool) -> None:
    deliver(ledger, 1, ends=ends, refetch=refetch)

    assert resend(ledger, 1) == 1

    assert table(ledger) == [(1, "done", "discarded", None), (2, "waiting", None, 1)]
    assert ledger.claim_one(ledger.export if refetch else ledger.history).again_of == 1


def test_an_unknown_letter_is_left_out_until_a_person_has_looked(ledger: Ledger) -> None:
    deliver(ledger, 1, ends=UNKNOWN)

    assert left_out(ledger, 1) == left_out(ledger, route="export") == {"unknown": [1]}
    with pytest.raises(ValueError, match="needs the ids"):
        steps(ledger, route="export", unknown="send")

    assert previewed(ledger, 1, unknown="send")[1] == {}
    assert resend(ledger, 1, unknown="send") == 1
    assert table(ledger) == [(1, "done", "discarded", None), (2, "waiting", None, 1)]
    assert ledger.claim() == []  # the request in doubt has its time first
    ledger.clock.now += DOUBT
    claim = ledger.claim_one()
    assert (claim.again_of, claim.in_doubt) == (1, False)


def test_a_letter_whose_handler_still_runs_is_left_out(ledger: Ledger) -> None:
    ledger.owed(1)
    claim = ledger.claim_one()
    ledger.settle(claim, REJECTED, keeps_lane=True, refetch=False)

    assert left_out(ledger, 1) == {"attempted": [1]}


# --- bodies that retention has removed -------------------------------------------------------------------------------


def test_without_its_body_only_a_route_that_reads_the_order_again_can_resend(ledger: Ledger) -> None:
    deliver(ledger, 1)
    deliver(ledger, 1, refetch=False, order_id="order-2")
    ledger.rows("UPDATE notifications SET body = NULL")

    assert previewed(ledger, 1, 2)[1] == {"without-body": [2]}
    assert left_out(ledger, 1, 2) == {"without-body": [2]}
    assert ledger.claim_one().body is None


# --- beside everything else ------------------------------------------------------------------------------------------


def test_a_resend_neither_supersedes_nor_is_superseded(ledger: Ledger) -> None:
    deliver(ledger, 1)
    ledger.owed(2)  # waits
    resend(ledger, 1)
    ledger.owed(3)
    ledger.receive(receipt(snapshot=3, body=body_of("order-1", 33), refetching=[ledger.export]))
    ledger.receive(replace_member(receipt(snapshot=4, wanted=[(ledger.export, True)]), body=None))

    states = table(ledger)
    assert [row[1:3] for row in states if row[3] is None][1:3] == [("done", "superseded")] * 2
    assert [row for row in states if row[3]] == [(3, "waiting", None, 1)]


def test_an_order_that_returns_to_the_state_of_a_resend_is_an_event_of_its_own(ledger: Ledger) -> None:
    """Without `lastModified`: the resend of the first state may have read the second one."""
    first, second = (
        receipt(snapshot=None, identity=name, wanted=[(ledger.export, True)], body=body_of("order-1", number))
        for number, name in enumerate([b"state-a/", b"state-b/"])
    )
    for each in (first, second):
        ledger.receive(each)
        ledger.settle(ledger.claim_one())
    resend(ledger, 1)
    ledger.settle(ledger.claim_one())

    assert ledger.receive(first) is Received.NEW
    assert ledger.claim_one().again_of is None


def test_a_resend_that_waits_is_no_reason_to_leave_out_an_event_without_a_body(ledger: Ledger) -> None:
    deliver(ledger, 1)
    resend(ledger, 1)

    assert (
        ledger.receive(replace_member(receipt(snapshot=2, wanted=[(ledger.export, True)]), body=None)) is Received.NEW
    )

    assert [row[1] for row in table(ledger)] == ["done", "waiting", "waiting"]


def test_a_repeat_of_the_event_retries_a_resend_that_was_rejected(ledger: Ledger) -> None:
    deliver(ledger, 1)
    resend(ledger, 1)
    ledger.settle(ledger.claim_one(), REJECTED)

    assert ledger.receive(receipt(wanted=[(ledger.export, True)])) is Received.RETRIED
    assert ledger.claim_one().delivery_id == 2


def test_a_repeat_has_no_effect_after_a_resend(ledger: Ledger) -> None:
    deliver(ledger, 1)
    resend(ledger, 1)
    ledger.settle(ledger.claim_one())

    assert ledger.receive(receipt(wanted=[(ledger.export, True)])) is Received.REPEAT
    assert ledger.claim() == []


def test_a_resend_waits_behind_the_delivery_that_is_attempted(ledger: Ledger) -> None:
    deliver(ledger, 1)
    ledger.owed(2)
    held = ledger.claim_one()

    resend(ledger, 1)

    assert ledger.claim() == []
    ledger.settle(held, RELEASED)
    assert ledger.claim_one().delivery_id == 2


@pytest.mark.parametrize(
    ("handling", "state"),
    [
        (Handling(looks_up=True, repeatable=False), ("dead", "unknown")),
        (Handling(looks_up=True, repeatable=False, looks_up_resends=True), ("waiting", None)),
        (Handling(looks_up=True, repeatable=True), ("dead", "unknown")),
    ],
    ids=["looks up the order", "looks up the key", "repeatable"],
)
def test_a_resend_in_doubt_is_looked_up_only_by_its_key(
    ledger: Ledger, handling: Handling, state: tuple[str, str | None]
) -> None:
    deliver(ledger, 1)
    resend(ledger, 1)

    ledger.settle(ledger.claim_one(), replace(in_doubt(NOON), handling=handling.of_resend()))

    assert table(ledger)[1][1:3] == state


def test_a_resend_that_its_process_left_is_in_doubt_with_the_same_key(ledger: Ledger) -> None:
    deliver(ledger, 1)
    resend(ledger, 1)
    before = ledger.claim_one()
    reopened = ledger.reopened()
    try:
        reopened.clock.now += HOUR
        after = reopened.claim_one()

        assert (after.again_of, after.delivery_id, after.in_doubt) == (1, before.delivery_id, True)
        reopened.settle(after, Ends(Unknown("in-doubt")))
    finally:
        reopened.store.close()


def test_a_queue_that_is_no_longer_configured_takes_no_resend(ledger: Ledger) -> None:
    deliver(ledger, 1)
    deliver(ledger, 1, refetch=False, order_id="order-2")
    commands = Commands(ledger.store, {ledger.history}, refetching=ROUTES)

    with pytest.raises(QueueOrphaned, match=r"delivery 1: .* is orphaned\."):
        ledger.do(commands.resend(Step(matching=DeliveryFilter(ids=(1, 2)), by=BY)))

    first = ledger.do(commands.resend(Step(matching=DeliveryFilter(), by=BY)))
    assert ledger.do(commands.resend(Step(matching=DeliveryFilter(), by=BY, action=first.action))).changed == 1
    assert [row[3] for row in table(ledger) if row[3]] == [2]


def test_a_route_in_shadow_mode_takes_no_resend(ledger: Ledger) -> None:
    deliver(ledger, 1)
    deliver(ledger, 1, refetch=False, order_id="order-2")
    commands = Commands(ledger.store, shadows={ledger.export}, refetching=ROUTES)

    with pytest.raises(QueueInShadow, match=r"delivery 1: its route export is in shadow mode"):
        ledger.do(commands.resend(Step(matching=DeliveryFilter(ids=(1, 2)), by=BY)))

    first = ledger.do(commands.resend(Step(matching=DeliveryFilter(), by=BY)))
    assert ledger.do(commands.resend(Step(matching=DeliveryFilter(), by=BY, action=first.action))).changed == 1
    assert [row[3] for row in table(ledger) if row[3]] == [2]
