"""Lanes: claiming due work, settling attempts and releasing lanes.

A lane is one order on one route. It is claimed as a whole; its deliveries are attempted one at a time: in the order of
arrival if the route reads the order again, otherwise in the order of their snapshots. No delivery is placed before one
that has been attempted. `claim` is the fencing token: it counts up for ever, and a process that settles with an older
number has lost the lane and writes nothing. A claim sets `next_at` to the end of its doubt, or later by the schedule.
So the lane of a process that dies becomes due at the right time, and an order that ends every process that claims it
does so less and less often.

| lane | holder | next_at | current delivery | continues with |
|---|---|---|---|---|
| idle | - | - | - | a notification |
| due, or waiting for a retry | - | a moment | the attempted one, if any | a claim |
| held | a process | as if the attempt had failed | the one being attempted | a settlement, or the end of the lease |
| stopped | - | - | the dead letter | a person |

Locks have one order everywhere: lanes by queue and order, then queues. A claim locks queues first, but never waits
for a lane (`SKIP LOCKED`).
"""

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy import Connection, bindparam, func, literal_column, not_, select, update

from adapter.identifiers import Channel
from adapter.ledger.claims import (
    AttemptRecord,
    Claim,
    Claimed,
    QueueKey,
    QueueLimits,
    attempt_of,
    attempt_row,
    claim_of,
    continues,
    delivery_change,
    lane_change,
    queue_columns,
    queue_state,
)
from adapter.ledger.databases import any_of
from adapter.ledger.dead_letters import lock_lanes, pass_dead_letters
from adapter.ledger.lease import Lease
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

# --- statements: built once, because building one costs more than running it ---

# A literal: with a parameter, the planner does not use the index of waiting deliveries.
_is_waiting = (deliveries.c.lane_id == lanes.c.id) & (deliveries.c.state == literal_column("'waiting'"))
_next_delivery = (
    select(deliveries.c.id)
    .where(_is_waiting)
    .order_by(deliveries.c.position, deliveries.c.id)
    .limit(1)
    .scalar_subquery()
)
_is_free = lanes.c.holder.is_(None) & lanes.c.next_at.is_not(None)

# One index lookup per queue, whatever waits in it.
QUEUES_WITH_DUE = select(
    queues,
    select(lanes.c.next_at)
    .where(lanes.c.queue_id == queues.c.id, _is_free)
    .order_by(lanes.c.next_at)
    .limit(1)
    .scalar_subquery()
    .label("due"),
).where(any_of(queues.c.id))
QUEUES = select(queues).where(any_of(queues.c.id))
LOCK_QUEUES = QUEUES.order_by(queues.c.id).with_for_update(key_share=True)
# Counted in Python: for a GROUP BY, SQLite walks through all lanes.
HELD_LANES = select(lanes.c.queue_id, lanes.c.next_at).where(lanes.c.holder > 0)
LOCK_DUE_LANES = (
    select(lanes)
    .where(lanes.c.queue_id == bindparam("queue"), _is_free, lanes.c.next_at <= bindparam("now"))
    .order_by(lanes.c.next_at)
    .limit(bindparam("room"))
    .with_for_update(skip_locked=True, of=lanes)
)
LOCK_DUE_LANES_BUT = LOCK_DUE_LANES.where(not_(any_of(lanes.c.id, "failed")))
# Read after the lock, in a separate statement: the statement that locks does not see what others added meanwhile.
CURRENT_DELIVERIES = select(
    lanes.c.id, func.coalesce(lanes.c.current_delivery_id, _next_delivery).label("delivery_id")
).where(any_of(lanes.c.id))
MAKE_IDLE = update(lanes).where(any_of(lanes.c.id)).values(next_at=None)
COUNT_ATTEMPTS = (
    update(deliveries)
    .where(any_of(deliveries.c.id))
    .values(
        attempts=deliveries.c.attempts + 1,
        first_attempt_at=func.coalesce(deliveries.c.first_attempt_at, bindparam("now")),
    )
)
CLAIMED_DELIVERIES = (
    select(
        deliveries.c.id.label("delivery_id"),
        deliveries.c.attempts,
        deliveries.c.first_attempt_at,
        deliveries.c.again_of,
        notifications,
    )
    .join_from(deliveries, notifications, deliveries.c.notification_id == notifications.c.id)
    .where(any_of(deliveries.c.id))
)
LANES_WITH_WAITING = select(lanes.c.id).where(any_of(lanes.c.id), _next_delivery.is_not(None))


