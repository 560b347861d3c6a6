"""
Remember before we say 200: notification, deliveries, lanes and identity in one transaction.

The same event again does nothing more, for as long as its row lives; the same identity with another order inside is
kept without deliveries. A repeat whose delivery is dead because it was rejected or its schedule ran out replays it, at
most once an hour: that is what a person who presses retry at Norce means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Dialect, bindparam, func, insert, select, update
from sqlalchemy.sql import Executable

from adapter.deliveries import Reason, State
from adapter.ledger.schema import deliveries, lanes, notifications
from adapter.ledger.store import Store
from adapter.orders import NotAnOrder, order_digest

REPLAY_AT_MOST_EVERY_MS = 3_600_000
MOST_CONFLICTS = 8  # kept of one identity; more are answered and counted, and tell nobody anything new


class Received(Enum):
    """What became of a notification that was handed in."""

    NEW = "new"
    REPEAT = "repeat"  # the same event again
    REPLAYED = "replayed"  # the same event again, whose dead delivery is tried anew
    CONFLICT = "conflict"  # the same identity with another order inside: kept, not delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A queue (one route for one merchant and channel) that wants the event. `refetch`: only its newest trigger."""

    queue_id: int
    refetch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """
    A notification to remember. `identity` says which event it is; `snapshot_at` is its place in the order's history, in
    milliseconds, or None where the order does not say when it was last modified.
    """

    identity: bytes
    merchant: str
    channel: str
    callback: str
    order_id: str
    snapshot_at: int | None
    source: str
    body: bytes
    wanted: tuple[Wanted, ...]


class Inbox:
    """Where notifications are put. `receive` returns when they are on disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clock = store.clock
        dialect = store.engine.dialect
        self._find = _Prepared(
            select(notifications.c.id).where(notifications.c.identity == bindparam("identity")), dialect
        )
        self._add_notification = _Prepared(
            insert(notifications).values({c: bindparam(c.name) for c in notifications.c}), dialect
        )
        self._find_lane = _Prepared(
            select(
                lanes.c.id, lanes.c.holder, lanes.c.current_delivery_id, lanes.c.next_at, lanes.c.newest_snapshot_at
            ).where(lanes.c.queue_id == bindparam("queue_id"), lanes.c.order_id == bindparam("order_id")),
            dialect,
        )
        new_lane = (lanes.c.id, lanes.c.queue_id, lanes.c.order_id, lanes.c.next_at, lanes.c.newest_snapshot_at)
        self._add_lane = _Prepared(insert(lanes).values({c: bindparam(c.name) for c in new_lane}), dialect)
        d = deliveries.c
        new_delivery = (d.id, d.notification_id, d.lane_id, d.snapshot_at, d.state, d.reason, d.ended_at)
        self._add_delivery = _Prepared(insert(deliveries).values({c: bindparam(c.name) for c in new_delivery}), dialect)

    async def receive(self, receipt: Receipt) -> Received:
        """
        Stores a notification with what is owed for it, once. On disk when this returns.

        Raises `StoreUnavailable` where nothing was stored.
        """
        return await self._store.write(self._remember, receipt)

    # --- in the writer's thread, inside its transaction ---

    def _remember(self, connection: Connection, receipts: Sequence[Receipt]) -> list[Received]:
        cursor = connection.connection.cursor()
        now = self._clock()
        # Taken anew from the tables for each group: a group that was rolled back has used up nothing.
        keys = _Keys(cursor)
        new: list[dict[str, Any]] = []
        ids: dict[bytes, int] = {}
        answers: list[Received] = []
        for receipt in receipts:
            known = ids.get(receipt.identity)
            if known is None:
                row = self._find.one(cursor, identity=receipt.identity)
                known = row[0] if row else None
            elif new:  # its twin came in the same group: it must be in the table before it can be compared
                self._add_notification.many(cursor, new)
                new = []
            if known is not None:
                answers.append(self._again(connection, known, receipt, keys, now))
                continue
            notification_id = ids[receipt.identity] = keys.notification()
            new.append(_row(receipt, notification_id, now))
            for wanted in receipt.wanted:
                self._owe(cursor, notification_id, receipt, wanted, keys, now)
            answers.append(Received.NEW)
        if new:
            self._add_notification.many(cursor, new)
        return answers

    def _owe(
        self, cursor: Any, notification_id: int, receipt: Receipt, wanted: Wanted, keys: "_Keys", now: int
    ) -> None:
        snapshot_at = now if receipt.snapshot_at is None else receipt.snapshot_at
        state, reason, ended_at = State.WAITING.value, None, None
        row = self._find_lane.one(cursor, queue_id=wanted.queue_id, order_id=receipt.order_id)
        if row is None:
            lane_id = keys.lane()
            self._add_lane.one_row(
                cursor, id=lane_id, queue_id=wanted.queue_id, order_id=receipt.order_id, next_at=now,
                newest_snapshot_at=snapshot_at,
            )  # fmt: skip
        else:
            lane_id, holder, current, next_at, newest = row
            changes: dict[str, int] = {}
            if snapshot_at >= newest:
                changes["newest_snapshot_at"] = snapshot_at
                if wanted.refetch:
                    cursor.execute(*_supersede(lane_id, current, now))
            elif wanted.refetch:  # it arrives late: a newer trigger has been here
                state, reason, ended_at = State.DONE.value, Reason.SUPERSEDED.value, now
            if state == State.WAITING.value and holder is None and current is None and next_at is None:
                changes["next_at"] = now
            if changes:
                names = ", ".join(f"{name} = ?" for name in changes)
                cursor.execute(f"UPDATE lanes SET {names} WHERE id = ?", (*changes.values(), lane_id))  # noqa: S608
        self._add_delivery.one_row(
            cursor, id=keys.delivery(), notification_id=notification_id, lane_id=lane_id, snapshot_at=snapshot_at,
            state=state, reason=reason, ended_at=ended_at,
        )  # fmt: skip

    def _again(self, connection: Connection, known: int, receipt: Receipt, keys: "_Keys", now: int) -> Received:
        # A pruned body cannot be compared any more; the identity then has the word.
        n = notifications.c
        one_of_them = (n.id == known) | (n.conflicts_with == known)
        rows = connection.execute(select(n.id, n.digest, n.body).where(one_of_them).order_by(n.id)).all()
        same = next((row.id for row in rows if row.body is None or row.body == receipt.body), None)
        if same is None:
            digest = _digest(receipt.body)
            same = next((row.id for row in rows if self._digest_of(connection, row) == digest), None)
            if same is None:
                if len(rows) <= MOST_CONFLICTS:
                    row = _row(receipt, keys.notification(), now)
                    conflict = row | {"identity": None, "conflicts_with": known, "digest": digest}
                    connection.execute(insert(notifications).values(conflict))
                return Received.CONFLICT
        if same != known:  # a conflict once more, which has no deliveries
            return Received.REPEAT
        if receipt.source != "reconciliation" and self._replay_dead(connection, known, now):
            return Received.REPLAYED
        return Received.REPEAT

    def _digest_of(self, connection: Connection, row: Any) -> bytes:
        """Worked out once and kept: whoever knows one signed URL may repeat an event as often as it likes."""
        if row.digest is not None:
            return bytes(row.digest)
        digest = _digest(row.body)
        connection.execute(update(notifications).where(notifications.c.id == row.id).values(digest=digest))
        return digest

    def _replay_dead(self, connection: Connection, notification_id: int, now: int) -> bool:
        d = deliveries.c
        dead = connection.execute(
            select(d.id, d.lane_id).where(
                d.notification_id == notification_id,
                d.state == State.DEAD.value,
                d.reason.in_((Reason.REJECTED.value, Reason.EXHAUSTED.value)),
                func.coalesce(d.replayed_at, 0) <= now - REPLAY_AT_MOST_EVERY_MS,
            )
        ).all()
        for delivery_id, lane_id in dead:
            connection.execute(
                update(deliveries)
                .where(d.id == delivery_id)
                .values(
                    state=State.WAITING.value,
                    reason=None,
                    ended_at=None,
                    attempts=0,
                    first_attempt_at=None,
                    replayed_at=now,
                )
            )
            idle = (lanes.c.holder.is_(None)) & (lanes.c.next_at.is_(None))
            connection.execute(
                update(lanes)
                .where(
                    lanes.c.id == lane_id, idle, func.coalesce(lanes.c.current_delivery_id, delivery_id) == delivery_id
                )
                .values(next_at=now)
            )
        return bool(dead)


class _Keys:
    """Keys in order of insertion. One process writes, so the highest in the table is the last one given."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._last: dict[str, int] = {}

    def notification(self) -> int:
        return self._next("notifications")

    def lane(self) -> int:
        return self._next("lanes")

    def delivery(self) -> int:
        return self._next("deliveries")

    def _next(self, table: str) -> int:
        if table not in self._last:
            self._last[table] = self._cursor.execute(f"SELECT max(id) FROM {table}").fetchone()[0] or 0  # noqa: S608
        self._last[table] += 1
        return self._last[table]


