"""Backfill: the stored notifications of orders that have no delivery on a route.

`following` and `bodies` read beside the writer. `add` checks everything again under the locks of the rows, because
notifications arrive, are pruned and are backfilled by others meanwhile. A delivery that a route in shadow mode
recorded does not count.

Notifications are read from the newest one backwards, so the first one that the route wants is the newest one of its
order. On a route that does not read the order again, the newest one has the latest snapshot, not the latest arrival.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import Connection, func, insert, select, update

from adapter.identifiers import Channel
from adapter.ledger.commands import record_action
from adapter.ledger.inbox import lane_upserter
from adapter.ledger.queries import Author, Id, Moment, Text
from adapter.ledger.schema import deliveries, lanes, notifications, queues
from adapter.ledger.settlement import Reason, State
from adapter.ledger.store import Store, StoreUnavailable

LATE_MS = 3_600_000  # by which a notification may be younger than one with a higher id: nodes insert at the same time
MAX_PER_STEP = 500


class BackfillStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of a backfill, over notifications from the newest to the oldest.

    `since` limits the time of receipt, in milliseconds.
    """

    route: Text
    by: Author
    merchant: Text | None = None
    channel: Text | None = None
    since: Moment | None = None
    dry_run: bool = False
    most: Annotated[int, Meta(ge=1, le=MAX_PER_STEP)] = MAX_PER_STEP  # notifications that are read at once
    after: Text | None = None  # where the step before ended
    action: Id | None = None  # the row of the first step in the table of actions

    def given(self) -> dict[str, object]:
        """Return the conditions that are set."""
        names = ("route", "merchant", "channel", "since")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class StoredNotification(msgspec.Struct, frozen=True, kw_only=True):
    """A notification whose order has no delivery in the queue."""

    id: int
    queue_id: int
    channel: Channel
    order_id: str
    snapshot_at: int
    body_bytes: int | None  # None if it has no body
    cursor: str  # where a step begins that follows this notification


class Following(msgspec.Struct, frozen=True, kw_only=True):
    """A page of notifications, newest first."""

    found: list[StoredNotification]
    read: int  # with those that were left out
    after: str | None  # where the next step begins; None after the last one


