"""The inbox: stores a notification and its deliveries in one transaction, before the 200.

The same event is stored once, as long as its row lives. The same identity with another order is a conflict: it is
stored without deliveries. A repeat retries a delivery that is dead as rejected or exhausted, at most once an hour,
because a person who presses retry at Norce means that.
"""

from collections.abc import Sequence
from enum import Enum
from hashlib import sha256
from operator import itemgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, func, select, text, update

from adapter.identifiers import Channel
from adapter.ledger.databases import IN_ARRAY, Numbers
from adapter.ledger.dead_letters import DeadLetter, retry_dead_letters
from adapter.ledger.schema import deliveries, lanes, notifications
from adapter.ledger.settlement import Reason, State
from adapter.ledger.store import Store
from adapter.orders import NotAnOrder, decode, order_digest, order_in

RETRY_AT_MOST_EVERY_MS = 3_600_000
RETRIED_BY_A_REPEAT = (Reason.REJECTED, Reason.EXHAUSTED)
MAX_CONFLICTS = 8  # stored of one identity; further ones are answered and counted


class Received(Enum):
    """The result of receiving a notification."""

    NEW = "new"
    REPEAT = "repeat"  # the same event again
    RETRIED = "retried"  # the same event again, and its dead delivery is retried
    CONFLICT = "conflict"  # the same identity with another order: stored, not delivered


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A queue that wants the event."""

    queue_id: int
    refetch: bool  # its route needs only the newest event of an order


class ReceivedNotification(msgspec.Struct, frozen=True, kw_only=True):
    """A notification from a known sender and in valid form, with the queues that want it."""

    identity: bytes  # equal for the same event
    channel: Channel
    callback: str
    order_id: str
    snapshot_at: int | None  # its place in the order's history, in milliseconds; None without a `lastModified`
    source: str  # callback or reconciliation
    body: bytes
    wanted: tuple[Wanted, ...] = ()


class Inbox:
    """The inbox of an open ledger."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock
        database = store.database
        columns = [column.name for column in notifications.c if column.name != "id"]
        self._insert_notifications = database.inserter(
            notifications, columns, "ON CONFLICT (identity) DO NOTHING RETURNING id, identity"
        )
        # This locks a lane, new or not, and makes it due if it is idle.
        self._upsert_lanes = database.inserter(
            lanes,
            ("queue_id", "order_id", "next_at", "newest_snapshot_at"),
            "ON CONFLICT (queue_id, order_id) DO UPDATE SET newest_snapshot_at ="
            " CASE WHEN excluded.newest_snapshot_at > lanes.newest_snapshot_at"
            " THEN excluded.newest_snapshot_at ELSE lanes.newest_snapshot_at END,"
            " next_at = CASE WHEN lanes.current_delivery_id IS NULL AND lanes.next_at IS NULL"
            " THEN excluded.next_at ELSE lanes.next_at END"
            " RETURNING queue_id, order_id, id, newest_snapshot_at",
        )
        self._insert_deliveries = database.inserter(
            deliveries, ("notification_id", "lane_id", "snapshot_at", "state", "reason", "ended_at")
        )
        # SQLite has no statistics here: without the hint it would read all deliveries of the lanes.
        hint = "" if database.shared else "INDEXED BY ix_deliveries_waiting"
        in_lanes = IN_ARRAY[store.engine.dialect.name].format(":lane_ids")
        self._supersede = text(
            f"UPDATE deliveries {hint} SET state = 'done', reason = 'superseded', ended_at = :now FROM lanes"  # noqa: S608 - our own names
            f" WHERE deliveries.lane_id {in_lanes} AND deliveries.state = 'waiting'"
            " AND lanes.id = deliveries.lane_id AND deliveries.id <> coalesce(lanes.current_delivery_id, 0)"
        ).bindparams(bindparam("lane_ids", type_=Numbers()))

    async def receive(self, notification: ReceivedNotification) -> Received:
        """Store a notification and its deliveries once. They are on disk when this returns.

        Raises:
            StoreUnavailable: Nothing was stored.
        """
        received = await self._store.write(self._receive, notification, len(notification.body))
        if isinstance(received, Received):
            return received
        # In a transaction of its own: a batch has locked its lanes already, and the order of locks must hold.
        letters = received
        return await self._store.run(self._retry, letters)

    async def known(self, identities: Sequence[bytes]) -> set[bytes]:
        """Return those of these identities that are stored. Raises `StoreUnavailable`."""
        known = select(notifications.c.identity).where(notifications.c.identity.in_(identities))
        return set(await self._store.run(lambda connection: connection.execute(known).scalars().all()))

    # --- in the writer's thread, inside its transaction ---

    def _receive(
        self, connection: Connection, received: Sequence[ReceivedNotification]
    ) -> list[Received | list[DeadLetter]]:
        cursor = connection.connection.cursor()
        now = self._clock()
        first: dict[bytes, ReceivedNotification] = {}
        for notification in received:
            first.setdefault(notification.identity, notification)
        # Sorted by identity on every node, so that two batches never deadlock.
        rows = [_row(first[identity], now) for identity in sorted(first)]
        ids = {identity: key for key, identity in self._insert_notifications(cursor, rows)}
        new = [notification for notification in first.values() if notification.identity in ids]
        if self._add_deliveries(connection, new, ids, now):
            self._store.database.notify(connection)
        return [
            Received.NEW
            if notification.identity in ids and first[notification.identity] is notification
            else self._receive_again(connection, notification, now)
            for notification in received
        ]

    def _add_deliveries(
        self, connection: Connection, new: Sequence[ReceivedNotification], ids: dict[bytes, int], now: int
    ) -> bool:
        """Add the deliveries of a batch to their lanes. Returns whether there are any."""
        snapshots_of: dict[tuple[int, str], list[tuple[int, int]]] = {}  # of each lane: (snapshot_at, notification id)
        refetches: dict[int, bool] = {}
        for notification in new:
            snapshot = (_snapshot_at(notification, now), ids[notification.identity])
            for wanted in notification.wanted:
                refetches[wanted.queue_id] = wanted.refetch
                snapshots_of.setdefault((wanted.queue_id, notification.order_id), []).append(snapshot)
        if not snapshots_of:
            return False
        cursor = connection.connection.cursor()
        rows = [(*lane, now, max(snapshots_of[lane])[0]) for lane in sorted(snapshots_of)]
        locked = {(queue_id, order_id): rest for queue_id, order_id, *rest in self._upsert_lanes(cursor, rows)}
        superseded_lanes: list[int] = []
        added: list[tuple[Any, ...]] = []
        for lane, snapshots in snapshots_of.items():
            lane_id, newest_snapshot_at = locked[lane]
            # A route that reads the order again needs only the newest snapshot, whether others came before or after.
            newest = max(reversed(snapshots), key=itemgetter(0)) if refetches[lane[0]] else None
            if newest is not None and newest[0] >= newest_snapshot_at:
                superseded_lanes.append(lane_id)
            for snapshot in snapshots:
                snapshot_at, notification_id = snapshot
                state: tuple[Any, ...] = (State.WAITING.value, None, None)
                if newest is not None and (snapshot is not newest or snapshot_at < newest_snapshot_at):
                    state = (State.DONE.value, Reason.SUPERSEDED.value, now)
                added.append((notification_id, lane_id, snapshot_at, *state))
        if superseded_lanes:
            connection.execute(self._supersede, {"now": now, "lane_ids": superseded_lanes})
        self._insert_deliveries(cursor, added)
        return True

    def _receive_again(
        self, connection: Connection, notification: ReceivedNotification, now: int
    ) -> Received | list[DeadLetter]:
        n = notifications.c
        known = connection.execute(select(n.id).where(n.identity == notification.identity)).scalar()
        if known is None:  # another node has pruned it since the insert
            return self._receive(connection, [notification])[0]
        stored = (n.id == known) | (n.conflicts_with == known)
        rows = connection.execute(select(n.id, n.digest, n.body).where(stored).order_by(n.id)).all()
        # Without its pruned body a row cannot be compared; then equal identities count as the same event.
        same = next((row.id for row in rows if row.body is None or row.body == notification.body), None)
        if same is None:
            digest = _digest(notification.body)
            same = next((row.id for row in rows if self._digest_of(connection, row) == digest), None)
        if same is None:
            if len(rows) <= MAX_CONFLICTS:
                row = _row(notification, now, conflicts_with=known, digest=digest)
                self._insert_notifications(connection.connection.cursor(), [row])
            return Received.CONFLICT
        if same != known:  # the repeat of a conflict, which has no deliveries
            return Received.REPEAT
        dead = [] if notification.source == "reconciliation" else self._dead_letters(connection, known, now)
        return dead or Received.REPEAT

    def _digest_of(self, connection: Connection, row: Any) -> bytes:
        # Computed once and stored: with one signed URL, a caller may repeat an event as often as it likes.
        if row.digest is not None:
            return bytes(row.digest)
        digest = _digest(row.body)
        connection.execute(update(notifications).where(notifications.c.id == row.id).values(digest=digest))
        return digest

    def _dead_letters(self, connection: Connection, notification_id: int, now: int) -> list[DeadLetter]:
        d = deliveries.c
        dead = connection.execute(
            select(d.id, d.lane_id).where(
                d.notification_id == notification_id,
                d.state == State.DEAD.value,
                d.reason.in_([reason.value for reason in RETRIED_BY_A_REPEAT]),
                func.coalesce(d.retried_at, 0) <= now - RETRY_AT_MOST_EVERY_MS,
            )
        )
        return [DeadLetter(row.id, row.lane_id) for row in dead]

    def _retry(self, connection: Connection, letters: list[DeadLetter]) -> Received:
        if retry_dead_letters(connection, letters, self._clock(), reasons=RETRIED_BY_A_REPEAT) == 0:
            return Received.REPEAT
        self._store.database.notify(connection)
        return Received.RETRIED


def _snapshot_at(notification: ReceivedNotification, now: int) -> int:
    return now if notification.snapshot_at is None else notification.snapshot_at


def _row(
    notification: ReceivedNotification, now: int, *, conflicts_with: int | None = None, digest: bytes | None = None
) -> tuple[Any, ...]:
    # The columns of the table after its key, in their order.
    return (
        notification.identity if conflicts_with is None else None,
        conflicts_with,
        *notification.channel,
        notification.callback,
        notification.order_id,
        _snapshot_at(notification, now),
        now,
        notification.source,
        digest,
        notification.body,
    )


def _digest(body: bytes) -> bytes:
    try:
        return order_digest(order_in(decode(body)))
    except NotAnOrder:  # nested too deeply to be compared: equal only to the same bytes
        return sha256(body).digest()[:16]
