"""Claims and attempts: values for the dispatcher, and the rows that they become."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from adapter.identifiers import Channel, kept_reference
from adapter.ledger.settlement import (
    Attempt,
    Handling,
    PausedBy,
    QueueState,
    Reason,
    Result,
    Settlement,
    State,
    outcome_name,
)
from adapter.moments import in_milliseconds, to_datetime, to_milliseconds
from adapter.plugin import Done, Outcome, Previous, Skip

LONGEST_MESSAGE = 1000


class QueueKey(NamedTuple):
    """A queue: one route for one merchant and channel."""

    route: str
    channel: Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """A queue to claim from. `concurrency` limits its held lanes over all nodes."""

    queue_id: int
    concurrency: int
    doubt_ms: int  # time after a claim during which no other process may act on the lane
    schedule: Sequence[timedelta]  # delays before the next claim if a process ends with its claim

    def due_after_death(self, attempts: int, now: int) -> int:
        """Return when a lane is due that is claimed now by a process that ends before it settles."""
        delay = in_milliseconds(self.schedule[min(attempts, len(self.schedule)) - 1]) if self.schedule else 0
        return now + max(self.doubt_ms, delay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lane held by this process, with the delivery to attempt. Moments are milliseconds."""

    lane_id: int
    holder: int
    number: int  # the fencing token
    in_doubt: bool
    doubt_ends_at: int
    queue_id: int
    delivery_id: int
    attempt: int  # counts from 1
    first_attempt_at: int
    claimed_at: int
    notification_id: int
    callback: str
    channel: Channel
    order_id: str
    identity: bytes
    received_at: int
    body: bytes | None  # None once pruned
    previous: Previous | None
    again_of: int | None = None  # of a resend: the delivery that is delivered again

    @property
    def fence(self) -> tuple[int, int]:
        """Return the pair that identifies this claim for ever."""
        return self.lane_id, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """New claims, and when the next lane becomes due; None if no lane waits."""

    claims: list[Claim]
    next_due_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """An attempt that has ended, with everything that decides what follows."""

    claim: Claim
    result: Result
    kind: str  # deliver or lookup
    handling: Handling
    schedule: Sequence[timedelta]
    jitter: float  # 0 to 1
    refetch: bool  # then a dead letter lets the lane continue: a later delivery reads the order as well
    keeps_lane: bool = False  # the handler still blocks its thread; `release` ends it
    has_text: bool = True  # False if the texts of the handler cannot be stored

    @property
    def outcome(self) -> str:
        """Return the name of the result, for people and metrics."""
        return outcome_name(self.result)

    @property
    def code(self) -> str | None:
        """Return the reason that the handler gave."""
        if isinstance(self.result, Skip):
            return self.result.reason
        return self.result.code if isinstance(self.result, Outcome) else None


def queue_state(row: Any) -> QueueState:
    """Read the state of a queue from its row."""
    return QueueState(
        paused_until=row.paused_until,
        paused_by=None if row.paused_by is None else PausedBy(row.paused_by),
        reason=row.pause_reason,
        failed_lanes=tuple(json.loads(row.failed_lanes or "[]")),
        pauses_in_row=row.pauses_in_row,
    )


def queue_columns(state: QueueState) -> dict[str, Any]:
    """Return the columns of a queue in this state."""
    return {
        "paused_until": state.paused_until,
        "paused_by": state.paused_by and state.paused_by.value,
        "pause_reason": state.reason,
        "failed_lanes": json.dumps(state.failed_lanes) if state.failed_lanes else None,
        "pauses_in_row": state.pauses_in_row,
    }


def claim_of(lane: Any, delivery: Any, limit: QueueLimits, *, holder: int, now: int) -> Claim:
    """Return the claim of a lane from its row and that of its delivery and notification."""
    return Claim(
        lane_id=lane.id,
        holder=holder,
        number=lane.claim + 1,
        in_doubt=lane.claim > lane.settled,
        doubt_ends_at=now + limit.doubt_ms,
        queue_id=lane.queue_id,
        delivery_id=delivery.delivery_id,
        attempt=delivery.attempts,
        first_attempt_at=delivery.first_attempt_at,
        claimed_at=now,
        notification_id=delivery.id,
        callback=delivery.callback,
        channel=Channel(delivery.merchant, delivery.channel),
        order_id=delivery.order_id,
        identity=delivery.identity,
        received_at=delivery.received_at,
        body=delivery.body,
        previous=_previous_of(lane.previous),
        again_of=delivery.again_of,
    )


def attempt_row(record: AttemptRecord, now: int) -> tuple[Any, ...]:
    """Return the columns of an attempt after its key, in their order."""
    message = None
    if record.has_text and isinstance(record.result, Outcome):
        message = record.result.message
        # It is deleted with the body.
        if record.result.explanation and record.claim.body is not None:
            message += f": {record.result.explanation}"
    return (
        record.claim.delivery_id,
        record.claim.number,
        record.kind,
        record.claim.claimed_at,
        now,
        record.outcome,
        record.code,
        None if message is None else message[:LONGEST_MESSAGE],
        record.result.reference if record.has_text and isinstance(record.result, Done) else None,
    )


def attempt_of(record: AttemptRecord, now: int, *, paused: bool = False) -> Attempt:
    """Return the facts that `settle` needs."""
    return Attempt(
        number=record.claim.attempt,
        in_doubt=record.claim.in_doubt,
        ended_at=to_datetime(now),
        doubt_ends_at=to_datetime(record.claim.doubt_ends_at),
        handling=record.handling,
        schedule=record.schedule,
        jitter=record.jitter,
        paused=paused,
    )


def continues(record: AttemptRecord, settlement: Settlement) -> bool:
    """Return whether the lane goes on to its next delivery."""
    stopped = settlement.state is State.DEAD and (settlement.holds_lane or not record.refetch)
    return settlement.state is not State.WAITING and not stopped


def delivery_change(record: AttemptRecord, settlement: Settlement, now: int) -> dict[str, Any]:
    """Return the new values of a settled delivery."""
    return {
        "delivery": record.claim.delivery_id,
        "state": settlement.state.value,
        "reason": settlement.reason and settlement.reason.value,
        "ended_at": None if settlement.reason is None else now,
        "uncounted": 0 if settlement.counts else 1,
        "reference": kept_reference(record.result.reference) if isinstance(record.result, Done) else None,
    }


def lane_change(record: AttemptRecord, settlement: Settlement, due: Collection[int], now: int) -> dict[str, Any]:
    """Return the new values of a settled lane.

    `due` holds the lanes in which another delivery waits.
    """
    claim, is_free = record.claim, continues(record, settlement)
    next_at = None
    if settlement.state is State.WAITING:
        next_at = now if settlement.due_at is None else to_milliseconds(settlement.due_at)
    elif is_free and claim.lane_id in due:
        next_at = now
    previous = None
    if settlement.reason is Reason.DELIVERED and isinstance(record.result, Done):
        reference, facts = (record.result.reference, record.result.facts) if record.has_text else (None, {})
        previous = json.dumps({"reference": reference, "facts": dict(facts), "at": now})
    return {
        "lane": claim.lane_id,
        "holder": claim.holder if record.keeps_lane else None,
        "settled": claim.number if settlement.known else None,
        "delivery": None if is_free else claim.delivery_id,
        "due": next_at,
        "previous": previous,
    }


def _previous_of(text: str | None) -> Previous | None:
    if text is None:
        return None
    value = json.loads(text)
    return Previous(reference=value["reference"], facts=value["facts"], at=to_datetime(value["at"]))
