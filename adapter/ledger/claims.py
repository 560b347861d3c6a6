"""
What passes between the lanes and those who work them, and the rows that it is made of and becomes.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from adapter.identifiers import Channel
from adapter.ledger.settlement import Attempt, PausedBy, QueueState, Reason, Result, Settlement, State
from adapter.moments import to_datetime, to_milliseconds
from adapter.plugin import Previous

LONGEST_MESSAGE = 1000


class QueueKey(NamedTuple):
    """A queue: one route for one merchant and channel."""

    route: str
    channel: Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """A queue to take work from: how many of its lanes all nodes may hold at once, how long a claim is in doubt."""

    queue_id: int
    concurrency: int
    doubt_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lane in this process's hands, with the delivery to try. `number` is the fence; `attempt` counts from 1."""

    lane_id: int
    holder: int
    number: int
    in_doubt: bool
    doubt_ends_at: int
    queue_id: int
    delivery_id: int
    attempt: int
    first_attempt_at: int
    claimed_at: int
    notification_id: int
    callback: str
    channel: Channel
    order_id: str
    identity: bytes
    received_at: int
    body: bytes | None
    previous: Previous | None

    @property
    def fence(self) -> tuple[int, int]:
        """What nobody else ever holds: the lane and the number of the claim."""
        return self.lane_id, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What a claim brought, and when the next queue will have a lane that is not due yet; None where nothing waits."""

    claims: list[Claim]
    next_due_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """
    How an attempt at a claim ended. `kind` is deliver or lookup; `outcome`, `code`, `message` and `reference` are for
    people.

    `passes` says whether a dead letter lets the lane go on (a route that re-reads the order needs only the newest).
    `keeps` the lane in this process's hands: the handler has not really ended; `release` gives it up.
    """

    claim: Claim
    result: Result
    attempt: Attempt
    kind: str
    outcome: str
    code: str | None = None
    message: str | None = None
    reference: str | None = None
    facts: Mapping[str, Any] | None = None
    passes: bool = True
    keeps: bool = False


def goes_on(record: Record, settlement: Settlement) -> bool:
    stopped = settlement.state is State.DEAD and (settlement.holds_lane or not record.passes)
    return settlement.state is not State.WAITING and not stopped


def claim_of(row: Any, lane: Any, *, holder: int, now: int, doubt_ms: int) -> Claim:
    """A lane's row and that of its delivery with the notification, as the claim that was just made of them."""
    return Claim(
        lane_id=lane.id,
        holder=holder,
        number=lane.claim + 1,
        in_doubt=lane.claim > lane.settled,
        doubt_ends_at=now + doubt_ms,
        queue_id=lane.queue_id,
        delivery_id=row.delivery_id,
        attempt=row.attempts,
        first_attempt_at=row.first_attempt_at,
        claimed_at=now,
        notification_id=row.id,
        callback=row.callback,
        channel=Channel(row.merchant, row.channel),
        order_id=row.order_id,
        identity=row.identity,
        received_at=row.received_at,
        body=row.body,
        previous=_previous(lane.previous),
    )


def delivery_after(record: Record, settlement: Settlement, now: int) -> dict[str, Any]:
    return {
        "delivery": record.claim.delivery_id,
        "becomes": settlement.state.value,
        "because": settlement.reason and settlement.reason.value,
        "at": None if settlement.reason is None else now,
        "uncounted": 0 if settlement.counts else 1,
    }


def lane_after(record: Record, settlement: Settlement, more: Collection[int], now: int) -> dict[str, Any]:
    claim = record.claim
    going_on = goes_on(record, settlement)
    due = None
    if settlement.state is State.WAITING:
        due = now if settlement.due_at is None else to_milliseconds(settlement.due_at)
    elif going_on and claim.lane_id in more:
        due = now
    done = None
    if settlement.reason is Reason.DELIVERED:
        done = json.dumps({"reference": record.reference, "facts": dict(record.facts or {}), "at": now})
    return {
        "lane": claim.lane_id,
        "by": claim.holder if record.keeps else None,
        "number": claim.number if settlement.known else None,
        "delivery": None if going_on else claim.delivery_id,
        "due": due,
        "done": done,
    }


def attempt_row(record: Record, now: int) -> tuple[Any, ...]:
    """The columns of the table after its key, in their order."""
    return (
        record.claim.delivery_id,
        record.claim.number,
        record.kind,
        record.claim.claimed_at,
        now,
        record.outcome,
        record.code,
        None if record.message is None else record.message[:LONGEST_MESSAGE],
        record.reference,
    )


def pausing_of(row: Any) -> QueueState:
    return QueueState(
        paused_until=row.paused_until,
        paused_by=None if row.paused_by is None else PausedBy(row.paused_by),
        reason=row.pause_reason,
        failed_lanes=tuple(json.loads(row.failed_lanes or "[]")),
        pauses_in_row=row.pauses_in_row,
    )


def queue_columns(pausing: QueueState) -> dict[str, Any]:
    return {
        "paused_until": pausing.paused_until,
        "paused_by": pausing.paused_by and pausing.paused_by.value,
        "pause_reason": pausing.reason,
        "failed_lanes": json.dumps(pausing.failed_lanes) if pausing.failed_lanes else None,
        "pauses_in_row": pausing.pauses_in_row,
    }


def _previous(text: str | None) -> Previous | None:
    if text is None:
        return None
    value = json.loads(text)
    return Previous(reference=value["reference"], facts=value["facts"], at=to_datetime(value["at"]))
