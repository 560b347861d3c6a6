"""
Handing out work, and recording what became of it: claim, settle, release.

A lane (one order on one route) is what is claimed; one delivery of it is tried at a time, in the order of the
snapshots, and nothing goes before a delivery that has been attempted. `claim` counts up for ever and is the fence: who
settles with an older number has lost the lane and records nothing. A claim sets `next_at` to the moment when the doubt
about it would end, so that a process which dies leaves the lane due at the right time, without anybody's doing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from adapter.deliveries import Reason, Settlement, State
from adapter.ledger.schema import attempts, deliveries, lanes, notifications, processes, queues
from adapter.ledger.store import Store
from adapter.plugin import Previous

FOR_EVER = 253_402_300_799_000  # the last second of the year 9999: paused until a person resumes
LONGEST_MESSAGE = 1000
LEASE_MS = 15_000


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueKey:
    """A queue: one route for one merchant and channel."""

    route: str
    merchant: str
    channel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How many lanes of one queue there is room for, and how long a claim of it stays in doubt."""

    queue_id: int
    most: int
    doubt_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lane in this process's hands, with the delivery to try. `number` is the fence; `attempt` counts from 1."""

    lane_id: int
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
    merchant: str
    channel: str
    order_id: str
    identity: bytes
    received_at: int
    body: bytes | None
    previous: Previous | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """
    What became of a claim. `kind` is deliver or lookup; `outcome`, `code`, `message` and `reference` are for people.

    `passes` says whether a dead letter lets the lane go on (a route that re-reads the order needs only the newest).
    """

    claim: Claim
    settlement: Settlement
    kind: str
    outcome: str
    code: str | None = None
    message: str | None = None
    reference: str | None = None
    facts: Mapping[str, Any] | None = None
    passes: bool = True


