"""Maintenance of the ledger: prune, check, measure and back up.

Bodies are personal data. A body is deleted 30 days after receipt if all its deliveries are done, otherwise after 90
days, and after one day if no route wanted it. Rows stay longer, because they make a repeat recognisable. Everything
that waits keeps all it has. Pruning goes in small transactions between those of the inbox. It stores no progress: each
round looks again at what still exists.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, delete, func, select, text, update

from adapter.ledger.dead_letters import lock_lanes
from adapter.ledger.queries import IS_UNWANTED
from adapter.ledger.schema import attempts, deliveries, lanes, notifications, processes, queues, uses, verdicts
from adapter.ledger.settlement import State
from adapter.ledger.store import Store, StoreUnavailable
from adapter.ledger.uses import DAY_MS
from adapter.moments import in_milliseconds

log = structlog.get_logger(__name__)

BETWEEN_ROUNDS = timedelta(hours=1)
BETWEEN_STEPS = timedelta(milliseconds=200)
NOTIFICATIONS_PER_STEP = 200
VERDICTS_PER_STEP = 1000
MOST_VERDICTS = 2_000_000  # a flood of refusals takes the place of older verdicts, not of the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The times after which things are deleted."""

    bodies: timedelta  # bodies of notifications whose deliveries are all done
    bodies_of_dead_letters: timedelta
    unwanted: timedelta  # bodies of notifications that no route wanted
    rows: timedelta  # notifications with their deliveries
    verdicts: timedelta
    uses: timedelta  # counts of calls, by day


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The numbers of rows that a step deleted, and whether the round goes on."""

    bodies: int = 0
    notifications: int = 0
    verdicts: int = 0
    more: bool = False


class Maintenance:
    """Prunes the ledger in steps."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        # The notification where the round continues; 0: a new round.
        self._bodies_after = self._unwanted_after = self._rows_after = 0

    async def run(self) -> None:
        """Prune every hour, with a pause after each step, until cancelled."""
        while True:
            pruned = Pruned()
            try:
                pruned = await self.step()
                if pruned.bodies or pruned.notifications or pruned.verdicts:
                    counts = {"bodies": pruned.bodies, "notifications": pruned.notifications}
                    log.info("pruned", **counts, verdicts=pruned.verdicts)
            except StoreUnavailable:  # logged by the store
                pass
            except Exception as error:  # a fault in one row must not end all pruning
                log.error("pruning_failed", exc_info=error)
            await asyncio.sleep((BETWEEN_STEPS if pruned.more else BETWEEN_ROUNDS).total_seconds())

    async def step(self) -> Pruned:
        """Delete one portion of bodies, notifications and verdicts. Raises `StoreUnavailable`."""
        kept = self._retention
        bodies, self._bodies_after = await self._store.run(self._bodies, self._bodies_after, kept.bodies)
        unwanted, self._unwanted_after = await self._store.run(
            self._bodies, self._unwanted_after, kept.unwanted, IS_UNWANTED
        )
        rows, self._rows_after = await self._store.run(self._rows, self._rows_after)
        old_verdicts = await self._store.run(self._verdicts)
        await self._store.run(self._uses)
        more = self._bodies_after or self._unwanted_after or self._rows_after or old_verdicts == VERDICTS_PER_STEP
        return Pruned(bodies=bodies + unwanted, notifications=rows, verdicts=old_verdicts, more=bool(more))

    # --- in the writer's thread, inside its transaction; they return a number and where the next step begins ---

    def _verdicts(self, connection: Connection) -> int:
        v = verdicts.c
        old = select(v.id).where(v.at < self._before(self._retention.verdicts)).order_by(v.at)
        newest = select(func.max(v.id)).scalar_subquery()
        too_many = select(v.id).where(v.id <= newest - MOST_VERDICTS).order_by(v.id)
        ids: set[int] = set()
        for statement in (old, too_many):
            ids.update(connection.execute(statement.limit(VERDICTS_PER_STEP - len(ids))).scalars())
        return connection.execute(delete(verdicts).where(v.id.in_(ids))).rowcount

    def _uses(self, connection: Connection) -> None:
        connection.execute(delete(uses).where(uses.c.day < self._before(self._retention.uses) // DAY_MS))

    def _bodies(self, connection: Connection, after: int, kept: timedelta, *conditions: Any) -> tuple[int, int]:
        n, d = notifications.c, deliveries.c
        old, following = self._old(connection, after, kept, n.body.is_not(None), *conditions)
        younger = [key for key, at in old.items() if at >= self._before(self._retention.bodies_of_dead_letters)]
        _lock_lanes_of(connection, old)
        needed = (d.state == State.WAITING.value) | (d.state == State.DEAD.value) & d.notification_id.in_(younger)
        pruned = old.keys() - _having(connection, old, needed)
        count = connection.execute(update(notifications).where(n.id.in_(pruned)).values(body=None)).rowcount
        delivered = select(d.id).where(d.notification_id.in_(pruned))
        said = attempts.c.delivery_id.in_(delivered) & attempts.c.message.is_not(None)
        connection.execute(update(attempts).where(said).values(message=None))
        return count, following

    def _rows(self, connection: Connection, after: int) -> tuple[int, int]:
        """Delete notifications with their deliveries and empty lanes."""
        n, d = notifications.c, deliveries.c
        old, following = self._old(connection, after, self._retention.rows)
        lane_ids = _lock_lanes_of(connection, old)
        stops = select(lanes.c.id).where(lanes.c.id == d.lane_id, lanes.c.current_delivery_id == d.id).exists()
        pruned = old.keys() - _having(connection, old, (d.state == State.WAITING.value) | stops)
        delivery_ids = select(d.id).where(d.notification_id.in_(pruned))
        connection.execute(delete(attempts).where(attempts.c.delivery_id.in_(delivery_ids)))
        connection.execute(delete(deliveries).where(d.notification_id.in_(pruned)))
        connection.execute(update(notifications).where(n.conflicts_with.in_(pruned)).values(conflicts_with=None))
        count = connection.execute(delete(notifications).where(n.id.in_(pruned))).rowcount
        remaining = select(d.id).where(d.lane_id == lanes.c.id).exists()
        connection.execute(delete(lanes).where(lanes.c.id.in_(lane_ids), lanes.c.holder.is_(None), ~remaining))
        return count, following

    def _old(self, connection: Connection, after: int, kept: timedelta, *conditions: Any) -> tuple[dict[int, int], int]:
        """Return the next old notifications with their times of receipt, and where to continue."""
        n, before = notifications.c, self._before(kept)
        following = select(n.id, n.received_at).where(n.id > after, *conditions).order_by(n.id)
        # Locked, so that no backfill adds a delivery before the deletion. One that does it now keeps them from it.
        locked = following.limit(NOTIFICATIONS_PER_STEP).with_for_update(key_share=True, skip_locked=True)
        rows = connection.execute(locked).all()
        old = {row.id: row.received_at for row in takewhile(lambda row: row.received_at < before, rows)}
        return old, rows[-1].id if len(old) == NOTIFICATIONS_PER_STEP else 0

    def _before(self, kept: timedelta) -> int:
        return self._store.clock() - in_milliseconds(kept)


def _lock_lanes_of(connection: Connection, ids: Iterable[int]) -> set[int]:
    # So that no delivery of these notifications is retried or added before they are deleted.
    d = deliveries.c
    lane_ids = set(connection.execute(select(d.lane_id).where(d.notification_id.in_(ids))).scalars())
    lock_lanes(connection, lane_ids)
    return lane_ids


def _having(connection: Connection, ids: Iterable[int], condition: Any) -> set[int]:
    """Return those of these notifications that have such a delivery."""
    d = deliveries.c
    return set(connection.execute(select(d.notification_id).where(d.notification_id.in_(ids), condition)).scalars())


def faults(connection: Connection) -> list[str]:
    """Return a line for each kind of fault: a state that must never occur."""
    d, lane = deliveries.c, lanes.c
    process = select(processes.c.id).where(processes.c.id == lane.holder).exists()
    waits = select(d.id).where(d.lane_id == lane.id, d.state == State.WAITING.value).exists()
    current = select(d.id).where(d.id == lane.current_delivery_id, d.lane_id == lane.id)
    is_idle = lane.holder.is_(None) & lane.next_at.is_(None)
    has_work = lane.current_delivery_id.is_(None) & waits | current.where(d.state != State.DEAD.value).exists()
    is_paused_without_cause = queues.c.paused_until.is_not(None) & queues.c.paused_by.is_(None)
    checks = {
        "lanes that no process will claim although a delivery waits": (lanes, is_idle & has_work),
        "lanes held by an unknown process": (lanes, lane.holder.is_not(None) & ~process),
        "lanes whose current delivery is missing": (lanes, lane.current_delivery_id.is_not(None) & ~current.exists()),
        "lanes with more settled claims than claims": (lanes, lane.settled > lane.claim),
        "deliveries with an unknown state": (deliveries, d.state.not_in([state.value for state in State])),
        "finished deliveries without a reason": (deliveries, (d.state != State.WAITING.value) & d.reason.is_(None)),
        "paused queues without a cause": (queues, is_paused_without_cause),
    }
    _remove_time_limit(connection)
    found = []
    for words, (table, condition) in checks.items():
        count = connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one()
        found += [f"{words}: {count}"] if count else []
    if connection.dialect.name == "sqlite":
        found += [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(10)") if row[0] != "ok"]
        dangling = {(row[0], row[2]) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}
        found += [
            f"rows of {child} with a reference to a missing row of {parent}" for child, parent in sorted(dangling)
        ]
    return found


def figures(connection: Connection) -> dict[str, int]:
    """Count the rows of each table and the stored bodies, and measure the size in bytes."""
    _remove_time_limit(connection)
    tables = (notifications, deliveries, attempts, lanes, queues, verdicts)
    counts = {table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables}
    bodies = connection.execute(select(func.count()).where(notifications.c.body.is_not(None))).scalar_one()
    size = {
        "sqlite": "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size",
        "postgresql": "SELECT pg_database_size(current_database())",
    }[connection.dialect.name]
    return counts | {"bodies": bodies, "bytes": connection.execute(text(size)).scalar_one()}


def back_up(connection: Connection, target: Path) -> int:
    """Copy a SQLite ledger into a new file and return its size in bytes.

    The service may run meanwhile. The copy shows the ledger at one moment. Only the owner may read the file.

    Raises:
        FileExistsError: The target exists.
        StoreUnavailable: The copy cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; nothing was overwritten")
    partial = target.with_name(f"{target.name}.partial")
    raw = connection.connection.driver_connection
    assert raw is not None
    try:
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        raw.execute("VACUUM INTO ?", (str(partial),))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(target)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StoreUnavailable(f"cannot write {target}: {error}") from error
    return target.stat().st_size


def _remove_time_limit(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
