"""The open ledger: one connection that writes in groups, and the clock of the ledger.

`write` returns when the work is on disk. All work that arrives during a commit goes into the next transaction: it adds
no delay, and one fsync serves it all. The writer has a thread of its own. Waking it at every arrival would make batches
of three, so work is gathered and handed over once per turn of the event loop, and only while the writer is idle.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import structlog
from sqlalchemy import Connection, Engine

from adapter.ledger.clock import Clock
from adapter.ledger.databases import Database, StoreInUse, StoreMissing, StoreUnavailable, database_at

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["Store", "StoreBusy", "StoreInUse", "StoreMissing", "StoreUnavailable", "open_for_reading"]

log = structlog.get_logger(__name__)

Item = TypeVar("Item")
P = ParamSpec("P")
Answer = TypeVar("Answer")
Work = Callable[[Connection, Sequence[Any]], Sequence[Any]]
Finished = tuple["asyncio.Future[Any]", Any, bool]  # the waiting caller, the answer or error, whether it is an error

MAX_WAITING = 4_000
MAX_BYTES_WAITING = 64 * 1024 * 1024
TRIES = 5  # of a transaction that collided with another


class StoreBusy(StoreUnavailable):
    """Too much work waits for the writer. Nothing of this call was stored."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Work that waits for the writer, and the future of its caller."""

    work: Work
    item: Any
    size: int
    done: "asyncio.Future[Any]"


class Store:
    """An open ledger, for one event loop.

    Args:
        database: A database with up-to-date tables.
        clock: The ledger's clock, which has been read.
        capacity: The number of pieces of work that may wait for the writer.
        capacity_bytes: The size of the work that may wait.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        capacity: int = MAX_WAITING,
        capacity_bytes: int = MAX_BYTES_WAITING,
    ) -> None:
        self.database = database
        self.shared = database.shared  # other processes write as well
        self.engine = database.engine(read_only=False)
        self._reader = database.engine(read_only=True)
        self.clock = clock
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.failing = False  # whether the last transaction failed because of the database
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
        """Lock the database for this process and bring its tables up to date.

        Raises:
            StoreInUse: Another process has it.
            StoreUnavailable: It cannot be opened.
        """
        from alembic.util import CommandError  # imported here, because commands that only read need no migration

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
        """Run `work` with `item` in a transaction, and return its answer once that is on disk.

        Args:
            work: Gets all items of a transaction and returns an answer for each. It is called again with the same items
                if the transaction must be repeated. If it raises, its items are written one by one, and only the caller
                of the faulty item gets the error.
            item: The argument of this caller.
            size: The memory that the item holds, in bytes.

        Raises:
            StoreUnavailable: Nothing was stored.
        """
        if len(self._gathered) >= self.capacity or self._bytes + size > self.capacity_bytes:
            raise StoreBusy("too much work waits for the disk")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Answer] = loop.create_future()
        self._gathered.append(_Piece(work, item, size, done))
        self._bytes += size
        if self._writer_is_idle and not self._handing_over:
            self._handing_over = True
            loop.call_soon(self._hand_over, loop)
        return await done

    async def run(
        self, work: Callable[Concatenate[Connection, P], Answer], *arguments: P.args, **named: P.kwargs
    ) -> Answer:
        """Run `work` with these arguments like `write`, without a batch."""
        return await self.write(lambda connection, items: [work(connection, *arguments, **named) for _ in items], None)

    def read_connection(self) -> Connection:
        """Return a connection that only reads and never waits for the writer."""
        return self._reader.connect()

    def listen(self, on_work: Callable[[], None]) -> Callable[[], None]:
        """Call `on_work` on the running event loop whenever a node notifies.

        Returns a function that ends this.
        """
        loop = asyncio.get_running_loop()

        def call() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_work)

        return self.database.listen(call)

    def close(self) -> None:
        """Let the writer finish its work, and unlock the database."""
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

    def _finished(self, loop: asyncio.AbstractEventLoop, batch: list[_Piece], finished: list[Finished]) -> None:
        self._bytes -= sum(piece.size for piece in batch)
        for future, value, failed in finished:
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
            finished = [each for group in self._transactions(batch) for each in self._write(group)]
            try:
                loop.call_soon_threadsafe(self._finished, loop, batch, finished)
            except RuntimeError:  # the loop is closed; the work stays on disk
                break
        self._drop_connection()

    def _transactions(self, batch: list[_Piece]) -> list[list[_Piece]]:
        # In a file of our own, one transaction with one fsync takes everything. In a shared database, each kind of work
        # gets its own: a kind locks its rows in the common order, but two kinds after each other would not.
        if not self.shared:
            return [batch]
        return list(_by_work(batch).values())

    def _write(self, batch: list[_Piece]) -> list[Finished]:
        try:
            answers = self._transaction(batch)
        except StoreUnavailable as error:
            if not self.failing:
                log.error("store_unavailable", code=_code(error.__cause__))
            self.failing = True
            return [(piece.done, error, True) for piece in batch]
        except Exception as error:  # noqa: BLE001 - the data of one piece is faulty; only its caller gets the error
            if len(batch) == 1:
                return [(batch[0].done, error, True)]
            return [finished for piece in batch for finished in self._write([piece])]
        if self.failing:
            log.info("store_recovered")
        self.failing = False
        return [(piece.done, answers[id(piece)], False) for piece in batch]

    def _transaction(self, batch: list[_Piece]) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        for left in reversed(range(TRIES)):
            is_kept, is_committing = self._connection is not None, False
            try:
                self.database.check_place()
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
                if was_lost and left:  # the connection broke before its use; nothing of this is on disk
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
            with contextlib.suppress(Exception):  # closing a broken connection may fail in any way
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()


def open_for_reading(url: str) -> Engine:
    """Return an engine that only reads, beside a running service. Raises `StoreMissing`."""
    database = database_at(url)
    database.check_exists()
    return database.engine(read_only=True)


def migrate(database: Database, connection: Connection) -> None:
    """Bring the tables up to date, in one transaction, while other processes wait.

    Migrations only add, so an older node keeps working beside a newer one. A node that finds a revision newer than its
    own leaves the tables as they are and works with them.
    """
    from alembic import command
    from alembic.migration import MigrationContext

    config = alembic_config()
    known = known_revisions()
    config.attributes["connection"] = connection
    with connection.begin():
        database.lock_for_migration(connection)
        revision = MigrationContext.configure(connection).get_current_revision()
        if revision is not None and revision not in known:
            log.warning("store_is_newer", revision=revision)
        elif revision != known[0]:
            command.upgrade(config, "head")


@cache
def known_revisions() -> list[str]:
    """Return the revisions of the tables that this version knows, the newest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


def alembic_config() -> "Config":
    """Return the settings for Alembic."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def _by_work(batch: Sequence[_Piece]) -> dict[Work, list[_Piece]]:
    by_work: dict[Work, list[_Piece]] = {}
    for piece in batch:
        by_work.setdefault(piece.work, []).append(piece)
    return by_work


def _code(error: BaseException | None) -> str | None:
    # The database's code, such as SQLITE_FULL or 57P01, because its message may contain data.
    original = getattr(error, "orig", error)
    return getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or type(original).__name__


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)
