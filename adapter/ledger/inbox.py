"""
Remember before we say 200: notification, deliveries, lanes and identity in one transaction.

The same event again does nothing more, for as long as its row lives; the same identity with another order inside is
kept without deliveries. A repeat whose delivery is dead because it was rejected or its schedule ran out retries it, at
most once an hour: that is what a person who presses retry at Norce means.
"""

from collections.abc import Sequence
from enum import Enum
from hashlib import sha256
from operator import itemgetter
from typing import Any

import msgspec
from sqlalchemy import Connection, func, select, update

from adapter.identifiers import Channel
from adapter.ledger.retry import locked_lanes, retry_dead_letters
from adapter.ledger.schema import deliveries, lanes, notifications
from adapter.ledger.settlement import Reason, State
from adapter.ledger.store import Store
from adapter.orders import NotAnOrder, decode, order_digest, order_in

RETRY_AT_MOST_EVERY_MS = 3_600_000
RETRIED_BY_A_REPEAT = (Reason.REJECTED, Reason.EXHAUSTED)
MOST_CONFLICTS = 8  # kept of one identity; more are answered and counted, and tell nobody anything new


Dead = list[tuple[int, int]]  # dead deliveries of a notification, each with its lane


class Received(Enum):
    """What became of a notification that was handed in."""

    NEW = "new"
    REPEAT = "repeat"  # the same event again
    RETRIED = "retried"  # the same event again, whose dead delivery is tried anew
    CONFLICT = "conflict"  # the same identity with another order inside: kept, not delivered


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A queue (one route for one merchant and channel) that wants the event. `refetch`: only its newest trigger."""

    queue_id: int
    refetch: bool


class ReceivedNotification(msgspec.Struct, frozen=True, kw_only=True):
    """A notification whose sender is known and whose form is right, and the queues that want it."""

    identity: bytes  # equal for the same event
    channel: Channel
    callback: str
    order_id: str
    snapshot_at: int | None  # its place in the order's history, in milliseconds; None without a `lastModified`
    source: str  # callback or reconciliation
    body: bytes
    wanted: tuple[Wanted, ...] = ()


class Inbox:
    """Where notifications are put. `receive` returns when they are on disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock
        database = store.database
        columns = [column.name for column in notifications.c if column.name != "id"]
        self._add_notifications = database.insert(
            notifications, columns, "ON CONFLICT (identity) DO NOTHING RETURNING id, identity"
        )
        # New or not, the lane is locked, and made due where nothing else is going on in it.
        self._add_lanes = database.insert(
            lanes,
            ("queue_id", "order_id", "next_at", "newest_snapshot_at"),
            "ON CONFLICT (queue_id, order_id) DO UPDATE SET newest_snapshot_at ="
            " CASE WHEN excluded.newest_snapshot_at > lanes.newest_snapshot_at"
            " THEN excluded.newest_snapshot_at ELSE lanes.newest_snapshot_at END,"
            " next_at = CASE WHEN lanes.current_delivery_id IS NULL AND lanes.next_at IS NULL"
            " THEN excluded.next_at ELSE lanes.next_at END"
            " RETURNING queue_id, order_id, id, newest_snapshot_at",
        )
        self._add_deliveries = database.insert(
            deliveries, ("notification_id", "lane_id", "snapshot_at", "state", "reason", "ended_at")
        )
        parameter = "%s" if database.shared else "?"
        self._supersede = (
            f"UPDATE deliveries {database.by_index.format('ix_deliveries_waiting')}"  # noqa: S608 - our own names
            f" SET state = 'done', reason = 'superseded', ended_at = {parameter} FROM lanes"
            f" WHERE deliveries.lane_id {database.among} AND deliveries.state = 'waiting'"
            " AND lanes.id = deliveries.lane_id AND deliveries.id <> coalesce(lanes.current_delivery_id, 0)"
        )

    async def receive(self, notification: ReceivedNotification) -> Received:
        """
        Stores a notification with what is owed for it, once. On disk when this returns.

        Raises `StoreUnavailable` where nothing was stored.
        """
        received = await self._store.write(self._remember, notification, len(notification.body))
        if isinstance(received, Received):
            return received
        # On its own: lanes are locked in one order, and after those of a batch a retry's would not be.
        return await self._store.write(self._retry, received)

    async def known(self, identities: Sequence[bytes]) -> set[bytes]:
        """Which of these are here already, whatever became of them. Raises `StoreUnavailable`."""
        return await self._store.write(self._known, identities)

    # --- in the writer's thread, inside its transaction ---

    def _known(self, connection: Connection, asked: Sequence[Sequence[bytes]]) -> list[set[bytes]]:
        n = notifications.c
        return [
            set(connection.execute(select(n.identity).where(n.identity.in_(identities))).scalars())
            for identities in asked
        ]

    def _remember(self, connection: Connection, received: Sequence[ReceivedNotification]) -> list[Received | Dead]:
        # Through the driver, a statement a table: that is most of what an accept costs.
        cursor = connection.connection.cursor()
        now = self._clock()
        first: dict[bytes, ReceivedNotification] = {}
        for notification in received:
            first.setdefault(notification.identity, notification)
        # In the order of their identities, here and on every other node: two batches never wait for each other.
        rows = [_row(first[identity], now) for identity in sorted(first)]
        ids = {identity: key for key, identity in self._add_notifications.rows(cursor, rows)}
        new = [notification for notification in first.values() if notification.identity in ids]
        if self._owe(cursor, new, ids, now):
            self._store.database.tell(cursor)
        return [
            Received.NEW
            if notification.identity in ids and first[notification.identity] is notification
            else self._again(connection, notification, now)
            for notification in received
        ]

    def _owe(self, cursor: Any, new: Sequence[ReceivedNotification], ids: dict[bytes, int], now: int) -> bool:
        """Puts what each route is owed into its lane; a batch is folded per lane. Whether anything is owed."""
        owed: dict[tuple[int, str], list[tuple[int, int]]] = {}
        refetches: dict[int, bool] = {}
        for notification in new:
            snapshot_at = now if notification.snapshot_at is None else notification.snapshot_at
            for wanted in notification.wanted:
                refetches[wanted.queue_id] = wanted.refetch
                owed.setdefault((wanted.queue_id, notification.order_id), []).append(
                    (snapshot_at, ids[notification.identity])
                )
        if not owed:
            return False
        rows = [(*lane, now, max(owed[lane])[0]) for lane in sorted(owed)]
        locked = {(queue_id, order_id): rest for queue_id, order_id, *rest in self._add_lanes.rows(cursor, rows)}
        superseded: list[int] = []
        added: list[tuple[Any, ...]] = []
        for lane, snapshots in owed.items():
            lane_id, newest_snapshot_at = locked[lane]
            # A route that re-reads needs the newest trigger alone: not what was here before, nor what arrives late.
            newest = max(reversed(snapshots), key=itemgetter(0)) if refetches[lane[0]] else None
            if newest is not None and newest[0] >= newest_snapshot_at:
                superseded.append(lane_id)
            for snapshot in snapshots:
                snapshot_at, notification_id = snapshot
                passed = newest is not None and (snapshot is not newest or snapshot_at < newest_snapshot_at)
                state = (
                    (State.DONE.value, Reason.SUPERSEDED.value, now) if passed else (State.WAITING.value, None, None)
                )
                added.append((notification_id, lane_id, snapshot_at, *state))
        if superseded:
            cursor.execute(self._supersede, (now, self._store.database.several(superseded)))
        self._add_deliveries.rows(cursor, added)
        return True

    def _again(self, connection: Connection, notification: ReceivedNotification, now: int) -> Received | Dead:
        n = notifications.c
        known = connection.execute(select(n.id).where(n.identity == notification.identity)).scalar()
        if known is None:  # pruned by another node, after it was in our way
            return self._remember(connection, [notification])[0]
        # A pruned body cannot be compared any more; the identity then has the word.
        one_of_them = (n.id == known) | (n.conflicts_with == known)
        rows = connection.execute(select(n.id, n.digest, n.body).where(one_of_them).order_by(n.id)).all()
        same = next((row.id for row in rows if row.body is None or row.body == notification.body), None)
        if same is None:
            digest = _digest(notification.body)
            same = next((row.id for row in rows if self._digest_of(connection, row) == digest), None)
            if same is None:
                if len(rows) <= MOST_CONFLICTS:
                    row = _row(notification, now, conflicts_with=known, digest=digest)
                    self._add_notifications.rows(connection.connection.cursor(), [row])
                return Received.CONFLICT
        if same != known:  # a conflict once more, which has no deliveries
            return Received.REPEAT
        dead = [] if notification.source == "reconciliation" else self._dead(connection, known, now)
        return dead or Received.REPEAT

    def _digest_of(self, connection: Connection, row: Any) -> bytes:
        """Worked out once and kept: whoever knows one signed URL may repeat an event as often as it likes."""
        if row.digest is not None:
            return bytes(row.digest)
        digest = _digest(row.body)
        connection.execute(update(notifications).where(notifications.c.id == row.id).values(digest=digest))
        return digest

    def _dead(self, connection: Connection, notification_id: int, now: int) -> Dead:
        d = deliveries.c
        dead = connection.execute(
            select(d.id, d.lane_id).where(
                d.notification_id == notification_id,
                d.state == State.DEAD.value,
                d.reason.in_([reason.value for reason in RETRIED_BY_A_REPEAT]),
                func.coalesce(d.retried_at, 0) <= now - RETRY_AT_MOST_EVERY_MS,
            )
        )
        return [(row.id, row.lane_id) for row in dead]

    def _retry(self, connection: Connection, items: Sequence[Dead]) -> list[Received]:
        now = self._clock()
        locked_lanes(connection, {lane_id for letters in items for _, lane_id in letters})
        changed = [retry_dead_letters(connection, letters, now, reasons=RETRIED_BY_A_REPEAT) for letters in items]
        if any(changed):
            self._store.database.tell(connection.connection.cursor())
        return [Received.RETRIED if each else Received.REPEAT for each in changed]


def _row(
    notification: ReceivedNotification, now: int, *, conflicts_with: int | None = None, digest: bytes | None = None
) -> tuple[Any, ...]:
    """The columns of the table after its key, in their order."""
    return (
        notification.identity if conflicts_with is None else None,
        conflicts_with,
        *notification.channel,
        notification.callback,
        notification.order_id,
        now if notification.snapshot_at is None else notification.snapshot_at,
        now,
        notification.source,
        digest,
        notification.body,
    )


def _digest(body: bytes) -> bytes:
    try:
        return order_digest(order_in(decode(body)))
    except NotAnOrder:  # nested too deeply to be compared: equal to its own bytes alone
        return sha256(body).digest()[:16]
