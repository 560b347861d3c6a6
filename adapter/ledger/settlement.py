"""
What becomes of a delivery after an attempt: pure, values in, values out.

A delivery is *waiting*, *done* or *dead*, always with a reason once it is not waiting. The one thing a reader would get
wrong is doubt: an attempt *settles* its lane only when its outcome is known. After a crash, a deadline or a broken
connection nobody knows whether the far side acted, the lane stays in doubt, and nothing is sent again before the
handler has looked it up (or has declared that repeating does no harm).

| attempt ended with | in a lane not in doubt | after a lookup |
|---|---|---|
| `Done` | done, delivered | done, delivered |
| nothing there | - | waiting, due at once, doubt ended; dead: exhausted after the last attempt |
| `Skip`, moved on | done | - |
| `Retry` | waiting by the schedule, then dead: exhausted | waiting, still in doubt, then dead: unknown |
| `Reject` | dead: rejected | waiting, still in doubt, then dead: unknown |
| condition in error | dead: condition | - |
| a handler that never lets go of its thread | dead: unknown | the same |
| `Retry`, `Unknown`, nothing there in a paused queue | as above, but the attempt does not count | the same |
| `Misconfigured` | waiting, the queue pauses, the attempt does not count | the same, still in doubt |
| `Unknown`, deadline, bug, shutdown | looked up when due; repeated where repeatable; else dead: unknown | as `Retry` |
| released before the handler ran | waiting, due at once, the attempt does not count | the same, still in doubt |
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum

from adapter.moments import in_milliseconds
from adapter.plugin import Done, Misconfigured, NotificationHandler, Reject, Retry, Skip, Unknown, can_look_up

LARGEST_JITTER = 0.2
LONGEST_DEFERRAL = timedelta(hours=24)


class State(Enum):
    WAITING = "waiting"  # owed: due now, later, or being tried (then its lane has a holder)
    DONE = "done"  # nothing more will happen; the reason says why that is right
    DEAD = "dead"  # will not be tried again unless somebody retries it


class Reason(Enum):
    DELIVERED = "delivered"  # the handler said Done
    SKIPPED = "skipped"  # the handler said that there was nothing to do
    SUPERSEDED = "superseded"  # never tried: a newer snapshot of the order stands for it
    MOVED_ON = "moved_on"  # what held on receipt no longer held on the order as Norce has it
    DISCARDED = "discarded"  # a person said so
    REJECTED = "rejected"  # the destination or the handler can never take this order
    EXHAUSTED = "exhausted"  # the retry schedule is used up
    UNKNOWN = "unknown"  # nobody knows whether the effect is there; only a person may go on
    CONDITION = "condition"  # a condition could not be decided on this order


class Ending(Enum):
    """How an attempt ends when it is not the handler that says so."""

    NOT_THERE = "not_there"  # the lookup found no effect
    MOVED_ON = "moved_on"
    CONDITION = "condition"
    RELEASED = "released"  # given back before the handler was called
    BLOCKED = "blocked"  # the handler blocks its thread far past its deadline, and cannot be stopped


class Interrupted(Unknown):
    """It is we who ended the attempt, or never began it: unknown, but it says nothing about the far side."""


Result = Done | Skip | Retry | Reject | Unknown | Misconfigured | Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """What a route's handler can do about doubt."""

    looks_up: bool
    repeatable: bool

    @classmethod
    def of(cls, handler: type[NotificationHandler]) -> "Handling":  # type: ignore[type-arg]
        return cls(looks_up=can_look_up(handler), repeatable=handler.repeatable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """
    The facts about an attempt that decide what follows. `number` counts from 1; `jitter` is 0 to 1. In a queue that is
    paused a failure says nothing new about its order, so it uses up nothing of the schedule.
    """

    number: int
    in_doubt: bool
    ended_at: datetime
    doubt_ends_at: datetime
    handling: Handling
    schedule: Sequence[timedelta]
    jitter: float
    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """
    What to record. `known` says whether the outcome is known, which is what ends a lane's doubt; `due_at` is set for
    what waits; `counts` is False for an attempt that does not use up the schedule; `pauses` names why the queue stops.
    """

    state: State
    reason: Reason | None = None
    known: bool = True
    due_at: datetime | None = None
    counts: bool = True
    pauses: str | None = None

    @property
    def holds_lane(self) -> bool:
        """Whether even a route that re-reads the order must stop here: an unknown effect is never sent past."""
        return self.reason is Reason.UNKNOWN


def next_attempt_at(
    schedule: Sequence[timedelta],
    attempts: int,
    failed_at: datetime,
    jitter: float,
    not_before: timedelta | None = None,
) -> datetime | None:
    """
    When to try again, or None when the schedule is used up. Never earlier than the schedule says, at most 20 % later.

    A destination may ask for a later moment (`Retry-After`), never an earlier one, and never so late that a typo on its
    side parks an order for a month.
    """
    if attempts > len(schedule):
        return None
    due = failed_at + schedule[attempts - 1] * (1 + LARGEST_JITTER * min(max(jitter, 0.0), 1.0))
    if not_before is None:
        return due
    return max(due, failed_at + min(max(not_before, timedelta(0)), LONGEST_DEFERRAL))


def settle(result: Result, attempt: Attempt) -> Settlement:
    """What to record after an attempt that ended with `result`: the table above."""
    match result:
        case Done():
            return Settlement(state=State.DONE, reason=Reason.DELIVERED)
        case Ending.RELEASED:
            return _again(attempt, counts=False)
        case Misconfigured():
            return _again(attempt, counts=False, pauses=result.code)
        case Ending.BLOCKED:
            return Settlement(state=State.DEAD, reason=Reason.UNKNOWN, known=False)
        case Ending.NOT_THERE:
            if attempt.number > len(attempt.schedule) and not attempt.paused:
                return Settlement(state=State.DEAD, reason=Reason.EXHAUSTED)
            return Settlement(state=State.WAITING, due_at=attempt.ended_at, counts=not attempt.paused)
        case _ if attempt.in_doubt and attempt.handling.looks_up:
            after = result.after if isinstance(result, Retry) else None
            return _by_schedule(attempt, known=False, then=Reason.UNKNOWN, not_before=after)
        case Skip():
            return Settlement(state=State.DONE, reason=Reason.SKIPPED)
        case Ending.MOVED_ON:
            return Settlement(state=State.DONE, reason=Reason.MOVED_ON)
        case Ending.CONDITION:
            return Settlement(state=State.DEAD, reason=Reason.CONDITION)
        case Reject():
            return Settlement(state=State.DEAD, reason=Reason.REJECTED)
        case Retry():
            return _by_schedule(attempt, known=True, then=Reason.EXHAUSTED, not_before=result.after)
        case Unknown() if attempt.handling.looks_up:
            due = _due(attempt)
            due = max(due or attempt.doubt_ends_at, attempt.doubt_ends_at)  # the last attempt is looked up, too
            return Settlement(state=State.WAITING, known=False, due_at=due, counts=not attempt.paused)
        case Unknown() if attempt.handling.repeatable:
            return _by_schedule(attempt, known=True, then=Reason.EXHAUSTED)
    return Settlement(state=State.DEAD, reason=Reason.UNKNOWN, known=False)


def _again(attempt: Attempt, *, counts: bool, pauses: str | None = None) -> Settlement:
    known = not attempt.in_doubt
    return Settlement(state=State.WAITING, known=known, due_at=attempt.ended_at, counts=counts, pauses=pauses)


def _by_schedule(attempt: Attempt, *, known: bool, then: Reason, not_before: timedelta | None = None) -> Settlement:
    due = _due(attempt, not_before)
    if due is None:
        return Settlement(state=State.DEAD, reason=then, known=known)
    # The request in doubt must have had its time before anybody asks, or asks again.
    if then is Reason.UNKNOWN or attempt.handling.repeatable:
        due = max(due, attempt.doubt_ends_at)
    return Settlement(state=State.WAITING, known=known, due_at=due, counts=not attempt.paused)


def _due(attempt: Attempt, not_before: timedelta | None = None) -> datetime | None:
    number = attempt.number
    if attempt.paused:
        number = min(number, len(attempt.schedule))
        if number == 0:  # no retries at all; the pause itself is the wait
            return attempt.ended_at
    return next_attempt_at(attempt.schedule, number, attempt.ended_at, attempt.jitter, not_before)


FOR_EVER = 253_402_300_799_000  # the last second of the year 9999: until a person resumes


class PausedBy(Enum):
    FAILURES = "failures"  # so many in a row, over different orders
    RETRY_AFTER = "retry_after"  # the destination asked for time
    MISCONFIGURED = "misconfigured"  # until a person mends it and resumes, or the service starts anew
    PERSON = "person"


@dataclass(frozen=True, slots=True, kw_only=True)
class PausePolicy:
    """After how many orders that failed in a row a queue pauses (0: never), how long at first, and at the longest."""

    after_failures: int = 5
    first: timedelta = timedelta(seconds=30)
    longest: timedelta = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """How a queue stands. `reason` is a code, or a person's words; moments are milliseconds."""

    paused_until: int | None = None
    paused_by: PausedBy | None = None
    reason: str | None = None
    failed_lanes: tuple[int, ...] = ()
    pauses_in_row: int = 0

    def is_paused(self, now: int) -> bool:
        return self.paused_until is not None and self.paused_until > now

    def is_running(self) -> bool:
        return self.paused_until is None

    def room(self, concurrency: int, now: int) -> int:
        """How many lanes may be tried at once: all, one as a probe, or none."""
        if self.is_running():
            return concurrency
        return 0 if self.is_paused(now) else 1


RUNNING = QueueState()


def after_attempt(queue: QueueState, result: Result, lane_id: int, now: int, policy: PausePolicy) -> QueueState:
    """How the queue stands after an attempt on this lane; the same object where nothing has changed."""
    match result:
        case Misconfigured():
            if queue.is_paused(now) and queue.paused_by is PausedBy.PERSON:
                return queue
            return replace(queue, paused_until=FOR_EVER, paused_by=PausedBy.MISCONFIGURED, reason=result.code)
        case Done() | Skip() | Reject() | Ending.NOT_THERE:  # the far side has answered
            return queue if queue == RUNNING or queue.is_paused(now) else RUNNING
        case _ if queue.is_paused(now):  # it was under way when the pause began
            return queue
        case Interrupted():
            return queue
        case Retry() if result.after is not None and result.after > timedelta(0):
            until = now + in_milliseconds(min(result.after, LONGEST_DEFERRAL))
            return replace(queue, paused_until=until, paused_by=PausedBy.RETRY_AFTER, reason=result.code)
        case Retry() | Unknown():
            if queue.is_running() and policy.after_failures == 0:
                return queue
            failed = queue.failed_lanes if lane_id in queue.failed_lanes else (*queue.failed_lanes, lane_id)
            if queue.is_running() and len(failed) < policy.after_failures:
                return queue if failed == queue.failed_lanes else replace(queue, failed_lanes=failed)
            pause = min(policy.first * 2 ** min(queue.pauses_in_row, 20), policy.longest)
            return QueueState(
                paused_until=now + in_milliseconds(pause),
                paused_by=PausedBy.FAILURES,
                reason=result.code,
                pauses_in_row=queue.pauses_in_row + 1,
            )
    return queue  # it ended before the far side was asked: that says nothing about it
