"""
What is kept how long, and the care that a database needs: prune, check, measure, back up.

Bodies are other people's orders: they go 30 days after receipt where everything owed for them is done, and after 90
days where it is not. The rows, and with them what makes a repeat a repeat, stay longer. What still waits keeps all it
has. Pruning goes in small steps, each a transaction of its own between those of the intake. Nothing is written down of
its progress: what there is to do is what is still there, so what had to stay is looked at again in the next round.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, delete, func, select, text, update

from adapter.ledger.retry import lock_lanes
from adapter.ledger.schema import attempts, deliveries, lanes, notifications, processes, queues, verdicts
from adapter.ledger.settlement import State
from adapter.ledger.store import Store, StoreUnavailable
from adapter.moments import in_milliseconds

log = structlog.get_logger(__name__)

PRUNE_SECONDS = 3600.0
PRUNE_STEP_SECONDS = 0.2
NOTIFICATIONS_A_STEP = 200
VERDICTS_A_STEP = 1000  # a row each, and nothing hangs on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long a body is kept when all is done, how long otherwise; how long a verdict, and everything else."""

    bodies: timedelta
    bodies_of_dead_letters: timedelta
    rows: timedelta
    verdicts: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a step took away, and whether there may be more."""

    bodies: int = 0
    notifications: int = 0
    verdicts: int = 0
    more: bool = False


class Maintenance:
    """Prunes in steps; call `step` until there is no more. Raises `StoreUnavailable`."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._bodies_after = self._rows_after = 0  # how far this round has come; 0 where a round begins

    async def step(self) -> Pruned:
        """One step of each kind."""
        bodies, self._bodies_after = await self._store.write(self._bodies, self._bodies_after)
        rows, self._rows_after = await self._store.write(self._rows, self._rows_after)
        logged = await self._store.write(self._verdicts, None)
        more = self._bodies_after or self._rows_after or logged == VERDICTS_A_STEP
        return Pruned(bodies=bodies, notifications=rows, verdicts=logged, more=bool(more))

    # --- in the writer's thread, inside its transaction: how many, and after which one the next step begins ---

    def _bodies(self, connection: Connection, items: Sequence[int]) -> list[tuple[int, int]]:
        return [self._take_bodies(connection, after) for after in items]

    def _rows(self, connection: Connection, items: Sequence[int]) -> list[tuple[int, int]]:
        return [self._take_rows(connection, after) for after in items]

    def _verdicts(self, connection: Connection, items: Sequence[None]) -> list[int]:
        v = verdicts.c
        old = select(v.id).where(v.at < self._before(self._retention.verdicts)).order_by(v.at).limit(VERDICTS_A_STEP)
        ids = connection.execute(old).scalars().all()
        return [connection.execute(delete(verdicts).where(v.id.in_(ids))).rowcount for _ in items]

    def _take_bodies(self, connection: Connection, after: int) -> tuple[int, int]:
        n, d = notifications.c, deliveries.c
        old, following = self._old(connection, after, self._retention.bodies, n.body.is_not(None))
        not_so_old = [key for key, at in old.items() if at >= self._before(self._retention.bodies_of_dead_letters)]
        _lock_lanes_of(connection, old)
        needed = (d.state == State.WAITING.value) | (d.state == State.DEAD.value) & d.notification_id.in_(not_so_old)
        gone = old.keys() - _with(connection, old, needed)
        taken = connection.execute(update(notifications).where(n.id.in_(gone)).values(body=None)).rowcount
        return taken, following

    def _take_rows(self, connection: Connection, after: int) -> tuple[int, int]:
        """Takes notifications with all that was owed for them, the conflicts they met, and the lanes left empty."""
        n, d = notifications.c, deliveries.c
        old, following = self._old(connection, after, self._retention.rows)
        of_lanes = _lock_lanes_of(connection, old)
        stops = select(lanes.c.id).where(lanes.c.id == d.lane_id, lanes.c.current_delivery_id == d.id).exists()
        gone = old.keys() - _with(connection, old, (d.state == State.WAITING.value) | stops)
        owed = select(d.id).where(d.notification_id.in_(gone))
        connection.execute(delete(attempts).where(attempts.c.delivery_id.in_(owed)))
        connection.execute(delete(deliveries).where(d.notification_id.in_(gone)))
        taken = connection.execute(delete(notifications).where(n.conflicts_with.in_(gone))).rowcount
        taken += connection.execute(delete(notifications).where(n.id.in_(gone))).rowcount
        left = select(d.id).where(d.lane_id == lanes.c.id).exists()
        connection.execute(delete(lanes).where(lanes.c.id.in_(of_lanes), lanes.c.holder.is_(None), ~left))
        return taken, following

    def _old(self, connection: Connection, after: int, kept: timedelta, *conditions: Any) -> tuple[dict[int, int], int]:
        """The next notifications in the order of their arrival, and when they came, as long as they are that old."""
        n, before = notifications.c, self._before(kept)
        following = select(n.id, n.received_at).where(n.id > after, *conditions).order_by(n.id)
        rows = connection.execute(following.limit(NOTIFICATIONS_A_STEP)).all()
        old = {row.id: row.received_at for row in takewhile(lambda row: row.received_at < before, rows)}
        return old, rows[-1].id if len(old) == NOTIFICATIONS_A_STEP else 0

    def _before(self, kept: timedelta) -> int:
        return self._store.clock() - in_milliseconds(kept)


