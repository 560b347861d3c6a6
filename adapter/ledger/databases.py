"""
The two databases, and in what they differ: how one is taken, which errors are its own, which statements it takes many
rows with, whose clock counts, and who else hears of new work.

A SQLite file belongs to one process, which holds a lock beside it. A PostgreSQL is shared by any number of nodes: rows
are locked in one order everywhere, and what still ends in a deadlock is tried again.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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

ROWS_A_STATEMENT = 64


class Insert(ABC):
    """Puts many rows into a table with one statement. `ending` is what follows: ON CONFLICT …, RETURNING …"""

    def __init__(self, table: Table, columns: Sequence[str], ending: str = "") -> None:
        self._into = f"INSERT INTO {table.name} ({', '.join(columns)})"
        self._columns = [table.c[name] for name in columns]
        self._ending = ending

    @abstractmethod
    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Inserts them in this order, and answers what the ending returns; an empty list where it returns nothing."""


class Update(ABC):
    """
    Changes many rows of a table, each by values of its own. `sets` is what follows SET, with `{name}` for a value; `of`
    says by its name which column a value is of, first the key by which a row is found.
    """

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        self._table = table
        self._of = of
        self._sets = sets

    @abstractmethod
    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None: ...


class _Numbers(TypeDecorator[Any]):
    """Any number of numbers as one parameter."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(ARRAY(BigInteger()) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return list(value) if dialect.name == "postgresql" else json.dumps(list(value))


class _Among(FunctionElement[Any]):  # of no type: SQLite knows no booleans, and behind "… = 1" finds no index
    inherit_cache = True


@compiles(_Among)
def _among(element: _Among, compiler: SQLCompiler, **named: Any) -> str:
    column, numbers = (compiler.process(each, **named) for each in element.clauses)
    if compiler.dialect.name == "postgresql":
        return f"{column} = ANY({numbers})"
    return f"{column} IN (SELECT value FROM json_each({numbers}))"  # noqa: S608 - our own names


def among(column: ColumnElement[int], name: str = "ids") -> ColumnElement[bool]:
    """
    Whether a column is one of the numbers that the parameter `name` holds. Unlike `IN (…)` it is one statement for any
    number of them, which is neither written nor planned anew.
    """
    return _Among(column, bindparam(name, type_=_Numbers()))


class ValuesInsert(Insert):
    """`VALUES (…), (…)`: one step of the engine, and one hand-over of the interpreter, for so many rows."""

    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        returned: list[tuple[Any, ...]] = []
        one = f"({', '.join('?' for _ in self._columns)})"
        for start in range(0, len(rows), ROWS_A_STATEMENT):
            some = rows[start : start + ROWS_A_STATEMENT]
            sql = f"{self._into} VALUES {', '.join([one] * len(some))} {self._ending}"
            cursor.execute(sql, [value for row in some for value in row])
            if cursor.description:
                returned += cursor.fetchall()
        return returned


class EachUpdate(Update):
    """One after the other, which in the same process costs next to nothing."""

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        super().__init__(table, of, sets)
        values = {name: f":{name}" for name in of}
        self._sql = f"UPDATE {table.name} SET {sets.format(**values)} WHERE id = :{next(iter(of))}"  # noqa: S608 - ours

    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        cursor.executemany(self._sql, rows)


class ArraysInsert(Insert):
    """One array a column: the statement is the same for any number of rows, and prepared once."""

    def __init__(self, table: Table, columns: Sequence[str], ending: str = "") -> None:
        super().__init__(table, columns, ending)
        self._sql = f"{self._into} SELECT * FROM {_unnested(self._columns)} {ending}"  # noqa: S608 - our own names

    def rows(self, cursor: Any, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        if not rows:
            return []
        cursor.execute(self._sql, [list(column) for column in zip(*rows, strict=True)])
        return cursor.fetchall() if cursor.description else []


class ArraysUpdate(Update):
    """As `ArraysInsert`: one statement, and one way to the server and back, for all rows."""

    def __init__(self, table: Table, of: Mapping[str, Column[Any]], sets: str) -> None:
        super().__init__(table, of, sets)
        values = {name: f"changes.{name}" for name in of}
        self._sql = (
            f"UPDATE {table.name} SET {sets.format(**values)}"  # noqa: S608 - our own names
            f" FROM {_unnested(of.values())} AS changes ({', '.join(of)})"
            f" WHERE {table.name}.id = changes.{next(iter(of))}"
        )

    def rows(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        cursor.execute(self._sql, [[row[name] for row in rows] for name in self._of])


def _unnested(columns: Iterable[Column[Any]]) -> str:
    from sqlalchemy.dialects import postgresql  # only where it is used, like the driver

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    arrays = (f"%b::{column.type.compile(dialect).partition(' ')[0]}[]" for column in columns)
    return f"unnest({', '.join(arrays)})"


log = structlog.get_logger(__name__)

OLDEST_SQLITE = (3, 35, 0)  # RETURNING
PATIENCE_MS = 10_000
CHANNEL = "norce_adapter"
LIVES = "hashtext('norce_adapter.lives')"


class StoreUnavailable(Exception):
    """
    The database cannot be written now: full disk, read-only volume, lost connection. Nothing of this call was stored.

    It heals by itself: the next write tries anew.
    """


class StoreInUse(Exception):
    """Another `serve` has this database. Stop it first, or send it the command through its operations port."""


class StoreMissing(Exception):
    """There is no database at this address yet: `serve` makes it."""


class Database(ABC):
    """
    One database by its address. `where` names it for people and holds no password.

    What is not abstract suits one that this process has to itself.
    """

    shared: ClassVar[bool]
    insert: ClassVar[type[Insert]]
    update: ClassVar[type[Update]]
    errors: tuple[type[Exception], ...] = (DBAPIError, sqlite3.Error)  # what it and its driver raise
    among: ClassVar[str]  # an SQL condition, after a column: one of the values that `several` made a parameter of
    by_index: ClassVar[str]  # how a planner that keeps no statistics is told which index to take

    def __init__(self, url: URL) -> None:
        self.url = url
        self.where = url.render_as_string(hide_password=True)

    def take(self) -> None:
        """Takes the database for this process. Raises `StoreInUse`, `StoreUnavailable`."""
        return

    def give_back(self) -> None:
        return

    @abstractmethod
    def engine(self, *, read_only: bool) -> Engine: ...

    def check_exists(self) -> None:
        """Raises `StoreMissing` where nothing is there to be read; or else the connection says so."""
        return

    def hold_for_migration(self, connection: Connection) -> None:
        """Lets one process migrate at a time, until the transaction ends."""
        return

    def nobody_else_lives_by_it(self, connection: Connection) -> bool:
        """Whether no other process has entered; nobody enters before the transaction ends."""
        return True

    def enter(self, connection: Connection) -> None:
        """From now on others know that a process lives by this database, for as long as the connection lasts."""
        return

    @abstractmethod
    def wall(self, connection: Connection) -> int:
        """What this database's machine takes for the time, in milliseconds since 1970."""

    @abstractmethod
    def is_at_fault(self, error: Exception) -> bool:
        """Whether it is the database that fails, not the data of one row."""

    def may_be_repeated(self, error: Exception) -> bool:
        """Whether nothing is wrong but that two transactions met."""
        return False

    @abstractmethod
    def several(self, values: Iterable[int]) -> Any: ...

    def tell(self, cursor: Any) -> None:
        """Tells every node, once this is committed, that there is new work."""
        return

    def listen(self, news: Callable[[], None]) -> Callable[[], None]:
        """Calls `news`, from a thread, when a node has told of new work. Answers how to end that."""
        return lambda: None


