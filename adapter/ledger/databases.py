"""The two databases behind the ledger, and everything in which they differ.

A SQLite file belongs to one process, which holds a lock on the file itself. A PostgreSQL database is shared by any
number of nodes: rows are locked in one order everywhere, and a transaction that still meets a deadlock is retried.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import structlog
from sqlalchemy import (
    ARRAY,
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

log = structlog.get_logger(__name__)

OLDEST_SQLITE = (3, 35, 0)  # RETURNING
SQLITE_ROWS_PER_STATEMENT = 64
PATIENCE_MS = 10_000
CHANNEL = "norce_adapter"
PRESENCE_LOCK = "hashtext('norce_adapter.lives')"

IN_ARRAY = {"postgresql": "= ANY({})", "sqlite": "IN (SELECT value FROM json_each({}))"}  # SQL after a column

InsertRows = Callable[[Any, Sequence[tuple[Any, ...]]], list[tuple[Any, ...]]]
UpdateRows = Callable[[Any, Sequence[Mapping[str, Any]]], None]


class Numbers(TypeDecorator[Any]):
    """Any number of integers as one parameter."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(ARRAY(BigInteger()) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


class _AnyOf(FunctionElement[Any]):  # without a type: SQLite would compare a boolean with "= 1" and use no index
    inherit_cache = True


@compiles(_AnyOf)
def _compile_any_of(element: _AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    column, numbers = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} {IN_ARRAY[compiler.dialect.name].format(numbers)}"


def any_of(column: ColumnElement[int], name: str = "ids") -> ColumnElement[bool]:
    """Return the condition that `column` equals one of the numbers in the parameter `name`.

    Unlike `IN (…)`, the statement is the same for any number of values, so it is compiled and planned once.
    """
    return _AnyOf(column, bindparam(name, type_=Numbers()))


def make_private_folder(path: Path) -> None:
    """Make a folder and its missing parents, for their owner only."""
    if not path.exists():
        make_private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


class StoreUnavailable(Exception):
    """The database cannot be written now, and nothing was stored.

    The disk may be full, the volume read-only or the connection lost. No restart is needed: every later write tries
    again.
    """


class StoreInUse(Exception):
    """Another `serve` uses this database. Stop it first, or let it run the command."""


class StoreMissing(Exception):
    """There is no database at this address yet: `serve` creates it."""


class Database(ABC):
    """A database by its address. `location` names it for people and contains no password.

    The methods that are not abstract suit a database which one process has to itself.
    """

    shared: ClassVar[bool]
    errors: tuple[type[Exception], ...] = (DBAPIError, sqlite3.Error)  # raised by the database or its driver

    def __init__(self, url: URL) -> None:
        self.url = url
        self.location = url.render_as_string(hide_password=True)

    def lock(self) -> None:
        """Reserve the database for this process.

        Raises:
            StoreInUse: Another process has it.
            StoreUnavailable: It cannot be opened.
        """
        return

    def unlock(self) -> None:
        """Release the database for other processes. No connection may be open any more."""
        return

    def check_place(self) -> None:
        """Raise `StoreUnavailable` if the reserved database is no longer at its address."""
        return

    @abstractmethod
    def engine(self, *, read_only: bool) -> Engine:
        """Return an engine that opens a connection per use."""

    def check_exists(self) -> None:
        """Raise `StoreMissing` if there is no database file."""
        return

    def lock_for_migration(self, connection: Connection) -> None:
        """Let one process migrate at a time, until the transaction ends."""
        return

    def is_sole_process(self, connection: Connection) -> bool:
        """Return whether no other process uses the database, until the transaction ends."""
        return True

    def hold_presence_lock(self, connection: Connection) -> None:
        """Show other processes that this one uses the database, as long as the connection lasts."""
        return

    @abstractmethod
    def wall_clock(self, connection: Connection) -> int:
        """Return the wall clock of the database's machine, in milliseconds since 1970."""

    @abstractmethod
    def is_outage(self, error: Exception) -> bool:
        """Return whether the database failed, rather than the data of one row."""

    def is_conflict(self, error: Exception) -> bool:
        """Return whether two transactions collided, so that the same work can simply be repeated."""
        return False

    @abstractmethod
    def inserter(self, table: Table, columns: Sequence[str], ending: str = "") -> InsertRows:
        """Return a function that inserts rows in their order with few statements.

        It takes a cursor of the driver and tuples, and returns the rows that `ending` returns. SQLAlchemy's
        `insertmanyvalues` reached 0.80 of this rate of accepted notifications on SQLite and 0.53 on PostgreSQL.

        Args:
            table: The table to insert into.
            columns: The columns, in the order of the values.
            ending: SQL after the values: `ON CONFLICT …`, `RETURNING …`.
        """

    @abstractmethod
    def updater(self, table: Table, columns: Mapping[str, Column[Any]], assignments: str) -> UpdateRows:
        """Return a function that updates many rows, each with its own values.

        It takes a cursor of the driver and a mapping per row. SQLAlchemy's `executemany` reached 0.85 of this rate of
        deliveries on SQLite and 0.58 on PostgreSQL.

        Args:
            table: The table to update.
            columns: The column that each name takes its type from. The first name is the key of the row.
            assignments: SQL after `SET`, with `{name}` for a value.
        """

    def notify(self, connection: Connection) -> None:
        """Wake the dispatchers of all nodes once this transaction is committed."""
        return

    def listen(self, on_work: Callable[[], None]) -> Callable[[], None]:
        """Call `on_work` from a thread whenever a node notifies.

        Returns a function that ends this.
        """
        return lambda: None