class Lanes:
    """The lanes of an open ledger, for one process under its lease."""

    def __init__(self, store: Store, lease: Lease, *, policy: PausePolicy) -> None:
        self._store = store
        self._clock = store.clock
        self._lease = lease
        self._policy = policy
        self._claims_made = 0
        lane, delivery, database = lanes.c, deliveries.c, store.database
        held = {"lane": lane.id, "holder": lane.holder, "delivery": lane.current_delivery_id, "due": lane.next_at}
        self._hold_lanes = database.updater(
            lanes,
            held | {"doubt_until": lane.doubt_until},
            "holder = {holder}, claim = lanes.claim + 1, current_delivery_id = {delivery}, next_at = {due},"
            " doubt_until = {doubt_until}",
        )
        self._settle_lanes = database.updater(
            lanes,
            held | {"settled": lane.settled, "previous": lane.previous},
            "holder = {holder}, settled = coalesce({settled}, lanes.settled), current_delivery_id = {delivery},"
            " next_at = {due}, previous = coalesce({previous}, lanes.previous)",
        )
        ended = {"delivery": delivery.id, "state": delivery.state, "reason": delivery.reason}
        self._settle_deliveries = database.updater(
            deliveries,
            ended | {"ended_at": delivery.ended_at, "uncounted": delivery.attempts, "reference": delivery.reference},
            "state = {state}, reason = {reason}, ended_at = {ended_at}, attempts = deliveries.attempts - {uncounted},"
            " reference = {reference}",
        )
        self._insert_attempts = database.inserter(
            attempts, [column.name for column in attempts.c if column.name != "id"]
        )

    async def open_queues(self, keys: Sequence[QueueKey], *, refetching: Container[str] = ()) -> dict[QueueKey, int]:
        """Return the ids of these queues, and create the missing ones.

        This ends pauses for broken credentials: a person who restarts the service has corrected them. `refetching`
        holds the routes that read the order again. Lanes that stopped before a route did so go on.
        """
        return await self._store.run(self._open_queues, keys, refetching)

    async def claim(self, limits: Sequence[QueueLimits], most: int, *, idle: Container[int] = frozenset()) -> Claimed:
        """Claim at most `most` due lanes, one queue after another, within each queue's limit.

        One lane of each queue in `idle` is claimed beyond `most`, so that slow queues cannot keep others from work.

        Raises:
            StoreUnavailable: The claims may be on disk all the same; `give_back` undoes them.
        """
        return await self._store.run(self._claim, {each.queue_id: each for each in limits}, most, idle)

    async def give_back(self, held: Collection[tuple[int, int]]) -> int:
        """Undo the claims of this process whose fences are not in `held`. Returns their number.

        No handler has run for them: the store failed at their commit.
        """
        return await self._store.run(self._give_back, held)

    async def settle(self, record: AttemptRecord) -> Settlement | None:
        """Write attempt, delivery, lane and queue in one transaction.

        Returns None if the lane was lost meanwhile.
        """
        return await self._store.write(self._settle, record)

    async def release(self, claim: Claim) -> None:
        """Release a lane that was settled with `keeps_lane`, once its handler has ended."""
        held = (lanes.c.id == claim.lane_id) & (lanes.c.claim == claim.number) & (lanes.c.holder == claim.holder)
        release = update(lanes).where(held).values(holder=None)
        await self._store.run(lambda connection: connection.execute(release))

    # --- in the writer's thread, inside its transaction ---

    def _open_queues(
        self, connection: Connection, keys: Sequence[QueueKey], refetching: Container[str]
    ) -> dict[QueueKey, int]:
        misconfigured = queues.c.paused_by == PausedBy.MISCONFIGURED.value
        connection.execute(update(queues).where(misconfigured).values(queue_columns(RUNNING)))
        rows = sorted({(key.route, *key.channel) for key in keys})
        ending = "ON CONFLICT (route, merchant, channel) DO NOTHING"
        insert = self._store.database.inserter(queues, ("route", "merchant", "channel"), ending)
        insert(connection.connection.cursor(), rows)
        known = {
            QueueKey(row.route, Channel(row.merchant, row.channel)): row.id
            for row in connection.execute(select(queues))
        }
        pass_dead_letters(connection, [known[key] for key in keys if key.route in refetching], self._clock())
        return {key: known[key] for key in keys}

    def _claim(
        self, connection: Connection, limits: Mapping[int, QueueLimits], most: int, idle: Container[int]
    ) -> Claimed:
        now = self._clock()
        due = {
            row.id: max(row.due, row.paused_until or 0)
            for row in connection.execute(QUEUES_WITH_DUE, {"ids": list(limits)})
            if row.due is not None and row.paused_until != FOR_EVER
        }
        later = min((moment for moment in due.values() if moment > now), default=None)
        ready = sorted(queue_id for queue_id, moment in due.items() if moment <= now)
        if not ready:
            return Claimed(claims=[], next_due_at=later)
        # The lock makes one node at a time count the held lanes of a queue. The inbox does not wait for it.
        locked = connection.execute(LOCK_QUEUES, {"ids": ready}).all()
        held_lanes = connection.execute(HELD_LANES).all()
        held = Counter(lane.queue_id for lane in held_lanes)
        # Without those that a blocked handler holds after its settlement: one would keep a probe away for good.
        attempted = Counter(lane.queue_id for lane in held_lanes if lane.next_at is not None)
        self._claims_made += 1
        first = self._claims_made % len(locked)  # each claim begins with the next queue
        taken: list[tuple[Any, QueueLimits]] = []
        for queue in (*locked[first:], *locked[:first]):
            limit, state = limits[queue.id], queue_state(queue)
            slots = max(most - len(taken), 1 if queue.id in idle else 0)
            room = min(
                state.room(limit.concurrency, now) - attempted[queue.id], limit.concurrency - held[queue.id], slots
            )
            if room > 0:
                which = {"queue": queue.id, "now": now, "room": room}
                rows: Sequence[Any] = []
                if not state.is_running():  # the probe is another lane than those that failed, if one is due
                    rows = connection.execute(LOCK_DUE_LANES_BUT, which | {"failed": state.failed_lanes}).all()
                rows = rows or connection.execute(LOCK_DUE_LANES, which).all()
                taken += [(lane, limit) for lane in rows]
        claims = self._hold(connection, taken, now)
        # If a due lane had nothing waiting, another lane may be due already.
        return Claimed(claims=claims, next_due_at=later if len(claims) == len(taken) else now)

    def _hold(self, connection: Connection, taken: Sequence[tuple[Any, QueueLimits]], now: int) -> list[Claim]:
        if not taken:
            return []
        rows = connection.execute(CURRENT_DELIVERIES, {"ids": [lane.id for lane, _ in taken]})
        delivery_ids = {row.id: row.delivery_id for row in rows}
        empty = [lane_id for lane_id, delivery_id in delivery_ids.items() if delivery_id is None]
        if empty:  # what waited was discarded
            connection.execute(MAKE_IDLE, {"ids": empty})
        held = {delivery_ids[lane.id]: (lane, limit) for lane, limit in taken if delivery_ids[lane.id] is not None}
        if not held:
            return []
        holder = self._lease.process_id
        connection.execute(COUNT_ATTEMPTS, {"ids": list(held), "now": now})
        claims: dict[int, Claim] = {}
        changes = []
        for row in connection.execute(CLAIMED_DELIVERIES, {"ids": list(held)}):
            lane, limit = held[row.delivery_id]
            claim = claim_of(lane, row, limit, holder=holder, now=now)
            claims[row.delivery_id] = claim
            due = limit.due_after_death(row.attempts, now)
            held_by = {"lane": lane.id, "holder": holder, "delivery": row.delivery_id}
            changes.append(held_by | {"due": due, "doubt_until": claim.doubt_ends_at})
        self._hold_lanes(connection.connection.cursor(), changes)
        return [claims[delivery_id] for delivery_id in held]

    def _give_back(self, connection: Connection, held: Collection[tuple[int, int]]) -> int:
        own = select(lanes.c.id, lanes.c.claim).where(lanes.c.holder == self._lease.process_id)
        ids = {row.id for row in connection.execute(own) if (row.id, row.claim) not in held}
        for lane in lock_lanes(connection, ids):
            # As before the claim: a lane that was in doubt stays so.
            settled = lane.claim if lane.settled == lane.claim - 1 else lane.settled
            freed = {"holder": None, "settled": settled, "next_at": self._clock()}
            connection.execute(update(lanes).where(lanes.c.id == lane.id).values(freed))
            current = deliveries.c.id == lane.current_delivery_id
            connection.execute(update(deliveries).where(current).values(attempts=deliveries.c.attempts - 1))
        return len(ids)

    def _settle(self, connection: Connection, records: Sequence[AttemptRecord]) -> list[Settlement | None]:
        now = self._clock()
        locked = {row.id: row for row in lock_lanes(connection, {record.claim.lane_id for record in records})}
        kept = [
            record
            for record in records
            if _is_held(locked.get(record.claim.lane_id), record.claim)
            and not (record.keeps_lane and _is_written(connection, record.claim))
        ]
        states = self._lock_changing_queues(connection, kept, now)
        settlements: dict[tuple[int, int], Settlement] = {}
        for record in kept:
            claim = record.claim
            before = states[claim.queue_id]
            paused = before.is_paused_by_others(claim.lane_id)
            settlements[claim.fence] = settle(record.result, attempt_of(record, now, paused=paused))
            states[claim.queue_id] = after = self._queue_after(before, record, now)
            if after is not before:
                connection.execute(update(queues).where(queues.c.id == claim.queue_id).values(queue_columns(after)))
                _log_change(claim, before, after)
        if kept:
            self._write_settlements(connection, [(record, settlements[record.claim.fence]) for record in kept], now)
        # After a connection broke at the commit, the same record arrives again although it is on disk.
        repeated = [record for record in records if record.claim.fence not in settlements]
        written = [record for record in repeated if _is_written(connection, record.claim)]
        settlements |= {record.claim.fence: settle(record.result, attempt_of(record, now)) for record in written}
        return [settlements.get(record.claim.fence) for record in records]

    def _lock_changing_queues(
        self, connection: Connection, records: Sequence[AttemptRecord], now: int
    ) -> dict[int, QueueState]:
        # Locks only the queues that will change, because every settlement reads them.
        ids = {record.claim.queue_id for record in records}
        states = {row.id: queue_state(row) for row in connection.execute(QUEUES, {"ids": list(ids)})}
        changing = set()
        for record in records:
            state = states[record.claim.queue_id]
            if self._queue_after(state, record, now) is not state:
                changing.add(record.claim.queue_id)
        if changing:
            states |= {row.id: queue_state(row) for row in connection.execute(LOCK_QUEUES, {"ids": list(changing)})}
        return states

    def _queue_after(self, state: QueueState, record: AttemptRecord, now: int) -> QueueState:
        claim = record.claim
        return after_attempt(state, record.result, claim.lane_id, now, self._policy, is_retry=claim.attempt > 1)

    def _write_settlements(
        self, connection: Connection, settled: Sequence[tuple[AttemptRecord, Settlement]], now: int
    ) -> None:
        cursor = connection.connection.cursor()
        self._settle_deliveries(cursor, [delivery_change(record, settlement, now) for record, settlement in settled])
        continuing = [record.claim.lane_id for record, settlement in settled if continues(record, settlement)]
        due = set(connection.execute(LANES_WITH_WAITING, {"ids": continuing}).scalars()) if continuing else set()
        self._settle_lanes(cursor, [lane_change(record, settlement, due, now) for record, settlement in settled])
        self._insert_attempts(cursor, [attempt_row(record, now) for record, _ in settled])


def _log_change(claim: Claim, before: QueueState, after: QueueState) -> None:
    queue = {"queue_id": claim.queue_id, "merchant": claim.channel.merchant, "channel": claim.channel.name}
    if after.paused_until != before.paused_until and after.paused_by is not None:
        log.warning("queue_paused", code=after.reason, paused_by=after.paused_by.value, **queue)
    elif after.is_running() and not before.is_running():
        log.info("queue_resumed", **queue)


def _is_held(lane: Any, claim: Claim) -> bool:
    return lane is not None and lane.claim == claim.number and lane.holder == claim.holder


def _is_written(connection: Connection, claim: Claim) -> bool:
    same = (attempts.c.delivery_id == claim.delivery_id) & (attempts.c.claim == claim.number)
    return connection.execute(select(attempts.c.id).where(same)).first() is not None
