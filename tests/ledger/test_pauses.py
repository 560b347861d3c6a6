"""Pauses of queues: every state of a queue, and every ending of an attempt."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.ledger.settlement import (
    FOR_EVER,
    MOST_PASSED_OVER,
    RUNNING,
    Broken,
    Ending,
    Interrupted,
    PausedBy,
    PausePolicy,
    QueueState,
    Result,
    after_attempt,
)
from adapter.plugin import Done, Misconfigured, Reject, Retry, Skip, Unknown

NOON = 1_770_120_000_000
SECOND = 1_000
POLICY = PausePolicy(after_failures=3, first=timedelta(seconds=30), longest=timedelta(seconds=100))

DONE = Done()
RETRY = Retry("destination-busy")
LATER = Retry("destination-busy", after=timedelta(seconds=90))
UNKNOWN = Unknown("no-answer")
MISCONFIGURED = Misconfigured("destination-unauthorized")
ANSWERS = [DONE, Skip("nothing-changed"), Reject("no-such-shop"), Ending.NOT_THERE]
FAILURES = [RETRY, UNKNOWN, MISCONFIGURED, Broken("handler-failed")]
# The far side was not asked, or it is we who did not let it answer.
SAY_NOTHING = [
    Ending.MOVED_ON, Ending.CONDITION, Ending.RELEASED, Ending.BLOCKED,
    Interrupted("shutdown"), Interrupted("in-doubt"),
]  # fmt: skip

FAILING = replace(RUNNING, failed_lanes=(1, 2))
PAUSED = QueueState(
    paused_until=NOON + SECOND, paused_by=PausedBy.FAILURES, reason="destination-busy", pauses_in_row=1
)  # fmt: skip
PROBING = replace(PAUSED, paused_until=NOON)
REFUSED = replace(PAUSED, paused_by=PausedBy.MISCONFIGURED, reason="destination-unauthorized")
STOPPED = QueueState(paused_until=FOR_EVER, paused_by=PausedBy.PERSON, reason="the shop moves house")
PAUSES = {"failures": PAUSED, "misconfigured": REFUSED, "person": STOPPED}


def after(queue: QueueState, *ends: tuple[int, Result], policy: PausePolicy = POLICY) -> QueueState:
    """Return the state after these attempts, which all end at noon."""
    for lane_id, result in ends:
        queue = after_attempt(queue, result, lane_id, NOON, policy)
    return queue


def called(value: object) -> str:
    return value.value if isinstance(value, Ending) else repr(value)


# --- failures in a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES, ids=called)
def test_failures_in_a_row_over_different_orders_pause_the_queue(failure: Result) -> None:
    queue = after(RUNNING, (1, failure), (2, failure))
    assert queue.is_running()

    assert after(queue, (3, failure)) == QueueState(
        paused_until=NOON + 30 * SECOND,
        paused_by=PausedBy.MISCONFIGURED if failure is MISCONFIGURED else PausedBy.FAILURES,
        reason=failure.code,  # type: ignore[union-attr]
        failed_lanes=(1, 2, 3),
        pauses_in_row=1,
    )


@pytest.mark.parametrize("failure", FAILURES, ids=called)
def test_failures_of_one_order_never_pause_a_queue(failure: Result) -> None:
    queue = after(RUNNING, *[(1, failure)] * 50)

    assert queue == replace(RUNNING, failed_lanes=(1,))


def test_an_order_that_fails_again_changes_nothing() -> None:
    assert after_attempt(FAILING, RETRY, 1, NOON, POLICY) is FAILING


@pytest.mark.parametrize("answer", ANSWERS, ids=called)
def test_any_answer_of_the_far_side_ends_the_row(answer: Result) -> None:
    assert after(FAILING, (3, answer)) == RUNNING


@pytest.mark.parametrize("nothing", SAY_NOTHING, ids=called)
@pytest.mark.parametrize("queue", [RUNNING, FAILING, PROBING, *PAUSES.values()])
def test_an_attempt_that_did_not_reach_the_destination_changes_nothing(queue: QueueState, nothing: Result) -> None:
    assert after_attempt(queue, nothing, 9, NOON, POLICY) is queue


def test_a_queue_that_runs_well_is_not_written_again() -> None:
    assert after_attempt(RUNNING, DONE, 1, NOON, POLICY) is RUNNING


def test_without_a_number_of_failures_no_queue_pauses_by_itself() -> None:
    never = replace(POLICY, after_failures=0)

    assert after(RUNNING, *((lane, RETRY) for lane in range(100)), policy=never) is RUNNING


# --- what the far side asks for, and what only a person can mend ----------------------------------------------------


@pytest.mark.parametrize("later", [LATER, Unknown("destination-busy", after=LATER.after)], ids=called)
def test_retry_after_pauses_the_whole_queue_at_once(later: Result) -> None:
    assert after(RUNNING, (1, later)) == QueueState(
        paused_until=NOON + 90 * SECOND, paused_by=PausedBy.RETRY_AFTER, reason="destination-busy", failed_lanes=(1,)
    )


def test_a_destination_that_asks_for_a_month_gets_a_probe_after_the_longest_pause() -> None:
    queue = after(RUNNING, (1, Retry("destination-busy", after=timedelta(days=30))))

    assert queue.paused_until == NOON + 100 * SECOND


def test_one_order_that_is_always_told_to_come_later_does_not_hold_up_the_others() -> None:
    assert after_attempt(RUNNING, LATER, 1, NOON, POLICY, is_retry=True) == replace(RUNNING, failed_lanes=(1,))
    assert after_attempt(FAILING, LATER, 3, NOON, POLICY, is_retry=True).paused_by is PausedBy.FAILURES
    assert after_attempt(PROBING, LATER, 1, NOON, POLICY, is_retry=True).paused_by is PausedBy.RETRY_AFTER


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_retry_after_of_zero_counts_as_a_failure(seconds: int) -> None:
    queue = after(RUNNING, (1, Retry("destination-busy", after=timedelta(seconds=seconds))))

    assert queue == replace(RUNNING, failed_lanes=(1,))


def test_broken_credentials_pause_the_queue_like_other_failures_and_a_probe_ends_the_pause() -> None:
    paused = after(RUNNING, (1, MISCONFIGURED), (2, MISCONFIGURED), (3, MISCONFIGURED))

    assert (paused.paused_until, paused.paused_by) == (NOON + 30 * SECOND, PausedBy.MISCONFIGURED)
    assert after(replace(paused, paused_until=NOON), (4, DONE)) == RUNNING


# --- while it is paused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [*ANSWERS, *FAILURES, LATER, *SAY_NOTHING], ids=called)
@pytest.mark.parametrize("queue", PAUSES.values(), ids=PAUSES)
def test_an_attempt_from_before_the_pause_neither_ends_nor_prolongs_it(queue: QueueState, result: Result) -> None:
    assert after_attempt(queue, result, 9, NOON, POLICY) is queue


@pytest.mark.parametrize("result", [*ANSWERS, *FAILURES, LATER, *SAY_NOTHING], ids=called)
def test_a_persons_pause_is_never_overwritten(result: Result) -> None:
    assert after_attempt(STOPPED, result, 9, NOON, POLICY) is STOPPED


# --- when it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "room"),
    [
        pytest.param(RUNNING, 8, id="running: all"),
        pytest.param(FAILING, 8, id="with failures in a row: all"),
        pytest.param(PAUSED, 0, id="paused: none"),
        pytest.param(REFUSED, 0, id="misconfigured: none"),
        pytest.param(STOPPED, 0, id="by a person: none"),
        pytest.param(PROBING, 1, id="at the end of the pause: one"),
        pytest.param(replace(PAUSED, paused_until=NOON - 3600 * SECOND), 1, id="long after it: still one"),
    ],
)
def test_how_many_may_be_tried_at_once(queue: QueueState, room: int) -> None:
    assert queue.room(8, NOON) == room


@pytest.mark.parametrize("answer", ANSWERS, ids=called)
def test_a_probe_that_is_answered_lets_the_queue_run(answer: Result) -> None:
    assert after(PROBING, (1, answer)) == RUNNING


@pytest.mark.parametrize("failure", FAILURES, ids=called)
def test_a_probe_that_fails_doubles_the_pause_up_to_the_longest(failure: Result) -> None:
    queue, pauses = PROBING, []
    for probe in range(4):
        queue = after(replace(queue, paused_until=NOON), (probe, failure))
        pauses.append(((queue.paused_until or 0) - NOON) // SECOND)

    assert pauses == [60, 100, 100, 100]
    assert queue.failed_lanes == (0, 1, 2, 3)


def test_a_probe_that_fails_again_is_the_latest_and_the_oldest_are_forgotten() -> None:
    queue = replace(PROBING, failed_lanes=tuple(range(MOST_PASSED_OVER)))

    again = after(queue, (7, RETRY))
    other = after(queue, (4711, RETRY))

    assert again.failed_lanes == (*range(7), *range(8, MOST_PASSED_OVER), 7)
    assert other.failed_lanes == (*range(1, MOST_PASSED_OVER), 4711)


def test_the_same_order_may_be_the_probe_that_fails() -> None:
    queue = after(FAILING, (3, RETRY))

    again = after(replace(queue, paused_until=NOON), (3, RETRY))

    assert again.paused_until == NOON + 60 * SECOND


def test_a_probe_that_gets_a_retry_after_pauses_for_that_time() -> None:
    queue = after(PROBING, (1, LATER))

    assert (queue.paused_until, queue.paused_by) == (NOON + 90 * SECOND, PausedBy.RETRY_AFTER)


def test_after_an_answer_the_next_pause_is_as_short_as_the_first() -> None:
    queue = after(replace(PROBING, pauses_in_row=7), (1, DONE), (1, RETRY), (2, RETRY), (3, RETRY))

    assert queue.paused_until == NOON + 30 * SECOND


def test_retry_after_pauses_a_queue_that_failures_never_pause() -> None:
    never = replace(POLICY, after_failures=0)

    paused = after(RUNNING, (1, LATER), policy=never)
    again = after(replace(paused, paused_until=NOON), (1, RETRY), policy=never)

    assert paused.is_paused(NOON)
    assert again.is_paused(NOON)  # a probe that fails is no queue that runs


@pytest.mark.parametrize(
    ("queue", "is_by_others"),
    [
        pytest.param(RUNNING, False, id="running"),
        pytest.param(replace(RUNNING, failed_lanes=(2,)), False, id="running after a failure"),
        pytest.param(replace(PROBING, failed_lanes=(1,)), False, id="for this lane alone"),
        pytest.param(replace(PROBING, failed_lanes=(2,)), True, id="for another lane"),
        pytest.param(replace(PROBING, failed_lanes=(2, 1)), True, id="for both"),
        pytest.param(replace(STOPPED, failed_lanes=(1,)), True, id="by a person"),
    ],
)
def test_a_failure_says_something_about_its_order_unless_others_paused_the_queue(
    queue: QueueState, is_by_others: bool
) -> None:
    assert queue.is_paused_by_others(1) is is_by_others


# --- random sequences -------------------------------------------------------------------------------------------------

results = st.sampled_from([*ANSWERS, *FAILURES, LATER, *SAY_NOTHING])
policies = st.builds(
    PausePolicy,
    after_failures=st.integers(0, 5),
    first=st.timedeltas(timedelta(milliseconds=100), timedelta(days=1)),
    longest=st.timedeltas(timedelta(milliseconds=100), timedelta(days=1)),
)
attempts = st.lists(st.tuples(st.integers(1, 6), results, st.integers(0, 200 * SECOND)), max_size=40)


@given(policy=policies, attempts=attempts)
def test_a_pause_has_a_reason_and_is_never_longer_than_the_longest(
    policy: PausePolicy, attempts: list[tuple[int, Result, int]]
) -> None:
    queue, now = RUNNING, NOON
    for lane_id, result, later in attempts:
        now += later
        queue = after_attempt(queue, result, lane_id, now, policy)

        assert (queue.paused_until is None) == (queue.paused_by is None) == (queue.reason is None)
        if queue.paused_until is not None:
            assert queue.paused_until <= now + policy.longest // timedelta(milliseconds=1)
        if queue.is_running() and policy.after_failures:
            assert len(queue.failed_lanes) < policy.after_failures


@given(policy=policies, attempts=attempts)
def test_after_any_pause_one_answer_of_the_destination_makes_the_queue_run(
    policy: PausePolicy, attempts: list[tuple[int, Result, int]]
) -> None:
    queue, now = RUNNING, NOON
    for lane_id, result, later in attempts:
        now += later
        queue = after_attempt(queue, result, lane_id, now, policy)

    ended = max(now, queue.paused_until or 0)
    assert queue.is_running() or queue.room(8, ended) == 1
    assert after_attempt(queue, DONE, 1, ended, policy) == RUNNING
