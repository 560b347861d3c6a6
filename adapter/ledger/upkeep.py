"""
What is kept how long, and the care that a database needs: prune, check, measure, back up.

Bodies are other people's orders: they go 30 days after everything owed for them is done, and 90 days after receipt
where it is not. The rows, and with them what makes a repeat a repeat, stay longer. Pruning goes in small steps, each a
transaction of its own between those of the intake. What still waits keeps everything it has.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, select, text, update

from adapter.deliveries import State
from adapter.ledger.schema import attempts, deliveries, lanes, marks, notifications, processes, queues
from adapter.ledger.store import Store, StoreUnavailable

NOTIFICATIONS_A_STEP = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long a body is kept when all is done, how long otherwise, and how long everything else."""

    bodies: timedelta
    bodies_of_dead_letters: timedelta
    rows: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a step took away, and whether there may be more."""

    bodies: int = 0
    notifications: int = 0
    more: bool = False


class Upkeep:
    """Prunes in steps; call `step` until there is no more. Raises `StoreUnavailable`."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._rows_after = 0  # those before it still wait, and are looked at again in the next round

    async def step(self) -> Pruned:
        """One step of each kind."""
        return await self._store.write(self._step, None)

    # --- in the writer's thread, inside its transaction ---

    def _step(self, connection: Connection, items: Sequence[None]) -> list[Pruned]:
        now = self._store.clock()
        waits, ended = State.WAITING.value, State.DONE.value
        done, more = self._bodies(connection, now, "bodies", self._retention.bodies, deliveries.c.state != ended)
        dead, more_dead = self._bodies(
            connection, now, "bodies_of_dead", self._retention.bodies_of_dead_letters, deliveries.c.state == waits
        )
        rows, more_rows = self._rows(connection, now)
        return [Pruned(bodies=done + dead, notifications=rows, more=more or more_dead or more_rows) for _ in items]

    def _bodies(self, connection: Connection, now: int, name: str, kept: timedelta, but_for: Any) -> tuple[int, bool]:
        """Takes the bodies of the next notifications, but for those with such a delivery; how far it came is kept."""
        mark = f"pruned_{name}"
        known = connection.execute(select(marks.c.value).where(marks.c.name == mark)).scalar()
        ids = self._old(connection, known or 0, now, kept)
        if not ids:
            return 0, False
        n = notifications.c
        owed = select(deliveries.c.id).where(deliveries.c.notification_id == n.id, but_for).exists()
        gone = update(notifications).where(n.id.in_(ids), n.body.is_not(None), ~owed).values(body=None)
        taken = connection.execute(gone).rowcount
        if known is None:
            connection.execute(marks.insert().values(name=mark, value=ids[-1]))
        else:
            connection.execute(marks.update().where(marks.c.name == mark).values(value=ids[-1]))
        return taken, len(ids) == NOTIFICATIONS_A_STEP

    def _rows(self, connection: Connection, now: int) -> tuple[int, bool]:
        """Takes the next notifications with all that was owed for them, but for what waits or stops its lane."""
        ids = self._old(connection, self._rows_after, now, self._retention.rows)
        if not ids:
            self._rows_after = 0
            return 0, False
        self._rows_after = ids[-1]
        n, d = notifications.c, deliveries.c
        current = select(lanes.c.id).where(lanes.c.id == d.lane_id, lanes.c.current_delivery_id == d.id).exists()
        needed = (d.state == State.WAITING.value) | current
        keep = set(connection.execute(select(d.notification_id).where(d.notification_id.in_(ids), needed)).scalars())
        # A conflict goes with what it conflicts with, which came before it.
        rows = connection.execute(
            select(n.id).where(n.id.in_(ids) | n.conflicts_with.in_(ids), n.id.not_in(keep))
            .where(func.coalesce(n.conflicts_with, 0).not_in(keep))
        )  # fmt: skip
        gone = list(rows.scalars())
        owed = connection.execute(select(d.id, d.lane_id).where(d.notification_id.in_(gone))).all()
        connection.execute(delete(attempts).where(attempts.c.delivery_id.in_([row.id for row in owed])))
        connection.execute(delete(deliveries).where(d.id.in_([row.id for row in owed])))
        connection.execute(delete(notifications).where(n.conflicts_with.in_(gone)))
        connection.execute(delete(notifications).where(n.id.in_(gone)))
        left = select(d.id).where(d.lane_id == lanes.c.id).exists()
        idle = lanes.c.holder.is_(None) & lanes.c.next_at.is_(None) & lanes.c.current_delivery_id.is_(None)
        connection.execute(delete(lanes).where(lanes.c.id.in_({row.lane_id for row in owed}), idle, ~left))
        return len(gone), len(ids) == NOTIFICATIONS_A_STEP

    def _old(self, connection: Connection, after: int, now: int, kept: timedelta) -> list[int]:
        """The next notifications in the order of their arrival, as long as they are older than `kept`."""
        n = notifications.c
        before = now - int(kept.total_seconds() * 1000)
        rows = connection.execute(
            select(n.id, n.received_at).where(n.id > after).order_by(n.id).limit(NOTIFICATIONS_A_STEP)
        )
        ids: list[int] = []
        for row in rows:
            if row.received_at >= before:
                break
            ids.append(row.id)
        return ids


