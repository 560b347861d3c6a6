"""Fixtures that more than one room's tests use: databases of both kinds, and quiet."""

import asyncio
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from adapter import logs
from tests.databases import KINDS, Files, Server, postgres_server
from tests.ledgers import HandClock, Ledger


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The one PostgreSQL of this run."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with the ledger's tables and nothing in them: once on SQLite, once on PostgreSQL."""
    if request.param == "sqlite":
        yield request.getfixturevalue("files").fresh(tmp_path)
        return
    server: Server = request.getfixturevalue("postgres")
    url = server.fresh()
    try:
        yield url
    finally:
        server.drop(url)


@pytest.fixture
def postgres_url(postgres: Server) -> Iterator[str]:
    """The same on PostgreSQL only, for what takes several processes."""
    url = postgres.fresh()
    try:
        yield url
    finally:
        postgres.drop(url)


@pytest.fixture(params=KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/adapter.db"
        return
    server: Server = request.getfixturevalue("postgres")
    url = server.empty()
    try:
        yield url
    finally:
        server.drop(url)


@pytest.fixture
def ledger(store_url: str) -> Iterator[Ledger]:
    with asyncio.Runner() as loop:
        ledger = Ledger(store_url, HandClock(), loop)
        try:
            yield ledger
        finally:
            ledger.store.close()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """A command sets logging up for its whole process, and that is ours."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    logs.configure(stream=io.StringIO())  # what a service in another thread logs is no output of the command
    yield
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level