def database_at(url: str) -> Database:
    """Return the database at a `sqlite:///` or `postgresql+psycopg://` address."""
    parsed = make_url(url)
    return Postgres(parsed) if parsed.get_backend_name() == "postgresql" else Sqlite(parsed)


class Sqlite(Database):
    """A SQLite file, in WAL mode.

    `synchronous` is FULL, because NORMAL may lose the last commits at a power cut.
    """

    shared = False

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.path = Path(url.database or "")
        self.location = str(self.path)
        self._lock: int | None = None

    def lock(self) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise StoreUnavailable(f"SQLite {sqlite3.sqlite_version} is too old: {oldest} or newer is needed")
        try:
            make_private_folder(self.path.parent)
            # Open until every connection is closed: to close any descriptor of a file drops the locks that SQLite has
            # on it. The file itself is locked, so that no link to it leads around the lock.
            lock = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"cannot open {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StoreInUse(f"another process serves {self.path}; stop it first") from error
        self._lock = lock
        real = self.path.resolve()
        journal = Path(f"{real}-wal")
        if (fault := self._fault(os.fstat(lock), journal)) is not None:
            self.unlock()
            raise StoreUnavailable(f"{self.path} {fault}")
        for file in (real, journal, Path(f"{real}-shm")):
            with contextlib.suppress(OSError):  # missing, or of another user who lets us write it
                file.chmod(0o600)

    def _fault(self, file: os.stat_result, journal: Path) -> str | None:
        """Return the reason why this file cannot be a ledger."""
        if not stat.S_ISREG(file.st_mode):
            return "is no regular file"
        if file.st_nlink > 1:  # SQLite names its journal after the path, so each link would have a journal of its own
            return f"has {file.st_nlink} hard links; remove the others, or copy the file"
        # SQLite deletes a journal beside an empty file, and with it the last commits of the file that was moved away.
        if file.st_size == 0 and journal.exists() and journal.stat().st_size > 0:
            return f"is missing or empty beside its journal {journal.name}; put it back, or delete the journal"
        return None

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_place(self) -> None:
        if self._lock is None:
            return
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._lock)):
                raise FileNotFoundError
        except OSError as error:
            raise StoreUnavailable(f"{self.path} was moved or deleted; put it back") from error

    def engine(self, *, read_only: bool) -> Engine:
        engine = create_engine("sqlite://", creator=lambda: self.connect(read_only=read_only), poolclass=NullPool)

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # Through the driver: SQLAlchemy needs five times as long, at each commit.
            connection.connection.cursor().execute("BEGIN" if read_only else "BEGIN IMMEDIATE")

        return engine

    def connect(self, *, read_only: bool) -> sqlite3.Connection:
        """Return a connection of the driver."""
        mode = "ro" if read_only else "rw"  # `lock` makes the file
        connection = sqlite3.connect(
            f"file:{quote(str(self.path.absolute()))}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=5,
        )
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            if not read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA cache_size = -8192")
        except sqlite3.Error:  # for example: the file is no database
            connection.close()
            raise
        return connection

    def check_exists(self) -> None:
        if not self.path.exists():
            raise StoreMissing(f"there is no database at {self.path} yet")

    def wall_clock(self, connection: Connection) -> int:
        return time.time_ns() // 1_000_000

    def is_outage(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        return type(original).__name__ in ("OperationalError", "InternalError", "InterfaceError", "DatabaseError")

    def inserter(self, table: Table, columns: Sequence[str], ending: str = "") -> InsertRows:
        into = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES"
        values = f"({', '.join('?' for _ in columns)})"

        def insert(cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
            returned: list[tuple[Any, ...]] = []
            for start in range(0, len(rows), SQLITE_ROWS_PER_STATEMENT):
                chunk = rows[start : start + SQLITE_ROWS_PER_STATEMENT]
                sql = f"{into} {', '.join([values] * len(chunk))} {ending}"
                cursor.execute(sql, [value for row in chunk for value in row])
                returned += cursor.fetchall()
            return returned

        return insert

    def updater(self, table: Table, columns: Mapping[str, Column[Any]], assignments: str) -> UpdateRows:
        values = assignments.format(**{name: f":{name}" for name in columns})
        sql = f"UPDATE {table.name} SET {values} WHERE id = :{next(iter(columns))}"  # noqa: S608 - our own names
        return lambda cursor, rows: cursor.executemany(sql, rows)


class Postgres(Database):
    """A PostgreSQL database that any number of nodes share. `synchronous_commit` is on.

    Args:
        url: Its address.
        patience_ms: The longest time that a statement may take, or that a node may pause inside a transaction. A lock
            is waited for half as long.
    """

    shared = True

    def __init__(self, url: URL, *, patience_ms: int = PATIENCE_MS) -> None:
        super().__init__(url)
        import psycopg  # imported only here: it needs 10 MB of memory

        self.errors = (DBAPIError, psycopg.Error)
        self._psycopg = psycopg
        self._patience_ms = patience_ms

    def lock(self) -> None:
        """Check that this database can be a ledger. Any number of processes may use it.

        A pooler in transaction mode gives each transaction any server connection. The ledger needs its own: settings,
        the presence lock and LISTEN belong to a connection. So another transaction takes the server connection that a
        pooler would have got back.
        """
        try:
            with self._connect() as one, self._connect() as other:
                encoding = one.info.parameter_status("server_encoding")
                if encoding != "UTF8":
                    raise StoreUnavailable(f"{self.location} is encoded as {encoding}; create it with ENCODING 'UTF8'")
                servers = {one.execute("SELECT pg_backend_pid()").fetchone()}
                for _ in range(3):  # a pooler may give the same connection twice by chance
                    with other.transaction():
                        other.execute("SELECT 1")
                        servers.add(one.execute("SELECT pg_backend_pid()").fetchone())
        except self._psycopg.Error as error:
            raise StoreUnavailable(f"cannot open {self.location}: {error}") from error
        if len(servers) > 1:
            raise StoreUnavailable(
                f"{self.location} is behind a pooler in transaction mode; use session mode, or connect to PostgreSQL"
            )

    def _connect(self) -> Any:
        _, given = create_engine(self.url).dialect.create_connect_args(self.url)
        return self._psycopg.connect(**{**given, **self._connect_arguments()}, autocommit=True)

    def engine(self, *, read_only: bool) -> Engine:
        engine = create_engine(self.url, poolclass=NullPool, connect_args=self._connect_arguments())
        settings = {
            "default_transaction_isolation": "read committed",
            "statement_timeout": self._patience_ms,
            "lock_timeout": self._patience_ms // 2,
            # A node that is stopped or lost in the middle of a transaction must not hold up the others.
            "idle_in_transaction_session_timeout": self._patience_ms,
            "tcp_keepalives_idle": 5,
            "tcp_keepalives_interval": 2,
            "tcp_keepalives_count": 3,
        }
        if read_only:
            settings["default_transaction_read_only"] = "on"
        statements = [f"SET {name} = '{value}'" for name, value in settings.items()]
        statements.append(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.autocommit = True
            connection.execute("; ".join(statements))
            connection.autocommit = False

        return engine

    def lock_for_migration(self, connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('norce_adapter.migration'))")
        # A statement that waits to alter a table blocks all later ones. Rather fail to start than stop other nodes.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {self._patience_ms // 4}")

    def is_sole_process(self, connection: Connection) -> bool:
        return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({PRESENCE_LOCK})").scalar_one())

    def hold_presence_lock(self, connection: Connection) -> None:
        with connection.begin():
            connection.exec_driver_sql(f"SELECT pg_advisory_lock_shared({PRESENCE_LOCK})")

    def wall_clock(self, connection: Connection) -> int:
        sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
        return int(connection.exec_driver_sql(sql).scalar_one())

    def is_outage(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        errors = self._psycopg.errors
        if isinstance(original, errors.DataError | errors.IntegrityError | errors.ProgramLimitExceeded):
            return False
        # Without an sqlstate, the driver could not encode a value: that is the fault of the data.
        return not (isinstance(original, errors.ProgrammingError) and original.sqlstate is None)

    def is_conflict(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        errors = self._psycopg.errors
        # ForeignKeyViolation: another node pruned the parent row meanwhile; the next try does not find it.
        conflicts = errors.DeadlockDetected | errors.SerializationFailure | errors.ForeignKeyViolation
        return isinstance(original, conflicts)

    def inserter(self, table: Table, columns: Sequence[str], ending: str = "") -> InsertRows:
        # One array per column, so that the statement is the same for any number of rows and is prepared once.
        arrays = _unnest(table.c[name] for name in columns)
        sql = f"INSERT INTO {table.name} ({', '.join(columns)}) SELECT * FROM {arrays} {ending}"  # noqa: S608 - ours

        def insert(cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
            if not rows:
                return []
            cursor.execute(sql, [list(column) for column in zip(*rows, strict=True)])
            return cursor.fetchall() if cursor.description else []

        return insert

    def updater(self, table: Table, columns: Mapping[str, Column[Any]], assignments: str) -> UpdateRows:
        values = assignments.format(**{name: f"changes.{name}" for name in columns})
        sql = (
            f"UPDATE {table.name} SET {values}"  # noqa: S608 - our own names
            f" FROM {_unnest(columns.values())} AS changes ({', '.join(columns)})"
            f" WHERE {table.name}.id = changes.{next(iter(columns))}"
        )
        return lambda cursor, rows: cursor.execute(sql, [[row[name] for row in rows] for name in columns])

    def notify(self, connection: Connection) -> None:
        connection.connection.cursor().execute(f"NOTIFY {CHANNEL}")

    def listen(self, on_work: Callable[[], None]) -> Callable[[], None]:
        ended = threading.Event()
        engine = self.engine(read_only=True)

        def listen_until_ended() -> None:
            while not ended.is_set():
                with contextlib.suppress(*self.errors):  # the dispatcher polls meanwhile
                    pooled = engine.raw_connection()
                    own = pooled.driver_connection
                    assert isinstance(own, self._psycopg.Connection)
                    pooled.detach()
                    with own as connection:
                        connection.autocommit = True
                        connection.execute(f"LISTEN {CHANNEL}")
                        on_work()  # for notifications that were sent before LISTEN
                        while not ended.is_set():
                            for _ in connection.notifies(timeout=0.5):
                                on_work()
                ended.wait(1.0)

        thread = threading.Thread(target=listen_until_ended, name="ledger-listener", daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join(timeout=5)

        return end

    def _connect_arguments(self) -> dict[str, Any]:
        # A peer that disappears without closing the connection is noticed within seconds.
        return {
            "connect_timeout": 5,
            "application_name": "norce-adapter",
            "client_encoding": "utf8",  # whatever PGCLIENTENCODING or the role says
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": self._patience_ms,
        }


def _unnest(columns: Iterable[Column[Any]]) -> str:
    from sqlalchemy.dialects import postgresql  # imported only where it is used, like the driver

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    arrays = (f"%b::{column.type.compile(dialect).partition(' ')[0]}[]" for column in columns)
    return f"unnest({', '.join(arrays)})"
