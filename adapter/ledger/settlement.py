"""Settlement: the next state of a delivery and of its queue after an attempt.

The functions are pure. A delivery is waiting, done or dead, and has a reason once it no longer waits. Doubt is easy to
get wrong: an attempt settles its lane only if its outcome is known. After a crash, a deadline or a broken connection it
is unknown whether the destination acted. The lane is then in doubt, and nothing is sent again before the handler has
looked it up, unless the handler declares that a repetition does no harm. `settle` computes the state of the delivery:

| the attempt ended with | in a lane that is not in doubt | after a lookup |
|---|---|---|
| `Done` | done: delivered | done: delivered |
| no effect found | - | waiting, due at once, no doubt; after the last attempt dead: exhausted |
| `Skip`, moved on | done | - |
| `Retry` or `Misconfigured` | waiting by the schedule, then dead: exhausted | still in doubt, then dead: unknown |
| `Reject` | dead: rejected | still in doubt, then dead: unknown |
| a bug before anything was sent | dead: broken | as `Reject` |
| a condition in error | dead: condition | - |
| a handler that blocks its thread for good | dead: unknown | the same |
| a failure or no effect found, in a queue that others paused | the same, but the attempt does not count | the same |
| `Unknown`, a deadline or bug too | waiting for a lookup; a retry if repeatable; else dead: unknown | as `Retry` |
| released before anything was sent | waiting, due at once, the attempt does not count | the same, still in doubt |

A claim counts as an attempt, because a delivery may end the process before it is settled. A delivery that is still in
doubt after its schedule and its last lookup is dead: unknown.

`after_attempt` computes the state of the queue: it pauses after consecutive failures of different orders, and when the
destination asks for time (`Retry-After`). After the pause one lane is tried as a probe, each time another one, so that
one order never holds up the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import get_args

from adapter.moments import in_milliseconds
from adapter.plugin import Done, Misconfigured, NotificationHandler, Outcome, Reject, Retry, Skip, Unknown, can_look_up

LARGEST_JITTER = 0.2
LONGEST_DEFERRAL = timedelta(hours=24)
MOST_PASSED_OVER = 100  # lanes that a probe passes over
FOR_EVER = 253_402_300_799_000  # the last second of the year 9999: until a person resumes


class State(Enum):
    """The states of a delivery."""

    WAITING = "waiting"  # due now or later, or being attempted (then its lane has a holder)
    DONE = "done"  # finished; the reason says how
    DEAD = "dead"  # not attempted again unless a person retries it


class Reason(Enum):
    """The reasons why a delivery no longer waits."""

    DELIVERED = "delivered"  # the handler returned Done
    SKIPPED = "skipped"  # the handler found nothing to do
    SUPERSEDED = "superseded"  # never attempted: a later event of the order replaces it
    MOVED_ON = "moved_on"  # a condition that held on receipt no longer holds for the order at Norce
    SHADOW = "shadow"  # its route is in shadow mode, which sends nothing
    DISCARDED = "discarded"  # by a person
    REJECTED = "rejected"  # the destination or the handler can never accept this order
    EXHAUSTED = "exhausted"  # the retry schedule is used up
    UNKNOWN = "unknown"  # the effect may or may not be there; only a person may continue
    CONDITION = "condition"  # a condition could not be evaluated on this order
    BROKEN = "broken"  # the handler has a bug; nothing was sent


class Ending(Enum):
    """The endings of an attempt that are not outcomes of the handler."""

    NOT_THERE = "not_there"  # the lookup found no effect
    MOVED_ON = "moved_on"
    CONDITION = "condition"
    RELEASED = "released"  # by the service, before anything was sent
    BLOCKED = "blocked"  # the handler blocks its thread far past its deadline and cannot be stopped


class Interrupted(Unknown):
    """The service ended the attempt or never began it.

    Its outcome says nothing about the destination.
    """


class Broken(Outcome):
    """The handler has a bug, and nothing was sent in this attempt."""


Result = Done | Skip | Retry | Reject | Unknown | Misconfigured | Broken | Ending


def outcome_name(result: Result) -> str:
    """Return the name of a result. A plugin's subclass has the name of its base."""
    if isinstance(result, Ending):
        return result.value
    kind: type = next(kind for kind in get_args(Result) if isinstance(result, kind))
    return kind.__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """The ways in which a handler can resolve doubt."""

    looks_up: bool
    repeatable: bool
    looks_up_resends: bool = False

    @classmethod
    def of(cls, handler: type[NotificationHandler]) -> "Handling":  # type: ignore[type-arg]
        """Read them from a handler class."""
        looks_up = can_look_up(handler)
        return cls(
            looks_up=looks_up, repeatable=handler.repeatable, looks_up_resends=looks_up and handler.lookup_by_key
        )

    def of_resend(self) -> "Handling":
        """Return the ways for a resend.

        Its lookup must not find the effect of an earlier delivery. Without such a lookup, a person decides, because a
        person has asked for it.
        """
        return replace(self, looks_up=self.looks_up_resends, repeatable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The facts about an attempt that decide what follows."""

    number: int  # counts from 1
    in_doubt: bool
    ended_at: datetime
    doubt_ends_at: datetime
    handling: Handling
    schedule: Sequence[timedelta]
    jitter: float  # 0 to 1
    paused: bool = False  # by others: a failure then says nothing about its order and uses up no retry


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The next state of a delivery."""

    state: State
    reason: Reason | None = None
    known: bool = True  # a known outcome ends the lane's doubt
    due_at: datetime | None = None  # set while the delivery waits
    counts: bool = True  # False if the attempt does not use up the schedule

    @property
    def holds_lane(self) -> bool:
        """Return whether the lane must stop even if its route reads the order again."""
        return self.reason is Reason.UNKNOWN


def next_attempt_at(
    schedule: Sequence[timedelta],
    attempts: int,
    failed_at: datetime,
    jitter: float,
    not_before: timedelta | None = None,
) -> datetime | None:
    """Return the time of the next attempt, or None if the schedule is used up.

    It is never earlier than the schedule says and at most 20 % later. A destination may ask for a later time
    (`Retry-After`), never an earlier one. The delay is capped, so that a typo at the destination cannot park an order
    for a month.

    Args:
        schedule: The delays after each attempt.
        attempts: The attempts that were made.
        failed_at: The end of the last one.
        jitter: The part of the longest jitter to add, 0 to 1.
        not_before: The delay that the destination asked for.
    """
    if attempts > len(schedule):
        return None
    due = failed_at + schedule[attempts - 1] * (1 + LARGEST_JITTER * jitter)
    if not_before is None:
        return due
    return max(due, failed_at + min(max(not_before, timedelta(0)), LONGEST_DEFERRAL))


def settle(result: Result, attempt: Attempt) -> Settlement:
    """Return the next state of the delivery, by the table above."""
    match result:
        case Done():
            return Settlement(state=State.DONE, reason=Reason.DELIVERED)
        case Ending.RELEASED:
            known = not attempt.in_doubt
            return Settlement(state=State.WAITING, known=known, due_at=attempt.ended_at, counts=False)
        case Ending.BLOCKED:
            return Settlement(state=State.DEAD, reason=Reason.UNKNOWN, known=False)
        case Ending.NOT_THERE:
            if attempt.number > len(attempt.schedule) and not attempt.paused:
                return Settlement(state=State.DEAD, reason=Reason.EXHAUSTED)
            return Settlement(state=State.WAITING, due_at=attempt.ended_at, counts=not attempt.paused)
        case Unknown() if attempt.in_doubt and is_past_last_lookup(attempt.number, attempt.schedule):
            return Settlement(state=State.DEAD, reason=Reason.UNKNOWN, known=False)
        case _ if attempt.in_doubt and attempt.handling.looks_up:
            after = result.after if isinstance(result, Retry | Unknown) else None
            return _by_schedule(attempt, known=False, then=Reason.UNKNOWN, not_before=after)
        case Skip():
            return Settlement(state=State.DONE, reason=Reason.SKIPPED)
        case Ending.MOVED_ON:
            return Settlement(state=State.DONE, reason=Reason.MOVED_ON)
        case Ending.CONDITION:
            return Settlement(state=State.DEAD, reason=Reason.CONDITION)
        case Reject():
            return Settlement(state=State.DEAD, reason=Reason.REJECTED)
        case Broken():
            return Settlement(state=State.DEAD, reason=Reason.BROKEN)
        case Retry():
            return _by_schedule(attempt, known=True, then=Reason.EXHAUSTED, not_before=result.after)
        case Misconfigured():
            return _by_schedule(attempt, known=True, then=Reason.EXHAUSTED)
        case Unknown() if attempt.handling.looks_up:
            due = _due_at(attempt, result.after)
            due = max(due or attempt.doubt_ends_at, attempt.doubt_ends_at)  # the last attempt is looked up as well
            return Settlement(state=State.WAITING, known=False, due_at=due, counts=not attempt.paused)
        case Unknown() if attempt.handling.repeatable:
            return _by_schedule(attempt, known=True, then=Reason.EXHAUSTED, not_before=result.after)
    return Settlement(state=State.DEAD, reason=Reason.UNKNOWN, known=False)


def is_past_last_lookup(number: int, schedule: Sequence[timedelta]) -> bool:
    """Return whether this attempt comes after the lookup that ends the schedule."""
    return number > len(schedule) + 2


def _by_schedule(attempt: Attempt, *, known: bool, then: Reason, not_before: timedelta | None = None) -> Settlement:
    due = _due_at(attempt, not_before)
    if due is None:
        return Settlement(state=State.DEAD, reason=then, known=known)
    # Before a lookup or a repetition, the request in doubt must have had its time.
    if then is Reason.UNKNOWN or attempt.handling.repeatable:
        due = max(due, attempt.doubt_ends_at)
    return Settlement(state=State.WAITING, known=known, due_at=due, counts=not attempt.paused)


def _due_at(attempt: Attempt, not_before: timedelta | None = None) -> datetime | None:
    number = attempt.number
    if attempt.paused:
        number = min(number, len(attempt.schedule))
        if number == 0:  # a schedule without retries: the pause is the delay
            return attempt.ended_at
    return next_attempt_at(attempt.schedule, number, attempt.ended_at, attempt.jitter, not_before)


class PausedBy(Enum):
    """The causes of a pause."""

    FAILURES = "failures"  # consecutive failures of different orders
    RETRY_AFTER = "retry_after"  # the destination asked for time
    MISCONFIGURED = "misconfigured"  # the same, and the last one for broken credentials; a restart ends it
    PERSON = "person"  # until a person resumes the queue


@dataclass(frozen=True, slots=True, kw_only=True)
class PausePolicy:
    """The rules for pausing a queue after failures."""

    after_failures: int  # orders that failed one after another; 0: never
    first: timedelta  # doubles with each further pause
    longest: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """The state of a queue: running, paused until a moment, or probing after that moment."""

    paused_until: int | None = None  # milliseconds
    paused_by: PausedBy | None = None
    reason: str | None = None  # a code, or the words of a person
    failed_lanes: tuple[int, ...] = ()  # since the last answer, the latest last; a probe passes them over
    pauses_in_row: int = 0

    def is_paused(self, now: int) -> bool:
        """Return whether the pause still lasts."""
        return self.paused_until is not None and self.paused_until > now

    def is_running(self) -> bool:
        """Return whether there is neither a pause nor a probe."""
        return self.paused_until is None

    def is_paused_by_others(self, lane_id: int) -> bool:
        """Return whether a person, or failures on other lanes too, keep the queue from running."""
        return not self.is_running() and (self.paused_by is PausedBy.PERSON or self.failed_lanes != (lane_id,))

    def room(self, concurrency: int, now: int) -> int:
        """Return how many lanes may be held at once: all, one as a probe, or none."""
        if self.is_running():
            return concurrency
        return 0 if self.is_paused(now) else 1


RUNNING = QueueState()


def after_attempt(
    queue: QueueState, result: Result, lane_id: int, now: int, policy: PausePolicy, *, is_retry: bool = False
) -> QueueState:
    """Return the state of the queue after an attempt on this lane.

    It is the same object if nothing has changed. A retry that is told to come later, while other orders pass, counts
    as a failure and does not pause the queue by itself.
    """
    is_one_of_many = is_retry and queue.is_running()
    match result:
        case Done() | Skip() | Reject() | Ending.NOT_THERE:  # the destination has answered
            return queue if queue == RUNNING or queue.is_paused(now) else RUNNING
        case _ if queue.is_paused(now):  # the attempt began before the pause
            return queue
        case Interrupted():
            return queue
        case Retry(after=after) | Unknown(after=after) if after and after > timedelta(0) and not is_one_of_many:
            pause, cause, pauses = min(after, policy.longest), PausedBy.RETRY_AFTER, queue.pauses_in_row
        case Retry() | Unknown() | Misconfigured() | Broken():
            if queue.is_running():
                if policy.after_failures == 0 or lane_id in queue.failed_lanes:
                    return queue
                if len(queue.failed_lanes) + 1 < policy.after_failures:
                    return replace(queue, failed_lanes=(*queue.failed_lanes, lane_id))
            pause = min(policy.first * 2 ** min(queue.pauses_in_row, 20), policy.longest)
            cause = PausedBy.MISCONFIGURED if isinstance(result, Misconfigured) else PausedBy.FAILURES
            pauses = queue.pauses_in_row + 1
        case _:
            return queue  # the attempt ended before the destination was asked
    failed = [*(each for each in queue.failed_lanes if each != lane_id), lane_id]
    return QueueState(
        paused_until=now + in_milliseconds(pause),
        paused_by=cause,
        reason=result.code,
        failed_lanes=tuple(failed[-MOST_PASSED_OVER:]),
        pauses_in_row=pauses,
    )
