"""
The database underneath: one connection that writes, in groups, and the ledger's one clock.

`write` returns when the work is on disk. Everything that arrives while one transaction is being committed becomes the
next one: no added wait, one fsync for all of them. What a reader would get wrong: the writer works in a thread of its
own and must not be woken at every arrival (batches of three), so work is gathered and handed over once a loop turn,
and only while the writer is idle.
"""

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

log = structlog.get_logger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Work = Callable[[Connection, Sequence[Any]], Sequence[Any]]


class StoreUnavailable(Exception):
    """
    The database cannot be written now: full disk, read-only volume, lost connection. Nothing of this call was stored.

    It heals by itself: the next write tries anew.
    """


class StoreBusy(StoreUnavailable):
    """More is waiting to be written than the service holds in memory. Nothing of this call was stored."""


class StoreInUse(Exception):
    """Another `serve` has this database. Stop it first, or send it the command through its operations port."""


class StoreMissing(Exception):
    """There is no database at this address yet: `serve` makes it."""


class Clock:
    """Milliseconds since 1970: the wall clock at start plus monotonic time, never below the last recorded moment."""

    def __init__(self, last_recorded: int = 0) -> None:
        self._start = max(time.time_ns() // 1_000_000, last_recorded)
        self._monotonic = time.monotonic_ns()

    def __call__(self) -> int:
        return self._start + (time.monotonic_ns() - self._monotonic) // 1_000_000


class Store:
    """
    An open ledger database. Use from one event loop; `close` when done.

    `capacity` is how many pieces of work may wait for the writer.
    """

    def __init__(
        self,
        engine: Engine,
        reader: Engine,
        *,
        lock: int | None,
        clock: Callable[[], int],
        capacity: int = 4000,
    ) -> None:
        self.engine = engine
        self._reader = reader
        self.clock = clock
        self.capacity = capacity
        self.failing = False  # whether the last transaction failed on the database
        self._lock = lock
        self._gathered: list[tuple[Work, Any, asyncio.Future[Any]]] = []
        self._writer_is_idle = True
        self._handing_over = False
        self._batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, url: str, *, clock: Callable[[int], Callable[[], int]] = Clock) -> "Store":
        """
        Takes the database for this process and brings its tables up to date.

        Raises `StoreInUse` where another process has it and `StoreUnavailable` where it cannot be opened.
        """
        path = sqlite_path(url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StoreInUse(f"another process serves {path}; stop it first") from error
        try:
            engine = _engine(url, read_only=False)
            with engine.connect() as connection:
                migrate(connection)
                last = connection.execute(
                    text(
                        "SELECT max(moment) FROM (SELECT max(received_at) AS moment FROM (SELECT received_at FROM"
                        " notifications ORDER BY id DESC LIMIT 100) UNION ALL SELECT max(ended_at) FROM (SELECT"
                        " ended_at FROM attempts ORDER BY id DESC LIMIT 100))"
                    )
                ).scalar()
                connection.rollback()
        except (DBAPIError, OSError, CommandError) as error:
            os.close(lock)
            raise StoreUnavailable(f"cannot open {path}: {_cause(error)}") from error
        return cls(engine, _engine(url, read_only=True), lock=lock, clock=clock(last or 0))

    async def write(self, work: Callable[[Connection, Sequence[Item]], Sequence[Answer]], item: Item) -> Answer:
        """
        Has `work` done with `item` in a transaction, and returns its answer once that is on disk.

        `work` gets all items that go into one transaction with it, and answers each. Raises `StoreUnavailable`, or what
        `work` raises for this item alone: the others of its group are then done one by one.
        """
        if len(self._gathered) >= self.capacity:
            raise StoreBusy("too much is waiting for the disk")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Answer] = loop.create_future()
        self._gathered.append((work, item, done))
        if self._writer_is_idle and not self._handing_over:
            self._handing_over = True
            loop.call_soon(self._hand_over, loop)
        return await done

    def read_connection(self) -> Connection:
        """A connection that only reads, beside the writer and without waiting for it."""
        return self._reader.connect()

    def close(self) -> None:
        """Lets the writer finish what it has, and gives the database back."""
        self._batches.put(None)
        self._thread.join(timeout=10)
        self.engine.dispose()
        self._reader.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handing_over = False
        if self._gathered:
            self._writer_is_idle = False
            batch, self._gathered = self._gathered, []
            self._batches.put((loop, batch))

    def _finished(self, loop: asyncio.AbstractEventLoop, outcomes: list[tuple[asyncio.Future[Any], Any, bool]]) -> None:
        for future, value, failed in outcomes:
            if not future.done():  # a caller that was cancelled no longer waits
                if failed:
                    future.set_exception(value)
                else:
                    future.set_result(value)
        self._writer_is_idle = True
        self._hand_over(loop)

    # --- in the writer's thread ---

    def _run(self) -> None:
        while (handed := self._batches.get()) is not None:
            loop, batch = handed
            outcomes = self._write(batch)
            try:
                loop.call_soon_threadsafe(self._finished, loop, outcomes)
            except RuntimeError:  # the loop is closed; what was written stays written
                break
        if self._connection is not None:
            self._connection.close()

    def _write(self, batch: list[tuple[Work, Any, asyncio.Future[Any]]]) -> list[tuple[asyncio.Future[Any], Any, bool]]:
        try:
            answers = self._transaction(batch)
        except StoreUnavailable as error:
            if not self.failing:
                log.error("store_unavailable", error=str(error))
            self.failing = True
            return [(future, error, True) for _, _, future in batch]
        except Exception as error:  # noqa: BLE001 - it is the data of one piece of work; that one gets the error, below
            if len(batch) == 1:
                return [(batch[0][2], error, True)]
            return [outcome for piece in batch for outcome in self._write([piece])]
        if self.failing:
            log.info("store_recovered")
        self.failing = False
        return [(future, answer, False) for (_, _, future), answer in zip(batch, answers, strict=True)]

    def _transaction(self, batch: list[tuple[Work, Any, asyncio.Future[Any]]]) -> list[Any]:
        by_work: dict[Work, list[int]] = {}
        for index, (work, _, _) in enumerate(batch):
            by_work.setdefault(work, []).append(index)
        answers: list[Any] = [None] * len(batch)
        try:
            if self._connection is None:
                self._connection = self.engine.connect()
            connection = self._connection
            with connection.begin():
                for work, indices in by_work.items():
                    for index, answer in zip(indices, work(connection, [batch[i][1] for i in indices]), strict=True):
                        answers[index] = answer
        except (DBAPIError, sqlite3.Error) as error:
            if not _is_the_database(error):
                raise
            self._drop_connection()
            raise StoreUnavailable(_cause(error)) from error
        return answers

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except Exception:  # noqa: BLE001 - a broken connection may fail in any way while it is thrown away
                log.debug("store_connection_dropped")


def open_for_reading(url: str) -> Engine:
    """An engine that only reads, beside a running service. Raises `StoreMissing`, `StoreUnavailable`."""
    path = sqlite_path(url)
    if not path.exists():
        raise StoreMissing(f"there is no database at {path} yet")
    return _engine(url, read_only=True)


def sqlite_path(url: str) -> Path:
    """The file of a `sqlite:///` address."""
    return Path(make_url(url).database or "")


def migrate(connection: Connection) -> None:
    """Brings the tables up to date, in one transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    connection.commit()


def _engine(url: str, *, read_only: bool) -> Engine:
    path = sqlite_path(url)

    def connect() -> sqlite3.Connection:
        mode = "ro" if read_only else "rwc"
        connection = sqlite3.connect(
            f"file:{path.absolute().as_posix().replace('?', '%3f').replace('#', '%23')}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=5,
        )
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            if not read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits at a power cut
                connection.execute("PRAGMA cache_size = -65536")
        except sqlite3.Error:  # not a database, say
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _is_the_database(error: Exception) -> bool:
    """Whether it is the database that fails, not the data of one row."""
    original = getattr(error, "orig", error)
    return type(original).__name__ in ("OperationalError", "InternalError", "InterfaceError", "DatabaseError")


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)
