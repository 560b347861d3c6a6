"""
Handing out work, and recording what became of it: claim, settle, release.

A lane (one order on one route) is what is claimed; one delivery of it is tried at a time, in the order of the
snapshots, and nothing goes before a delivery that has been attempted. `claim` counts up for ever and is the fence: who
settles with an older number has lost the lane and records nothing. A claim sets `next_at` to the moment when the doubt
about it would end, so that a process which dies leaves the lane due at the right time, without anybody's doing.

| lane | holder | next_at | current delivery | goes on by |
|---|---|---|---|---|
| idle | - | - | - | a notification |
| due, or waiting for a retry | - | a moment | the attempted one, if any | a claim |
| held | a process | when doubt would end | the one that is tried | a settlement; the end of the lease |
| stopped | - | - | the dead letter | a person |

Locks are taken in one order everywhere: queues before lanes that nobody waits for (`SKIP LOCKED`), lanes by queue and
order before queues.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection, bindparam, func, literal_column, select, update

from adapter.identifiers import Channel
from adapter.ledger.claims import (
    Claim,
    Claimed,
    QueueKey,
    QueueLimits,
    Record,
    attempt_row,
    claim_of,
    delivery_after,
    goes_on,
    lane_after,
    pausing_of,
    queue_columns,
)
from adapter.ledger.databases import any_of
from adapter.ledger.lease import Lease
from adapter.ledger.retry import lock_lanes
from adapter.ledger.schema import attempts, deliveries, lanes, notifications, queues
from adapter.ledger.settlement import (
    FOR_EVER,
    RUNNING,
    PausedBy,
    PausePolicy,
    QueueState,
    Settlement,
    after_attempt,
    settle,
)
from adapter.ledger.store import Store

log = structlog.get_logger(__name__)

# --- the statements: made once, for making them anew costs more than the database takes to run them ---

# As a literal: a planner that sees a parameter does not take the index of what waits.
_waiting = (deliveries.c.lane_id == lanes.c.id) & (deliveries.c.state == literal_column("'waiting'"))
_turn = (
    select(deliveries.c.id)
    .where(_waiting)
    .order_by(deliveries.c.snapshot_at, deliveries.c.id)
    .limit(1)
    .scalar_subquery()
)
_free = lanes.c.holder.is_(None) & lanes.c.next_at.is_not(None)

# One step into the index for each queue: neither its waiting lanes nor its blocked ones cost anything.
STANDS = select(
    queues,
    select(lanes.c.next_at)
    .where(lanes.c.queue_id == queues.c.id, _free)
    .order_by(lanes.c.next_at)
    .limit(1)
    .scalar_subquery()
    .label("due"),
).where(any_of(queues.c.id))
QUEUES = select(queues).where(any_of(queues.c.id))
LOCKED_QUEUES = QUEUES.order_by(queues.c.id).with_for_update(key_share=True)
# Counted by ourselves: grouped, SQLite would rather walk through all lanes there are.
HELD = select(lanes.c.queue_id).where(lanes.c.holder > 0)
# The earliest lanes of a queue that nobody holds.
DUE = (
    select(lanes)
    .where(lanes.c.queue_id == bindparam("queue"), _free, lanes.c.next_at <= bindparam("now"))
    .order_by(lanes.c.next_at)
    .limit(bindparam("room"))
    .with_for_update(skip_locked=True, of=lanes)
)
# The delivery whose turn it is in each lane, or null. Asked when they are locked, in a statement of its own: the one
# that locked them does not see what another node added to them while it looked.
TURNS = select(lanes.c.id, func.coalesce(lanes.c.current_delivery_id, _turn).label("delivery_id")).where(
    any_of(lanes.c.id)
)
IDLE = update(lanes).where(any_of(lanes.c.id)).values(next_at=None)
COUNT = (
    update(deliveries)
    .where(any_of(deliveries.c.id))
    .values(
        attempts=deliveries.c.attempts + 1,
        first_attempt_at=func.coalesce(deliveries.c.first_attempt_at, bindparam("now")),
    )
)
CLAIMED = (
    select(deliveries.c.id.label("delivery_id"), deliveries.c.attempts, deliveries.c.first_attempt_at, notifications)
    .join_from(deliveries, notifications, deliveries.c.notification_id == notifications.c.id)
    .where(any_of(deliveries.c.id))
)
WITH_MORE = select(lanes.c.id).where(any_of(lanes.c.id), _turn.is_not(None))


class Lanes:
    """Work for one process, under its lease. `policy` says when a queue pauses."""

    def __init__(self, store: Store, lease: Lease, *, policy: PausePolicy) -> None:
        self._store = store
        self._clock = store.clock
        self._lease = lease
        self._policy = policy
        self._turn = 0
        lane, delivery, database = lanes.c, deliveries.c, store.database
        held = {"lane": lane.id, "by": lane.holder, "delivery": lane.current_delivery_id, "due": lane.next_at}
        self._hold_each = database.updater(
            lanes, held, "holder = {by}, claim = lanes.claim + 1, current_delivery_id = {delivery}, next_at = {due}"
        )
        self._let_go = database.updater(
            lanes,
            held | {"number": lane.settled, "done": lane.previous},
            "holder = {by}, settled = coalesce({number}, lanes.settled), current_delivery_id = {delivery},"
            " next_at = {due}, previous = coalesce({done}, lanes.previous)",
        )
        ended = {"delivery": delivery.id, "becomes": delivery.state, "because": delivery.reason}
        self._end = database.updater(
            deliveries,
            ended | {"at": delivery.ended_at, "uncounted": delivery.attempts},
            "state = {becomes}, reason = {because}, ended_at = {at}, attempts = deliveries.attempts - {uncounted}",
        )
        self._write_down = database.inserter(attempts, [column.name for column in attempts.c if column.name != "id"])

    async def open_queues(self, keys: Sequence[QueueKey]) -> dict[QueueKey, int]:
        """
        The queues' ids; those that are new are made. Pauses for broken credentials end here: whoever starts the service
        has mended them.
        """
        return await self._store.write(self._open_queues, tuple(keys))

    async def claim(self, limits: Sequence[QueueLimits], most: int) -> Claimed:
        """
        Takes at most `most` due lanes, queue by queue in turn, never more of a queue than asked. Then it is on disk.

        Raises `StoreUnavailable`; the claims may be on disk all the same, and `give_back` undoes them.
        """
        return await self._store.write(self._claim, (tuple(limits), most))

    async def give_back(self, held: Collection[tuple[int, int]]) -> int:
        """Undoes the claims of this process whose fences are not among `held`: nobody has run them. How many."""
        return await self._store.write(self._give_back, set(held))

    async def settle(self, record: Record) -> Settlement | None:
        """Writes attempt, delivery, lane and queue in one transaction; None where the lane was lost meanwhile."""
        return await self._store.write(self._settle, record)

    async def release(self, claim: Claim) -> None:
        """Gives up a lane that was settled and kept, once its handler has really ended."""
        await self._store.write(self._release, claim)

    # --- in the writer's thread, inside its transaction ---

    def _open_queues(self, connection: Connection, items: Sequence[Sequence[QueueKey]]) -> list[dict[QueueKey, int]]:
        mended = queues.c.paused_by == PausedBy.MISCONFIGURED.value
        connection.execute(update(queues).where(mended).values(queue_columns(RUNNING)))
        rows = sorted({(key.route, *key.channel) for keys in items for key in keys})
        ending = "ON CONFLICT (route, merchant, channel) DO NOTHING"
        add = self._store.database.inserter(queues, ("route", "merchant", "channel"), ending)
        add(connection.connection.cursor(), rows)
        known = {
            QueueKey(row.route, Channel(row.merchant, row.channel)): row.id
            for row in connection.execute(select(queues))
        }
        return [{key: known[key] for key in keys} for keys in items]

    def _claim(self, connection: Connection, items: Sequence[tuple[Sequence[QueueLimits], int]]) -> list[Claimed]:
        return [self._take(connection, {ask.queue_id: ask for ask in limits}, most) for limits, most in items]

    def _take(self, connection: Connection, limits: Mapping[int, QueueLimits], most: int) -> Claimed:
        now = self._clock()
        due = {
            row.id: max(row.due, row.paused_until or 0)
            for row in connection.execute(STANDS, {"ids": list(limits)})
            if row.due is not None and row.paused_until != FOR_EVER
        }
        later = min((moment for moment in due.values() if moment > now), default=None)
        ready = sorted(queue_id for queue_id, moment in due.items() if moment <= now)
        if not ready or most < 1:
            return Claimed(claims=[], next_due_at=later)
        # One node at a time counts what is held of a queue; the intake does not wait for it.
        locked = connection.execute(LOCKED_QUEUES, {"ids": ready}).all()
        held = Counter(connection.execute(HELD).scalars())
        self._turn += 1
        first = self._turn % len(locked)
        taken: list[tuple[Any, QueueLimits]] = []
        for queue in (*locked[first:], *locked[:first]):
            ask = limits[queue.id]
            room = min(pausing_of(queue).room(ask.concurrency, now) - held[queue.id], most - len(taken))
            if room > 0:
                some = connection.execute(DUE, {"queue": queue.id, "now": now, "room": room})
                taken += [(lane, ask) for lane in some]
        claims = self._hold(connection, taken, now)
        # Where nothing waited in a lane that was due, another one may still be.
        return Claimed(claims=claims, next_due_at=later if len(claims) == len(taken) else now)

    def _hold(self, connection: Connection, taken: Sequence[tuple[Any, QueueLimits]], now: int) -> list[Claim]:
        if not taken:
            return []
        turns = {row.id: row.delivery_id for row in connection.execute(TURNS, {"ids": [lane.id for lane, _ in taken]})}
        idle = [lane_id for lane_id, delivery_id in turns.items() if delivery_id is None]  # it has been superseded
        if idle:
            connection.execute(IDLE, {"ids": idle})
        held = {turns[lane.id]: (lane, ask) for lane, ask in taken if turns[lane.id] is not None}
        if not held:
            return []
        holder = self._lease.process_id
        rows = [
            {"lane": lane.id, "by": holder, "delivery": delivery_id, "due": now + ask.doubt_ms}
            for delivery_id, (lane, ask) in held.items()
        ]
        self._hold_each(connection.connection.cursor(), rows)
        connection.execute(COUNT, {"ids": list(held), "now": now})
        claims = {}
        for row in connection.execute(CLAIMED, {"ids": list(held)}):
            lane, ask = held[row.delivery_id]
            claims[row.delivery_id] = claim_of(row, lane, holder=holder, now=now, doubt_ms=ask.doubt_ms)
        return [claims[delivery_id] for delivery_id in held]

    def _give_back(self, connection: Connection, items: Sequence[set[tuple[int, int]]]) -> list[int]:
        answers = []
        for held in items:
            mine = select(lanes.c.id, lanes.c.claim).where(lanes.c.holder == self._lease.process_id)
            ids = {row.id for row in connection.execute(mine) if (row.id, row.claim) not in held}
            for lane in lock_lanes(connection, ids):
                # As if it had never been claimed; what was in doubt before still is.
                settled = lane.claim if lane.settled == lane.claim - 1 else lane.settled
                freed = {"holder": None, "settled": settled, "next_at": self._clock()}
                connection.execute(update(lanes).where(lanes.c.id == lane.id).values(freed))
                current = deliveries.c.id == lane.current_delivery_id
                connection.execute(update(deliveries).where(current).values(attempts=deliveries.c.attempts - 1))
            answers.append(len(ids))
        return answers

    def _settle(self, connection: Connection, records: Sequence[Record]) -> list[Settlement | None]:
        now = self._clock()
        locked = {row.id: row for row in lock_lanes(connection, {record.claim.lane_id for record in records})}
        kept = [
            record
            for record in records
            if _is_held(locked.get(record.claim.lane_id), record.claim)
            and not (record.keeps and _is_written(connection, record.claim))
        ]
        pausing = self._queues(connection, kept)
        settlements: dict[tuple[int, int], Settlement] = {}
        for record in kept:
            claim = record.claim
            was = pausing[claim.queue_id]
            attempt = replace(record.attempt, paused=not was.is_running())
            settlements[claim.fence] = settle(record.result, attempt)
            pausing[claim.queue_id] = after = after_attempt(was, record.result, claim.lane_id, now, self._policy)
            if after is not was:
                connection.execute(update(queues).where(queues.c.id == claim.queue_id).values(queue_columns(after)))
                _tell(claim, was, after)
        if kept:
            self._write(connection, [(record, settlements[record.claim.fence]) for record in kept], now)
        # A connection that broke at the commit left it open whether this is written already: then it stands there.
        again = [record for record in records if record.claim.fence not in settlements]
        written = [record for record in again if _is_written(connection, record.claim)]
        settlements |= {record.claim.fence: settle(record.result, record.attempt) for record in written}
        return [settlements.get(record.claim.fence) for record in records]

    def _queues(self, connection: Connection, records: Sequence[Record]) -> dict[int, QueueState]:
        """How the queues of these records stand; locked only where that may change, for they are everybody's."""
        ids = {record.claim.queue_id for record in records}
        stand = {row.id: pausing_of(row) for row in connection.execute(QUEUES, {"ids": list(ids)})}
        changing = {
            record.claim.queue_id
            for record in records
            if stand[(of := record.claim).queue_id]
            is not after_attempt(stand[of.queue_id], record.result, of.lane_id, self._clock(), self._policy)
        }
        if changing:
            stand |= {row.id: pausing_of(row) for row in connection.execute(LOCKED_QUEUES, {"ids": list(changing)})}
        return stand

    def _write(self, connection: Connection, settled: Sequence[tuple[Record, Settlement]], now: int) -> None:
        cursor = connection.connection.cursor()
        self._end(cursor, [delivery_after(record, settlement, now) for record, settlement in settled])
        going_on = [record.claim.lane_id for record, settlement in settled if goes_on(record, settlement)]
        more = set(connection.execute(WITH_MORE, {"ids": going_on}).scalars()) if going_on else set()
        self._let_go(cursor, [lane_after(record, settlement, more, now) for record, settlement in settled])
        self._write_down(cursor, [attempt_row(record, now) for record, _ in settled])

    def _release(self, connection: Connection, claims: Sequence[Claim]) -> list[None]:
        for claim in sorted(claims, key=lambda claim: (claim.queue_id, claim.order_id)):
            held = (lanes.c.id == claim.lane_id) & (lanes.c.claim == claim.number) & (lanes.c.holder == claim.holder)
            connection.execute(update(lanes).where(held).values(holder=None))
        return [None for _ in claims]


def _tell(claim: Claim, was: QueueState, now: QueueState) -> None:
    """One line where a queue begins to pause, or runs again."""
    queue = {"queue_id": claim.queue_id, "merchant": claim.channel.merchant, "channel": claim.channel.name}
    if now.paused_until != was.paused_until and now.paused_by is not None:
        log.warning("queue_paused", code=now.reason, paused_by=now.paused_by.value, **queue)
    elif now.is_running() and not was.is_running():
        log.info("queue_resumed", **queue)


def _is_held(lane: Any, claim: Claim) -> bool:
    return lane is not None and lane.claim == claim.number and lane.holder == claim.holder


def _is_written(connection: Connection, claim: Claim) -> bool:
    same = (attempts.c.delivery_id == claim.delivery_id) & (attempts.c.claim == claim.number)
    return connection.execute(select(attempts.c.id).where(same)).first() is not None
