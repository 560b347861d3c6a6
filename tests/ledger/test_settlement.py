"""The state of a delivery after an attempt, for every cell of the table in `settlement`, and the schedule."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapter.ledger.settlement import (
    LONGEST_DEFERRAL,
    Attempt,
    Broken,
    Ending,
    Handling,
    Interrupted,
    Reason,
    Result,
    Settlement,
    State,
    is_past_last_lookup,
    next_attempt_at,
    outcome_name,
    settle,
)
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    Notification,
    NotificationHandler,
    Reject,
    Retry,
    Settings,
    Skip,
    Unknown,
)

NOON = datetime(2026, 2, 3, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SCHEDULE = (5 * SECOND, 60 * SECOND)
DOUBT_ENDS = NOON + 20 * SECOND

LOOKS_UP = Handling(looks_up=True, repeatable=False)
REPEATABLE = Handling(looks_up=False, repeatable=True)
NEITHER = Handling(looks_up=False, repeatable=False)
BOTH = Handling(looks_up=True, repeatable=True)
HANDLINGS = {"looks up": LOOKS_UP, "repeatable": REPEATABLE, "neither": NEITHER, "both": BOTH}

FIRST = Attempt(
    number=1,
    in_doubt=False,
    ended_at=NOON,
    doubt_ends_at=DOUBT_ENDS,
    handling=LOOKS_UP,
    schedule=SCHEDULE,
    jitter=0.0,
)
LAST = replace(FIRST, number=len(SCHEDULE) + 1)
LOOKUP = replace(FIRST, number=2, in_doubt=True)
LAST_LOOKUP = replace(LAST, in_doubt=True)

DONE = Done("shop-7")
SKIP = Skip("nothing-changed")
RETRY = Retry("destination-busy")
REJECT = Reject("no-such-shop")
UNKNOWN = Unknown("no-answer")
BROKEN = Broken("handler-failed", "the handler raised KeyError")
MISCONFIGURED = Misconfigured("destination-unauthorized")


def done(reason: Reason) -> Settlement:
    return Settlement(state=State.DONE, reason=reason)


def dead(reason: Reason, *, known: bool = True) -> Settlement:
    return Settlement(state=State.DEAD, reason=reason, known=known)


def waiting(due: datetime, **more: object) -> Settlement:
    return Settlement(state=State.WAITING, due_at=due, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("handling", HANDLINGS.values(), ids=HANDLINGS)
@pytest.mark.parametrize(
    ("result", "attempt", "expected"),
    [
        pytest.param(DONE, FIRST, done(Reason.DELIVERED), id="done"),
        pytest.param(SKIP, FIRST, done(Reason.SKIPPED), id="skip"),
        pytest.param(Ending.MOVED_ON, FIRST, done(Reason.MOVED_ON), id="moved on"),
        pytest.param(REJECT, FIRST, dead(Reason.REJECTED), id="reject"),
        pytest.param(BROKEN, FIRST, dead(Reason.BROKEN), id="bug before a write"),
        pytest.param(Ending.CONDITION, FIRST, dead(Reason.CONDITION), id="condition in error"),
        pytest.param(RETRY, LAST, dead(Reason.EXHAUSTED), id="retry, the last"),
        pytest.param(MISCONFIGURED, LAST, dead(Reason.EXHAUSTED), id="misconfigured, the last"),
        pytest.param(Ending.BLOCKED, FIRST, dead(Reason.UNKNOWN, known=False), id="never lets go of its thread"),
        pytest.param(Ending.BLOCKED, LAST, dead(Reason.UNKNOWN, known=False), id="never lets go, the last"),
        pytest.param(Ending.RELEASED, FIRST, waiting(NOON, counts=False), id="released"),
        pytest.param(Ending.RELEASED, LAST, waiting(NOON, counts=False), id="released, the last"),
    ],
)
def test_outside_doubt_the_settlement_does_not_depend_on_the_handler(
    result: Result, attempt: Attempt, expected: Settlement, handling: Handling
) -> None:
    assert settle(result, replace(attempt, handling=handling)) == expected


@pytest.mark.parametrize(
    ("result", "attempt", "expected"),
    [
        # in a lane not in doubt
        pytest.param(RETRY, FIRST, waiting(NOON + 5 * SECOND), id="retry"),
        pytest.param(RETRY, replace(FIRST, number=2), waiting(NOON + 60 * SECOND), id="second retry"),
        pytest.param(MISCONFIGURED, FIRST, waiting(NOON + 5 * SECOND), id="misconfigured"),
        pytest.param(
            RETRY, replace(FIRST, handling=REPEATABLE), waiting(DOUBT_ENDS), id="retry, repeatable: after the doubt"
        ),
        pytest.param(UNKNOWN, FIRST, waiting(DOUBT_ENDS, known=False), id="unknown: looked up after the doubt"),
        pytest.param(
            UNKNOWN,
            replace(FIRST, number=2),
            waiting(NOON + 60 * SECOND, known=False),
            id="unknown: looked up by the schedule",
        ),
        pytest.param(
            Unknown("busy", after=90 * SECOND), FIRST, waiting(NOON + 90 * SECOND, known=False), id="unknown after"
        ),
        pytest.param(
            Unknown("busy", after=90 * SECOND),
            replace(FIRST, handling=REPEATABLE),
            waiting(NOON + 90 * SECOND),
            id="unknown after: repeated",
        ),
        pytest.param(UNKNOWN, LAST, waiting(DOUBT_ENDS, known=False), id="unknown, the last: looked up all the same"),
        pytest.param(UNKNOWN, replace(FIRST, handling=REPEATABLE), waiting(DOUBT_ENDS), id="unknown: repeated"),
        pytest.param(
            UNKNOWN, replace(LAST, handling=REPEATABLE), dead(Reason.EXHAUSTED), id="unknown, repeated, the last"
        ),
        pytest.param(
            UNKNOWN, replace(FIRST, handling=NEITHER), dead(Reason.UNKNOWN, known=False), id="unknown: for a person"
        ),
        pytest.param(
            UNKNOWN, replace(FIRST, handling=BOTH), waiting(DOUBT_ENDS, known=False), id="unknown: lookup comes first"
        ),
        # after a lookup
        pytest.param(DONE, LOOKUP, done(Reason.DELIVERED), id="found"),
        pytest.param(Ending.NOT_THERE, LOOKUP, waiting(NOON), id="not there: sent again at once"),
        pytest.param(Ending.NOT_THERE, LAST_LOOKUP, dead(Reason.EXHAUSTED), id="not there, the last"),
        pytest.param(RETRY, LOOKUP, waiting(NOON + 60 * SECOND, known=False), id="lookup: retry"),
        pytest.param(
            RETRY, replace(LOOKUP, number=1), waiting(DOUBT_ENDS, known=False), id="lookup: retry after the doubt"
        ),
        pytest.param(RETRY, LAST_LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: retry, the last"),
        pytest.param(REJECT, LOOKUP, waiting(NOON + 60 * SECOND, known=False), id="lookup: reject"),
        pytest.param(REJECT, LAST_LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: reject, the last"),
        pytest.param(
            Unknown("busy", after=90 * SECOND),
            LOOKUP,
            waiting(NOON + 90 * SECOND, known=False),
            id="lookup: unknown after",
        ),
        pytest.param(BROKEN, LOOKUP, waiting(NOON + 60 * SECOND, known=False), id="lookup: bug"),
        pytest.param(BROKEN, LAST_LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: bug, the last"),
        pytest.param(UNKNOWN, LOOKUP, waiting(NOON + 60 * SECOND, known=False), id="lookup: unknown"),
        pytest.param(UNKNOWN, LAST_LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: unknown, the last"),
        pytest.param(MISCONFIGURED, LOOKUP, waiting(NOON + 60 * SECOND, known=False), id="lookup: misconfigured"),
        pytest.param(
            MISCONFIGURED, LAST_LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: misconfigured, the last"
        ),
        pytest.param(Ending.BLOCKED, LOOKUP, dead(Reason.UNKNOWN, known=False), id="lookup: blocks its thread"),
        pytest.param(
            Ending.RELEASED, LOOKUP, waiting(NOON, known=False, counts=False), id="released before the lookup"
        ),
        # repeated in doubt
        pytest.param(
            REJECT, replace(LOOKUP, handling=REPEATABLE), dead(Reason.REJECTED), id="repeated in doubt: reject"
        ),
        pytest.param(
            UNKNOWN, replace(LOOKUP, handling=NEITHER), dead(Reason.UNKNOWN, known=False), id="in doubt: for a person"
        ),
    ],
)
def test_the_table_of_settlements(result: Result, attempt: Attempt, expected: Settlement) -> None:
    assert settle(result, attempt) == expected


PAUSED = replace(FIRST, paused=True)
PAUSED_LAST = replace(LAST, paused=True)
PAUSED_LAST_LOOKUP = replace(LAST_LOOKUP, paused=True)


@pytest.mark.parametrize(
    ("result", "attempt", "expected"),
    [
        pytest.param(RETRY, PAUSED, waiting(NOON + 5 * SECOND, counts=False), id="retry"),
        pytest.param(RETRY, PAUSED_LAST, waiting(NOON + 60 * SECOND, counts=False), id="retry, the last"),
        pytest.param(
            RETRY,
            replace(PAUSED_LAST, number=99),
            waiting(NOON + 60 * SECOND, counts=False),
            id="retry, after the last",
        ),
        pytest.param(
            Retry("busy", after=90 * SECOND), PAUSED_LAST, waiting(NOON + 90 * SECOND, counts=False), id="retry after"
        ),
        pytest.param(RETRY, replace(PAUSED, schedule=()), waiting(NOON, counts=False), id="retry, without a schedule"),
        pytest.param(UNKNOWN, PAUSED_LAST, waiting(NOON + 60 * SECOND, known=False, counts=False), id="unknown"),
        pytest.param(
            UNKNOWN,
            replace(PAUSED_LAST, handling=REPEATABLE),
            waiting(NOON + 60 * SECOND, counts=False),
            id="unknown: repeated",
        ),
        pytest.param(
            UNKNOWN, replace(PAUSED, handling=NEITHER), dead(Reason.UNKNOWN, known=False), id="unknown: for a person"
        ),
        pytest.param(Interrupted("shutdown"), PAUSED, waiting(DOUBT_ENDS, known=False, counts=False), id="interrupted"),
        pytest.param(
            RETRY, PAUSED_LAST_LOOKUP, waiting(NOON + 60 * SECOND, known=False, counts=False), id="lookup: retry"
        ),
        pytest.param(
            REJECT, PAUSED_LAST_LOOKUP, waiting(NOON + 60 * SECOND, known=False, counts=False), id="lookup: reject"
        ),
        pytest.param(
            Ending.NOT_THERE,
            PAUSED_LAST_LOOKUP,
            waiting(NOON, counts=False),
            id="lookup: not there, sent again at once",
        ),
        pytest.param(DONE, PAUSED_LAST, done(Reason.DELIVERED), id="done"),
        pytest.param(REJECT, PAUSED, dead(Reason.REJECTED), id="reject"),
        pytest.param(
            MISCONFIGURED, PAUSED_LAST, waiting(NOON + 60 * SECOND, counts=False), id="misconfigured, the last"
        ),
    ],
)
def test_in_a_paused_queue_a_failure_uses_up_nothing_of_the_schedule(
    result: Result, attempt: Attempt, expected: Settlement
) -> None:
    assert settle(result, attempt) == expected


@pytest.mark.parametrize("handling", HANDLINGS.values(), ids=HANDLINGS)
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_claims_that_end_with_their_process_use_up_the_schedule(handling: Handling, paused: bool) -> None:
    past = replace(LAST_LOOKUP, number=len(SCHEDULE) + 3, handling=handling, paused=paused)

    assert is_past_last_lookup(past.number, SCHEDULE)
    assert settle(Interrupted("in-doubt"), past) == dead(Reason.UNKNOWN, known=False)


def test_the_lookup_after_the_last_attempt_is_not_past_the_schedule() -> None:
    assert not is_past_last_lookup(len(SCHEDULE) + 2, SCHEDULE)
    assert settle(Ending.NOT_THERE, replace(LAST_LOOKUP, number=len(SCHEDULE) + 2)) == dead(Reason.EXHAUSTED)


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (DONE, "done"),
        (Interrupted("shutdown"), "unknown"),
        (Ending.NOT_THERE, "not_there"),
        (MISCONFIGURED, "misconfigured"),
    ],
)
def test_a_result_has_the_name_of_its_outcome(result: Result, name: str) -> None:
    assert outcome_name(result) == name


def test_the_longest_deferral_is_a_day() -> None:
    assert timedelta(hours=24) == LONGEST_DEFERRAL


def test_only_an_unknown_outcome_holds_the_lane_of_a_route_that_refetches() -> None:
    assert [reason for reason in Reason if dead(reason).holds_lane] == [Reason.UNKNOWN]


class Plain(NotificationHandler[Settings]):
    async def deliver(self, notification: Notification, context: Context[Settings]) -> Done | Skip:
        return Done()


class Asks(Plain):
    async def lookup(self, notification: Notification, context: Context[Settings]) -> Done | None:
        return None


class Repeats(Plain):
    repeatable = True


@pytest.mark.parametrize(
    ("handler", "expected"),
    [(Plain, NEITHER), (Asks, LOOKS_UP), (Repeats, REPEATABLE)],
    ids=["neither", "looks up", "repeatable"],
)
def test_the_handling_is_read_from_the_handler_class(
    handler: type[NotificationHandler[Settings]], expected: Handling
) -> None:
    assert Handling.of(handler) == expected


# --- the schedule ---------------------------------------------------------------------------------------------------

pauses = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=30))
schedules = st.lists(pauses, max_size=12)
jitters = st.floats(0, 1)


@given(schedule=schedules, attempts=st.integers(1, 15), jitter=jitters)
def test_a_retry_is_never_earlier_than_scheduled_and_at_most_a_fifth_later(
    schedule: list[timedelta], attempts: int, jitter: float
) -> None:
    due = next_attempt_at(schedule, attempts, NOON, jitter)

    if attempts > len(schedule):
        assert due is None
    else:
        pause = schedule[attempts - 1]
        assert due is not None
        assert NOON + pause <= due <= NOON + pause * 1.2 + timedelta(microseconds=1)


@given(schedule=st.lists(pauses, min_size=1, max_size=12), after=pauses | st.timedeltas(), jitter=jitters)
def test_a_destination_may_ask_for_later_but_never_for_earlier_or_for_next_month(
    schedule: list[timedelta], after: timedelta, jitter: float
) -> None:
    without = next_attempt_at(schedule, 1, NOON, jitter)
    due = next_attempt_at(schedule, 1, NOON, jitter, after)

    assert without is not None
    assert due is not None
    assert due >= without
    assert due >= NOON + min(max(after, timedelta(0)), LONGEST_DEFERRAL)
    assert due <= max(without, NOON + LONGEST_DEFERRAL)


results = st.sampled_from(
    [SKIP, RETRY, Retry("busy", after=timedelta(hours=3)), REJECT, UNKNOWN, BROKEN, Ending.MOVED_ON, Ending.CONDITION]
)
answers_of_a_lookup = st.sampled_from([Ending.NOT_THERE, RETRY, REJECT, UNKNOWN, BROKEN])


@given(data=st.data(), schedule=schedules, handling=st.sampled_from(sorted(HANDLINGS)), jitter=jitters)
def test_every_delivery_ends(data: st.DataObject, schedule: list[timedelta], handling: str, jitter: float) -> None:
    can, in_doubt, now = HANDLINGS[handling], False, NOON
    for number in range(1, len(schedule) + 4):
        looking_up = in_doubt and can.looks_up
        result: Result = data.draw(answers_of_a_lookup if looking_up else results)
        attempt = Attempt(
            number=number,
            in_doubt=in_doubt,
            ended_at=now,
            doubt_ends_at=now + 20 * SECOND,
            handling=can,
            schedule=schedule,
            jitter=jitter,
        )
        settlement = settle(result, attempt)

        assert (settlement.reason is None) == (settlement.state is State.WAITING)
        assert (settlement.due_at is not None) == (settlement.state is State.WAITING)
        if settlement.state is not State.WAITING:
            return
        assert settlement.due_at is not None
        assert settlement.due_at >= now
        if not settlement.known:  # no lookup runs before the request in doubt has had its time
            assert settlement.due_at >= attempt.doubt_ends_at
        now, in_doubt = settlement.due_at, not settlement.known
    raise AssertionError("still waiting after the schedule, its last lookup and what that found")


@given(
    result=st.sampled_from([RETRY, Retry("busy", after=timedelta(hours=3)), UNKNOWN, Interrupted("shutdown")]),
    number=st.integers(1, 30),
    in_doubt=st.booleans(),
    handling=st.sampled_from(["looks up", "repeatable", "both"]),
    schedule=schedules,
    jitter=jitters,
)
def test_a_failure_in_a_paused_queue_makes_no_dead_letter_if_it_can_be_looked_up_or_repeated(
    result: Result, number: int, in_doubt: bool, handling: str, schedule: list[timedelta], jitter: float
) -> None:
    assume(not (in_doubt and is_past_last_lookup(number, schedule)))
    can = HANDLINGS[handling]
    attempt = replace(PAUSED, number=number, in_doubt=in_doubt, handling=can, schedule=schedule, jitter=jitter)

    settlement = settle(result, attempt)

    assert (settlement.state, settlement.counts) == (State.WAITING, False)
    assert settlement.due_at is not None
    assert settlement.due_at >= NOON
    if not settlement.known:
        assert settlement.due_at >= DOUBT_ENDS


@given(
    result=st.sampled_from([DONE, SKIP, RETRY, REJECT, UNKNOWN, MISCONFIGURED, BROKEN, *Ending]),
    number=st.integers(1, 4),
    in_doubt=st.booleans(),
    handling=st.sampled_from(sorted(HANDLINGS)),
)
def test_doubt_ends_only_with_a_known_outcome_or_a_repeatable_handler(
    result: Result, number: int, in_doubt: bool, handling: str
) -> None:
    can = HANDLINGS[handling]
    settlement = settle(result, replace(FIRST, number=number, in_doubt=in_doubt, handling=can))

    says_nothing = isinstance(result, Retry | Reject | Unknown | Misconfigured | Broken)
    if in_doubt and says_nothing and not can.repeatable and (can.looks_up or isinstance(result, Unknown)):
        assert not settlement.known
    if isinstance(result, Unknown) and not can.repeatable:
        assert not settlement.known