class _Prepared:
    """A statement compiled once from the tables, and run through the driver: that is most of what an accept costs."""

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self._sql = str(compiled)
        self._names: list[str] = compiled.positiontup

    def one(self, cursor: Any, **values: Any) -> Any:
        return cursor.execute(self._sql, [values[name] for name in self._names]).fetchone()

    def one_row(self, cursor: Any, **values: Any) -> None:
        cursor.execute(self._sql, [values[name] for name in self._names])

    def many(self, cursor: Any, rows: Sequence[dict[str, Any]]) -> None:
        cursor.executemany(self._sql, [[row[name] for name in self._names] for row in rows])


def _supersede(lane_id: int, current: int | None, now: int) -> tuple[str, tuple[Any, ...]]:
    return (
        "UPDATE deliveries SET state = 'done', reason = 'superseded', ended_at = ?"
        " WHERE lane_id = ? AND state = 'waiting' AND id <> ?",
        (now, lane_id, current or 0),
    )


def _row(receipt: Receipt, notification_id: int, now: int) -> dict[str, Any]:
    return {
        "id": notification_id,
        "identity": receipt.identity,
        "conflicts_with": None,
        "merchant": receipt.merchant,
        "channel": receipt.channel,
        "callback": receipt.callback,
        "order_id": receipt.order_id,
        "snapshot_at": now if receipt.snapshot_at is None else receipt.snapshot_at,
        "received_at": now,
        "source": receipt.source,
        "digest": None,
        "body": receipt.body,
    }


def _digest(body: bytes) -> bytes:
    try:
        return order_digest(body)
    except NotAnOrder:  # nested too deeply to be compared: equal to its own bytes alone
        return sha256(body).digest()[:16]
