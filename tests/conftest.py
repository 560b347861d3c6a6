"""Fixtures that more than one room's tests use: databases of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import KINDS, Server, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The one PostgreSQL of this run."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new, empty database: once on SQLite, once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/adapter.db"
        return
    server: Server = request.getfixturevalue("postgres")
    url = server.fresh()
    try:
        yield url
    finally:
        server.drop(url)