class BackfillLedger:
    """The ledger as a backfill of one route uses it.

    Args:
        store: The open ledger.
        callback: The name of the route's callback.
        queue_ids: The route's queues.
        refetch: Whether the route reads the order again.
    """

    def __init__(self, store: Store, *, callback: str, queue_ids: Mapping[Channel, int], refetch: bool) -> None:
        self._store = store
        self._callback = callback
        self._queue_ids = queue_ids
        self._refetch = refetch
        self._upsert_lanes = lane_upserter(store.database)

    # --- beside the writer, in any thread ---

    def following(self, after: str | None, most: int, since: int | None) -> Following:
        """Read at most `most` notifications, and return those whose order has no delivery."""
        n = notifications.c
        by = n.id if self._refetch else n.identity
        columns = (n.id, n.identity, n.merchant, n.channel, n.callback, n.order_id, n.conflicts_with, n.snapshot_at,
                   n.received_at, func.length(n.body).label("body_bytes"))  # fmt: skip
        statement = select(*columns).order_by(by.desc()).limit(most)
        if after is not None:
            statement = statement.where(by < (int(after) if self._refetch else bytes.fromhex(after)))
        with self._reading() as connection:
            rows = connection.execute(statement).all()
            found = [
                StoredNotification(
                    id=row.id,
                    queue_id=self._queue_ids[channel],
                    channel=channel,
                    order_id=row.order_id,
                    snapshot_at=row.snapshot_at,
                    body_bytes=row.body_bytes,
                    cursor=self._cursor(row),
                )
                for row in rows
                if row.callback == self._callback
                and (channel := Channel(row.merchant, row.channel)) in self._queue_ids
                and (since is None or row.received_at >= since)
                # A conflict starts nothing on a route that does not read the order again.
                and (self._refetch or row.conflicts_with is None)
            ]
            have = self._with_delivery(connection, {(each.queue_id, each.order_id) for each in found})
        is_last = len(rows) < most
        if self._refetch and since is not None and not is_last:
            is_last = all(row.received_at < since - LATE_MS for row in rows)
        found = [each for each in found if (each.queue_id, each.order_id) not in have]
        return Following(found=found, read=len(rows), after=None if is_last else self._cursor(rows[-1]))

    def bodies(self, ids: Collection[int]) -> dict[int, bytes]:
        """Return the bodies of these notifications that still have one."""
        n = notifications.c
        with self._reading() as connection:
            rows = connection.execute(select(n.id, n.body).where(n.id.in_(ids), n.body.is_not(None)))
            return {row.id: bytes(row.body) for row in rows}

    def paused(self) -> list[Channel]:
        """Return the channels whose queues are paused now."""
        q = queues.c
        with self._reading() as connection:
            is_ours = q.id.in_(self._queue_ids.values()) & (q.paused_until > self._store.clock())
            rows = connection.execute(select(q.merchant, q.channel).where(is_ours).order_by(q.merchant, q.channel))
            return [Channel(*row) for row in rows]

    def _cursor(self, row: Any) -> str:
        return str(row.id) if self._refetch else bytes(row.identity).hex()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._store.read_connection() as connection:
                yield connection
        except self._store.database.errors as error:
            raise StoreUnavailable("the ledger cannot be read") from error

    def _with_delivery(self, connection: Connection, orders: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
        lane, d = lanes.c, deliveries.c
        counts = (d.lane_id == lane.id) & d.reason.is_distinct_from(Reason.SHADOW.value)
        found = select(lane.queue_id, lane.order_id).where(
            lane.queue_id.in_({queue_id for queue_id, _ in orders}),
            lane.order_id.in_({order_id for _, order_id in orders}),
            select(d.id).where(counts).exists(),
        )
        return {(row.queue_id, row.order_id) for row in connection.execute(found)}

    # --- in the writer's thread, inside its transaction ---

    async def add(self, wanted: Sequence[StoredNotification], step: BackfillStep) -> tuple[int, int]:
        """Add a delivery for each of these notifications whose order still has none.

        They are of different orders. Returns the number of deliveries, and the id of the recorded action. Raises
        `StoreUnavailable`.
        """
        return await self._store.run(self._add, wanted, step)

    def _add(self, connection: Connection, wanted: Sequence[StoredNotification], step: BackfillStep) -> tuple[int, int]:
        n, now = notifications.c, self._store.clock()
        # Locked before the lanes, as in the inbox, so that a notification is either pruned or gets its delivery.
        locked = select(n.id, n.body.is_not(None).label("has_body")).where(n.id.in_([each.id for each in wanted]))
        rows = connection.execute(locked.order_by(n.id).with_for_update(key_share=True))
        usable = {row.id for row in rows if row.has_body or self._refetch}
        by_lane = {(each.queue_id, each.order_id): each for each in wanted if each.id in usable}
        locked_lanes = self._upsert_lanes(connection.connection.cursor(), [(*lane, now) for lane in sorted(by_lane)])
        lane_ids = {(queue_id, order_id): lane_id for queue_id, order_id, lane_id in locked_lanes}
        have = self._with_delivery(connection, by_lane.keys())
        added = [each for lane, each in by_lane.items() if lane not in have]
        if added:
            rows_to_add = [
                {
                    "notification_id": each.id,
                    "lane_id": lane_ids[each.queue_id, each.order_id],
                    "position": 0 if self._refetch else each.snapshot_at,
                    "state": State.WAITING.value,
                }
                for each in added
            ]
            connection.execute(insert(deliveries), rows_to_add)
            ids = [each.id for each in added]
            connection.execute(update(notifications).where(n.id.in_(ids)).values(is_wanted=True))
            self._store.database.notify(connection)
        action = record_action(connection, "backfill", step.by, step.given(), len(added), now, step.action)
        return len(added), action