def database_at(url: str) -> Database:
    """The database at a `sqlite:///` or `postgresql+psycopg://` address."""
    parsed = make_url(url)
    return Postgres(parsed) if parsed.get_backend_name() == "postgresql" else Sqlite(parsed)


class Sqlite(Database):
    """A file, in WAL mode with `synchronous=FULL`: NORMAL may lose the last commits at a power cut."""

    shared = False
    insert = ValuesInsert
    update = EachUpdate
    among = "IN (SELECT value FROM json_each(?))"
    by_index = "INDEXED BY {}"

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.path = Path(url.database or "")
        self.where = str(self.path)
        self._lock: int | None = None

    def take(self) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise StoreUnavailable(f"SQLite {sqlite3.sqlite_version} is too old: {oldest} or newer is needed")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"cannot open {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StoreInUse(f"another process serves {self.path}; stop it first") from error
        self._lock = lock

    def give_back(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def engine(self, *, read_only: bool) -> Engine:
        engine = create_engine("sqlite://", creator=lambda: self.connect(read_only=read_only), poolclass=NullPool)

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # By the driver: through SQLAlchemy it costs five times as much, at each commit.
            connection.connection.cursor().execute("BEGIN" if read_only else "BEGIN IMMEDIATE")

        return engine

    def connect(self, *, read_only: bool) -> sqlite3.Connection:
        """A connection of the driver's own."""
        mode = "ro" if read_only else "rwc"
        connection = sqlite3.connect(
            f"file:{self.path.absolute().as_posix().replace('?', '%3f').replace('#', '%23')}?mode={mode}",
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
        except sqlite3.Error:  # not a database, say
            connection.close()
            raise
        return connection

    def check_exists(self) -> None:
        if not self.path.exists():
            raise StoreMissing(f"there is no database at {self.path} yet")

    def wall(self, connection: Connection) -> int:
        return time.time_ns() // 1_000_000

    def is_at_fault(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        return type(original).__name__ in ("OperationalError", "InternalError", "InterfaceError", "DatabaseError")

    def several(self, values: Iterable[int]) -> str:
        return json.dumps(list(values))


class Postgres(Database):
    """
    A PostgreSQL that any number of nodes share. What was answered is on its disk: `synchronous_commit` is on.

    `patience_ms` is how long a statement may take, or a node be silent in the middle of a transaction; a lock is waited
    for half as long.
    """

    shared = True
    insert = ArraysInsert
    update = ArraysUpdate
    among = "= ANY(%s)"
    by_index = ""

    def __init__(self, url: URL, *, patience_ms: int = PATIENCE_MS) -> None:
        super().__init__(url)
        import psycopg  # only where it is used: it is 10 MB of memory

        self.errors = (DBAPIError, psycopg.Error)
        self._psycopg = psycopg
        self._patience_ms = patience_ms

    def engine(self, *, read_only: bool) -> Engine:
        # Readers come and go; the writer keeps its one connection, and checks nothing before a use: it notices.
        engine = create_engine(self.url, poolclass=NullPool, connect_args=self._arguments())
        settings = {
            "default_transaction_isolation": "read committed",
            "statement_timeout": self._patience_ms,
            "lock_timeout": self._patience_ms // 2,
            # A node that is stopped in the middle of a transaction must not hold up the others, nor one that is gone.
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
        def _connected(connection: Any, _record: Any) -> None:
            connection.autocommit = True
            connection.execute("; ".join(statements))
            connection.autocommit = False

        return engine

    def hold_for_migration(self, connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('norce_adapter.migration'))")
        # Whoever waits to alter a table holds up all who come after; better not to start than to stop their intake.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {self._patience_ms // 4}")

    def nobody_else_lives_by_it(self, connection: Connection) -> bool:
        return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({LIVES})").scalar_one())

    def enter(self, connection: Connection) -> None:
        with connection.begin():
            connection.exec_driver_sql(f"SELECT pg_advisory_lock_shared({LIVES})")

    def wall(self, connection: Connection) -> int:
        sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
        return int(connection.exec_driver_sql(sql).scalar_one())

    def is_at_fault(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        errors = self._psycopg.errors
        if isinstance(original, errors.DataError | errors.IntegrityError | errors.ProgramLimitExceeded):
            return False
        # What the driver cannot put into a statement is the data's fault; what the server says of one is not.
        return not (isinstance(original, errors.ProgrammingError) and original.sqlstate is None)

    def may_be_repeated(self, error: Exception) -> bool:
        original = getattr(error, "orig", error)
        errors = self._psycopg.errors
        # The last: what a row refers to was pruned meanwhile; the next try does not find it any more.
        met = errors.DeadlockDetected | errors.SerializationFailure | errors.ForeignKeyViolation
        return isinstance(original, met)

    def several(self, values: Iterable[int]) -> list[int]:
        return list(values)

    def tell(self, cursor: Any) -> None:
        cursor.execute(f"NOTIFY {CHANNEL}")

    def listen(self, news: Callable[[], None]) -> Callable[[], None]:
        ended = threading.Event()
        engine = self.engine(read_only=True)

        def hear() -> None:
            while not ended.is_set():
                with contextlib.suppress(*self.errors):  # the poll goes on meanwhile
                    pooled = engine.raw_connection()
                    own = pooled.driver_connection
                    assert isinstance(own, self._psycopg.Connection)
                    pooled.detach()
                    with own as connection:
                        connection.autocommit = True
                        connection.execute(f"LISTEN {CHANNEL}")
                        news()  # of what was told before we listened
                        while not ended.is_set():
                            for _ in connection.notifies(timeout=0.5):
                                news()
                ended.wait(1.0)

        thread = threading.Thread(target=hear, name="ledger-listener", daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            thread.join(timeout=5)

        return end

    def _arguments(self) -> dict[str, Any]:
        # A peer that has gone without a word is found out within seconds.
        return {
            "connect_timeout": 5,
            "application_name": "norce-adapter",
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": self._patience_ms,
        }