def _lock_lanes_of(connection: Connection, ids: Iterable[int]) -> set[int]:
    """So that nothing owed for these notifications is retried, or waits anew, before they are gone."""
    d = deliveries.c
    of_lanes = set(connection.execute(select(d.lane_id).where(d.notification_id.in_(ids))).scalars())
    lock_lanes(connection, of_lanes)
    return of_lanes


def _with(connection: Connection, ids: Iterable[int], condition: Any) -> set[int]:
    """Those of these notifications for which there is such a delivery."""
    d = deliveries.c
    return set(connection.execute(select(d.notification_id).where(d.notification_id.in_(ids), condition)).scalars())


def faults(connection: Connection) -> list[str]:
    """What must never be so in a ledger, in words; nothing where all is well."""
    d, lane = deliveries.c, lanes.c
    lives = select(processes.c.id).where(processes.c.id == lane.holder).exists()
    waits = select(d.id).where(d.lane_id == lane.id, d.state == State.WAITING.value).exists()
    current = select(d.id).where(d.id == lane.current_delivery_id, d.lane_id == lane.id)
    nobody_comes = lane.holder.is_(None) & lane.next_at.is_(None)
    stuck = lane.current_delivery_id.is_(None) & waits | current.where(d.state != State.DEAD.value).exists()
    asked = {
        "lanes with work that nobody will ever take": (lanes, nobody_comes & stuck),
        "lanes held by a process that is not there": (lanes, lane.holder.is_not(None) & ~lives),
        "lanes whose delivery is not there": (lanes, lane.current_delivery_id.is_not(None) & ~current.exists()),
        "lanes that settled more than was claimed": (lanes, lane.settled > lane.claim),
        "deliveries of no known state": (deliveries, d.state.not_in([state.value for state in State])),
        "deliveries that ended without a reason": (deliveries, (d.state != State.WAITING.value) & d.reason.is_(None)),
        "queues that nobody knows why they are paused": (
            queues,
            queues.c.paused_until.is_not(None) & queues.c.paused_by.is_(None),
        ),
    }
    _take_your_time(connection)
    told = []
    for words, (table, condition) in asked.items():
        count = connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one()
        told += [f"{count} {words}"] if count else []
    if connection.dialect.name == "sqlite":
        told += [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(10)") if row[0] != "ok"]
        dangling = {(row[0], row[2]) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}
        told += [f"{child} that belong to {parent} which are not there" for child, parent in sorted(dangling)]
    return told


def figures(connection: Connection) -> dict[str, int]:
    """How much there is of what: rows, bodies that are kept, and bytes on the disk."""
    _take_your_time(connection)
    tables = (notifications, deliveries, attempts, lanes, queues, verdicts)
    counts = {table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables}
    bodies = connection.execute(select(func.count()).where(notifications.c.body.is_not(None))).scalar_one()
    size = {
        "sqlite": "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size",
        "postgresql": "SELECT pg_database_size(current_database())",
    }[connection.dialect.name]
    return counts | {"bodies": bodies, "bytes": connection.execute(text(size)).scalar_one()}


def back_up(connection: Connection, target: Path) -> int:
    """
    Copies a SQLite ledger, as it is at one moment and beside a running service, into a new file; its size in bytes.

    Raises `FileExistsError`, and `StoreUnavailable` where the copy cannot be written. Nobody but its owner may read it.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already; nothing was overwritten")
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


def _take_your_time(connection: Connection) -> None:
    """A person waits for it, and nobody else."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))


async def keep_pruned(maintenance: Maintenance) -> None:
    """Every hour, in steps with room between them for everybody else."""
    while True:
        try:
            pruned = await maintenance.step()
            if pruned.bodies or pruned.notifications or pruned.verdicts:
                log.info("pruned", bodies=pruned.bodies, notifications=pruned.notifications, verdicts=pruned.verdicts)
        except StoreUnavailable:  # the store has said so itself
            pruned = Pruned()
        except Exception as error:  # what is wrong with one row must not end all pruning
            log.error("pruning_failed", exc_info=error)
            pruned = Pruned()
        await asyncio.sleep(PRUNE_STEP_SECONDS if pruned.more else PRUNE_SECONDS)