def faults(connection: Connection) -> list[str]:
    """What must never be so in a ledger, in words; nothing where all is well."""
    d = deliveries.c
    lives = select(processes.c.id).where(processes.c.id == lanes.c.holder).exists()
    waits = select(d.id).where(d.lane_id == lanes.c.id, d.state == State.WAITING.value).exists()
    current = select(d.id).where(d.id == lanes.c.current_delivery_id).exists()
    idle = lanes.c.holder.is_(None) & lanes.c.next_at.is_(None) & lanes.c.current_delivery_id.is_(None)
    asked = {
        "lanes with work that nobody will ever take": select(func.count()).select_from(lanes).where(idle, waits),
        "lanes held by a process that is not there": select(func.count())
        .select_from(lanes)
        .where(lanes.c.holder.is_not(None), ~lives),
        "lanes whose delivery is not there": select(func.count())
        .select_from(lanes)
        .where(lanes.c.current_delivery_id.is_not(None), ~current),
        "lanes that settled more than was claimed": select(func.count())
        .select_from(lanes)
        .where(lanes.c.settled > lanes.c.claim),
        "deliveries that ended without a reason": select(func.count())
        .select_from(deliveries)
        .where(d.state != State.WAITING.value, d.reason.is_(None)),
        "queues of no known state": select(func.count())
        .select_from(queues)
        .where(queues.c.paused_until.is_not(None), queues.c.paused_by.is_(None)),
    }
    found = {words: connection.execute(statement).scalar_one() for words, statement in asked.items()}
    told = [f"{count} {words}" for words, count in found.items() if count]
    if connection.dialect.name == "sqlite":
        told += [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(10)") if row[0] != "ok"]
    return told


def figures(connection: Connection) -> dict[str, int]:
    """How much there is of what: rows, and bytes on the disk."""
    tables = (notifications, deliveries, attempts, lanes, queues)
    counts = {table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables}
    bodies = connection.execute(select(func.count()).where(notifications.c.body.is_not(None))).scalar_one()
    if connection.dialect.name == "sqlite":
        pages, size = (
            connection.exec_driver_sql(f"PRAGMA {each}").scalar_one() for each in ("page_count", "page_size")
        )
        total = pages * size
    else:
        total = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    return counts | {"bodies": bodies, "bytes": total}


def back_up(connection: Connection, target: Path) -> int:
    """
    Copies a SQLite ledger, as it is at one moment and beside a running service, into a new file; its size in bytes.

    Raises `FileExistsError`, and `StoreUnavailable` where the copy cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    raw = connection.connection.driver_connection
    assert raw is not None
    try:
        raw.execute("VACUUM INTO ?", (str(partial),))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise StoreUnavailable(f"cannot write {target}: {error}") from error
    partial.rename(target)
    return target.stat().st_size