class Lanes:
    """Work for one process. `enter` first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock
        self._process_id = 0
        self._turn = 0

    async def enter(self, keys: Sequence[QueueKey], *, version: str) -> dict[QueueKey, int]:
        """
        Registers this process, makes the queues that are new, and frees what a dead process held.

        Pauses for broken credentials end here: whoever starts the service has mended them. Answers the queues' ids.
        """
        return await self._store.write(self._enter, (tuple(keys), version))

    async def claim(self, asks: Sequence[Ask], most: int) -> list[Claim]:
        """
        Takes at most `most` due lanes, queue by queue in turn, never more of a queue than asked. Then it is on disk.

        Raises `StoreUnavailable`.
        """
        return await self._store.write(self._claim, (tuple(asks), most))

    async def settle(self, record: Record) -> bool:
        """Writes attempt, delivery, lane and pause in one transaction. False where the lane was lost meanwhile."""
        return await self._store.write(self._settle, record)

    async def beat(self) -> None:
        """Renews this process's lease. A store that cannot be written says so here, and here it is found healed."""
        await self._store.write(self._beat, None)

    async def next_due_at(self) -> int | None:
        """When the next lane of a running queue is due, in milliseconds; None where nothing waits."""
        return await self._store.write(self._next_due_at, None)

    # --- in the writer's thread, inside its transaction ---

    def _enter(
        self, connection: Connection, items: Sequence[tuple[Sequence[QueueKey], str]]
    ) -> list[dict[QueueKey, int]]:
        answers = []
        for keys, version in items:
            now = self._clock()
            row = {"started_at": now, "lease_until": now + LEASE_MS, "version": version}
            self._process_id = connection.execute(insert(processes).values(row)).inserted_primary_key[0]  # type: ignore[index]
            # The lock on the file says that there is no other process: whatever is held, its holder is dead.
            connection.execute(update(lanes).where(lanes.c.holder.is_not(None)).values(holder=None))
            connection.execute(
                update(queues).where(queues.c.paused_until == FOR_EVER).values(paused_until=None, pause_reason=None)
            )
            known = {
                QueueKey(route=row.route, merchant=row.merchant, channel=row.channel): row.id
                for row in connection.execute(select(queues.c.id, queues.c.route, queues.c.merchant, queues.c.channel))
            }
            for key in keys:
                if key not in known:
                    values = {"route": key.route, "merchant": key.merchant, "channel": key.channel}
                    result = connection.execute(insert(queues).values(values))
                    known[key] = result.inserted_primary_key[0]  # type: ignore[index]
            answers.append({key: known[key] for key in keys})
        return answers

    def _claim(self, connection: Connection, items: Sequence[tuple[Sequence[Ask], int]]) -> list[list[Claim]]:
        return [self._claim_lanes(connection, asks, most) for asks, most in items]

    def _claim_lanes(self, connection: Connection, asks: Sequence[Ask], most: int) -> list[Claim]:
        now = self._clock()
        paused = set(connection.execute(select(queues.c.id).where(queues.c.paused_until > now)).scalars())
        self._turn += 1
        first = self._turn % max(len(asks), 1)
        claims: list[Claim] = []
        for ask in (*asks[first:], *asks[:first]):
            room = min(ask.most, most - len(claims))
            if room < 1 or ask.queue_id in paused:
                continue
            due = connection.execute(
                select(lanes)
                .where(
                    lanes.c.queue_id == ask.queue_id,
                    lanes.c.holder.is_(None),
                    lanes.c.next_at.is_not(None),
                    lanes.c.next_at <= now,
                )
                .order_by(lanes.c.next_at)
                .limit(room)
            ).all()
            for lane in due:
                claim = self._take(connection, lane, ask, now)
                if claim is not None:
                    claims.append(claim)
        return claims

    def _take(self, connection: Connection, lane: Any, ask: Ask, now: int) -> Claim | None:
        d = deliveries.c
        delivery_id = lane.current_delivery_id or connection.execute(_first_waiting(lane.id)).scalar()
        if delivery_id is None:  # nothing is owed: what was due has been superseded
            connection.execute(update(lanes).where(lanes.c.id == lane.id).values(next_at=None))
            return None
        doubt_ends_at = now + ask.doubt_ms
        connection.execute(
            update(lanes)
            .where(lanes.c.id == lane.id)
            .values(
                holder=self._process_id, claim=lane.claim + 1, current_delivery_id=delivery_id, next_at=doubt_ends_at
            )
        )
        connection.execute(
            update(deliveries)
            .where(d.id == delivery_id)
            .values(attempts=d.attempts + 1, first_attempt_at=func.coalesce(d.first_attempt_at, now))
        )
        n = notifications.c
        row = connection.execute(
            select(d.attempts, d.first_attempt_at, notifications)
            .join_from(deliveries, notifications, d.notification_id == n.id)
            .where(d.id == delivery_id)
        ).one()
        return Claim(
            lane_id=lane.id,
            number=lane.claim + 1,
            in_doubt=lane.claim > lane.settled,
            doubt_ends_at=doubt_ends_at,
            queue_id=lane.queue_id,
            delivery_id=delivery_id,
            attempt=row.attempts,
            first_attempt_at=row.first_attempt_at,
            claimed_at=now,
            notification_id=row.id,
            callback=row.callback,
            merchant=row.merchant,
            channel=row.channel,
            order_id=row.order_id,
            identity=row.identity,
            received_at=row.received_at,
            body=row.body,
            previous=_previous(lane.previous),
        )

    def _settle(self, connection: Connection, records: Sequence[Record]) -> list[bool]:
        return [self._record(connection, record) for record in records]

    def _record(self, connection: Connection, record: Record) -> bool:
        claim, settlement, now = record.claim, record.settlement, self._clock()
        stopped = settlement.state is State.DEAD and (settlement.holds_lane or not record.passes)
        lane: dict[str, Any] = {"holder": None}
        if settlement.known:
            lane["settled"] = claim.number
        if settlement.state is State.WAITING:
            lane["next_at"] = _milliseconds(settlement.due_at, now)
        elif stopped:
            lane["next_at"] = None
        else:
            lane["current_delivery_id"] = None
        if settlement.reason is Reason.DELIVERED:
            lane["previous"] = json.dumps({"reference": record.reference, "facts": dict(record.facts or {}), "at": now})
        held = (lanes.c.id == claim.lane_id) & (lanes.c.claim == claim.number) & (lanes.c.holder == self._process_id)
        if connection.execute(update(lanes).where(held).values(lane)).rowcount != 1:
            return False
        d = deliveries.c
        delivery: dict[str, Any] = {"state": settlement.state.value}
        if settlement.reason is not None:
            delivery |= {"reason": settlement.reason.value, "ended_at": now}
        if not settlement.counts:
            delivery["attempts"] = d.attempts - 1
        connection.execute(update(deliveries).where(d.id == claim.delivery_id).values(delivery))
        if "current_delivery_id" in lane:  # the lane goes on: is more owed?
            more = connection.execute(_first_waiting(claim.lane_id)).scalar()
            next_at = None if more is None else now
            connection.execute(update(lanes).where(lanes.c.id == claim.lane_id).values(next_at=next_at))
        connection.execute(
            insert(attempts).values(
                delivery_id=claim.delivery_id,
                claim=claim.number,
                kind=record.kind,
                started_at=claim.claimed_at,
                ended_at=now,
                outcome=record.outcome,
                code=record.code,
                message=None if record.message is None else record.message[:LONGEST_MESSAGE],
                reference=record.reference,
            )
        )
        if settlement.pauses:
            connection.execute(
                update(queues)
                .where(queues.c.id == claim.queue_id)
                .values(paused_until=FOR_EVER, pause_reason=settlement.pauses)
            )
        return True

    def _beat(self, connection: Connection, items: Sequence[None]) -> list[None]:
        lease = {"lease_until": self._clock() + LEASE_MS}
        connection.execute(update(processes).where(processes.c.id == self._process_id).values(lease))
        return [None for _ in items]

    def _next_due_at(self, connection: Connection, items: Sequence[None]) -> list[int | None]:
        now = self._clock()
        running = select(queues.c.id).where(func.coalesce(queues.c.paused_until, 0) <= now)
        earliest = select(func.min(lanes.c.next_at)).where(
            lanes.c.queue_id.in_(running), lanes.c.holder.is_(None), lanes.c.next_at.is_not(None)
        )
        due = connection.execute(earliest).scalar()
        return [due for _ in items]


def _first_waiting(lane_id: int) -> Any:
    d = deliveries.c
    waiting = (d.lane_id == lane_id) & (d.state == State.WAITING.value)
    return select(d.id).where(waiting).order_by(d.snapshot_at, d.id).limit(1)


def _previous(text: str | None) -> Previous | None:
    if text is None:
        return None
    value = json.loads(text)
    return Previous(
        reference=value["reference"], facts=value["facts"], at=datetime.fromtimestamp(value["at"] / 1000, UTC)
    )


def _milliseconds(moment: datetime | None, now: int) -> int:
    return now if moment is None else int(moment.timestamp() * 1000)
