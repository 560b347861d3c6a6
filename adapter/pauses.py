"""
When a queue pauses, and when it goes on: pure, values in, values out.

A queue is one route for one merchant and channel. That it is paused, until when and by what, does the work of a circuit
breaker, of `Retry-After`, of broken credentials and of a person's "stop". When a pause ends, one lane is tried (the
*probe*); the queue runs again when an attempt succeeds. What a reader would get wrong: `paused_until` in the past does
not mean running, it means probing; running is None.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum

from adapter.deliveries import LONGEST_DEFERRAL, Ending, Interrupted, Result
from adapter.plugin import Done, Misconfigured, Reject, Retry, Skip, Unknown

FOR_EVER = 253_402_300_799_000  # the last second of the year 9999: until a person resumes


class PausedBy(Enum):
    FAILURES = "failures"  # so many in a row, over different orders
    RETRY_AFTER = "retry_after"  # the destination asked for time
    MISCONFIGURED = "misconfigured"  # until a person mends it and resumes, or the service starts anew
    PERSON = "person"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """After how many orders that failed in a row a queue pauses (0: never), how long at first, and at the longest."""

    after_failures: int = 5
    first: timedelta = timedelta(seconds=30)
    longest: timedelta = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pausing:
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


RUNNING = Pausing()


def after_attempt(queue: Pausing, result: Result, lane_id: int, now: int, policy: Policy) -> Pausing:
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
            until = now + _ms(min(result.after, LONGEST_DEFERRAL))
            return replace(queue, paused_until=until, paused_by=PausedBy.RETRY_AFTER, reason=result.code)
        case Retry() | Unknown():
            if queue.is_running() and policy.after_failures == 0:
                return queue
            failed = queue.failed_lanes if lane_id in queue.failed_lanes else (*queue.failed_lanes, lane_id)
            if queue.is_running() and len(failed) < policy.after_failures:
                return queue if failed == queue.failed_lanes else replace(queue, failed_lanes=failed)
            pause = min(policy.first * 2 ** min(queue.pauses_in_row, 20), policy.longest)
            return Pausing(
                paused_until=now + _ms(pause),
                paused_by=PausedBy.FAILURES,
                reason=result.code,
                pauses_in_row=queue.pauses_in_row + 1,
            )
    return queue  # it ended before the far side was asked: that says nothing about it


def _ms(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)
