"""
The open ledger: one connection that writes, in groups, and the clock that everything in it goes by.

`write` returns when the work is on disk. Everything that arrives while one transaction is being committed becomes the
next one: no added wait, one fsync for all of them. What a reader would get wrong: the writer works in a thread of its
own and must not be woken at every arrival (batches of three), so work is gathered and handed over once a loop turn,
and only while the writer is idle.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, Engine

from adapter.ledger.clock import Clock
from adapter.ledger.databases import Database, StoreInUse, StoreMissing, StoreUnavailable, database_at

__all__ = ["Store", "StoreBusy", "StoreInUse", "StoreMissing", "StoreUnavailable", "open_for_reading"]

log = structlog.get_logger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Work = Callable[[Connection, Sequence[Any]], Sequence[Any]]
Outcome = tuple["asyncio.Future[Any]", Any, bool]  # who waits, the answer or the error, whether it is an error

MOST_WAITING = 4_000
MOST_BYTES_WAITING = 64 * 1024 * 1024
TRIES = 5  # of a transaction that met another one


class StoreBusy(StoreUnavailable):
    """More is waiting to be written than the service holds in memory. Nothing of this call was stored."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Work that waits for the writer."""

    work: Work
    item: Any
    size: int
    done: "asyncio.Future[Any]"


class Store:
    """
    An open ledger. Use from one event loop; `close` when done.

    `capacity` is how many pieces of work may wait for the writer, `capacity_bytes` what they may hold. `failing` says
    whether the last transaction failed on the database; `shared`, whether other processes write as well.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        capacity: int = MOST_WAITING,
        capacity_bytes: int = MOST_BYTES_WAITING,
    ) -> None:
        self.database = database
        self.shared = database.shared
        self.engine = database.engine(read_only=False)
        self._reader = database.engine(read_only=True)
        self.clock = clock
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.failing = False
        self._gathered: list[_Piece] = []
        self._bytes = 0
        self._writer_is_idle = True
        self._handing_over = False
        self._batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, url: str, *, clock: Clock | None = None) -> "Store":
        """
        Takes the database for this process and brings its tables up to date.

        Raises `StoreInUse` where another process has it and `StoreUnavailable` where it cannot be opened.
        """
        from alembic.util import CommandError  # here, because commands that only read need none of it

        database = database_at(url)
        clock = clock or Clock.of(database)
        failures: tuple[type[Exception], ...] = (*database.errors, OSError, CommandError)
        database.lock()
        try:
            engine = database.engine(read_only=False)
            with engine.connect() as connection:
                migrate(database, connection)
                with connection.begin():
                    clock.read(connection, alone=database.is_sole_process(connection))
        except failures as error:
            database.unlock()
            raise StoreUnavailable(f"cannot open {database.location}: {_cause(error)}") from error
        return cls(database, clock=clock)

    async def write(
        self, work: Callable[[Connection, Sequence[Item]], Sequence[Answer]], item: Item, size: int = 0
    ) -> Answer:
        """
        Has `work` done with `item` in a transaction, and returns its answer once that is on disk.

        `work` gets all items that go into one transaction with it, and answers each; it may be called again for the
        same items where a transaction has to be repeated. `size` is what the item holds in memory, in bytes. Raises
        `StoreUnavailable`, or what `work` raises for this item alone: the others of its group are then done one by one.
        """
        if len(self._gathered) >= self.capacity or self._bytes + size > self.capacity_bytes:
            raise StoreBusy("too much is waiting for the disk")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Answer] = loop.create_future()
        self._gathered.append(_Piece(work, item, size, done))
        self._bytes += size
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
        self.database.unlock()

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handing_over = False
        if self._gathered:
            self._writer_is_idle = False
            batch, self._gathered = self._gathered, []
            self._batches.put((loop, batch))

    def _finished(self, loop: asyncio.AbstractEventLoop, batch: list[_Piece], outcomes: list[Outcome]) -> None:
        self._bytes -= sum(piece.size for piece in batch)
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
            outcomes = [outcome for group in self._transactions(batch) for outcome in self._write(group)]
            try:
                loop.call_soon_threadsafe(self._finished, loop, batch, outcomes)
            except RuntimeError:  # the loop is closed; what was written stays written
                break
        self._drop_connection()

    def _transactions(self, batch: list[_Piece]) -> list[list[_Piece]]:
        """
        What goes into one transaction: everything, in a file of our own, for the sake of its one fsync. Where others
        write too, one kind of work at a time: each locks its rows in one order, two after each other would not.
        """
        if not self.shared:
            return [batch]
        return list(_by_work(batch).values())

    def _write(self, batch: list[_Piece]) -> list[Outcome]:
        try:
            answers = self._transaction(batch)
        except StoreUnavailable as error:
            if not self.failing:
                log.error("store_unavailable", code=_code(error.__cause__))
            self.failing = True
            return [(piece.done, error, True) for piece in batch]
        except Exception as error:  # noqa: BLE001 - it is the data of one piece of work; that one gets the error, below
            if len(batch) == 1:
                return [(batch[0].done, error, True)]
            return [outcome for piece in batch for outcome in self._write([piece])]
        if self.failing:
            log.info("store_recovered")
        self.failing = False
        return [(piece.done, answers[id(piece)], False) for piece in batch]

    def _transaction(self, batch: list[_Piece]) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        for left in reversed(range(TRIES)):
            is_kept, is_committing = self._connection is not None, False
            try:
                if self._connection is None:
                    self._connection = self.engine.connect()
                    self.database.hold_presence_lock(self._connection)
                with self._connection.begin():
                    for work, pieces in _by_work(batch).items():
                        done = work(self._connection, [piece.item for piece in pieces])
                        answers |= zip(map(id, pieces), done, strict=True)
                    is_committing = True
                break
            except self.database.errors as error:
                if self.database.is_conflict(error) and left:
                    continue
                if not self.database.is_outage(error):
                    raise
                was_lost = is_kept and not is_committing and self._is_lost()
                self._drop_connection()
                if was_lost and left:  # while nobody used it; nothing of this is on the disk
                    continue
                raise StoreUnavailable(_cause(error)) from error
        return answers

    def _is_lost(self) -> bool:
        connection = self._connection
        if connection is None or connection.invalidated:
            return True
        return bool(getattr(connection.connection.driver_connection, "closed", False))

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # a broken one may fail in any way while it is thrown away
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()


def open_for_reading(url: str) -> Engine:
    """An engine that only reads, beside a running service. Raises `StoreMissing`."""
    database = database_at(url)
    database.check_exists()
    return database.engine(read_only=True)


def migrate(database: Database, connection: Connection) -> None:
    """
    Brings the tables up to date, in one transaction, while others wait.

    Migrations only add, so that an older node keeps working; and an older node that finds a newer revision than it
    knows works with it as it is.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with connection.begin():
        database.lock_for_migration(connection)
        revision = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if revision is not None and revision not in known:
            log.warning("store_is_newer", revision=revision)
            return
        command.upgrade(config, "head")


def _by_work(batch: Sequence[_Piece]) -> dict[Work, list[_Piece]]:
    by_work: dict[Work, list[_Piece]] = {}
    for piece in batch:
        by_work.setdefault(piece.work, []).append(piece)
    return by_work


def _code(error: BaseException | None) -> str | None:
    """The database's own name for what is wrong, such as SQLITE_FULL or 57P01: its words may hold what was written."""
    original = getattr(error, "orig", error)
    return getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or type(original).__name__


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)
