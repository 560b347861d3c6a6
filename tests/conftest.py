"""Fixtures for several packages: databases of both kinds, and logging as it was."""

import asyncio
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from adapter import logs
from tests.databases import KINDS, Files, Server, postgres_server, share_compiled_statements
from tests.ledgers import HandClock, Ledger

SLOW = ("attacks", "crash", "flows")
# Also left out of `make quick`: commands, services in threads, searches and waits.
NOT_QUICK = ("cli", "operations", "test_openapi.py", "test_demo.py", "test_verdicts.py", "test_attacks.py",
             "test_events.py", "test_blocked.py", "test_runner.py", "test_endpoints.py", "test_inbox_and_lanes.py",
             "test_store.py", "test_maintenance.py", "test_commands.py", "test_dispatcher.py", "test_attempt.py",
             "test_resends.py", "test_queries.py", "test_last_event.py", "test_api.py", "test_client.py",
             "test_norce_settings.py", "test_reasons.py", "test_backfill.py", "test_pauses.py")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let an example of a property take as long as a loaded machine needs for it. `EXAMPLES` sets their number."""
    examples = 10 if config.getoption("quick") else int(os.environ.get("EXAMPLES", "25"))
    settings.register_profile(
        "suite", deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("suite")
    share_compiled_statements()


def pytest_xdist_auto_num_workers() -> int:
    """Start two workers more than there are cores: the flows wait most of the time."""
    return min((os.cpu_count() or 1) + 2, 4)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing that `make quick` leaves out: importing takes as long as running the rest."""
    return True if config.getoption("quick") and collection_path.name in {*SLOW, *NOT_QUICK} else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)
    elsewhere = [
        item.nodeid for item in items if item.get_closest_marker("speed") and item.path.parent.name not in SLOW
    ]
    if elsewhere:
        raise pytest.UsageError(f"tests of speed belong into tests/attacks or tests/flows: {elsewhere}")
    if config.getoption("quick"):
        slow = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = filter(is_quick, items)


def is_quick(item: pytest.Item) -> bool:
    """Tell whether a test uses no PostgreSQL, starts no service, waits for nothing and measures no time."""
    needs = {"postgres", "postgres_url", "site"} & set(getattr(item, "fixturenames", ()))
    store = getattr(item, "callspec", None) and "postgresql" in item.callspec.params.values()  # type: ignore[attr-defined]
    return not (needs or store or item.get_closest_marker("speed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only tests without PostgreSQL and without a service process")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The PostgreSQL server of this process."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with empty tables of the ledger: once on SQLite, once on PostgreSQL."""
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
    """A database with empty tables of the ledger, on PostgreSQL only."""
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
        ledger = Ledger(store_url, HandClock(), loop, migrated=True)
        try:
            yield ledger
        finally:
            ledger.store.close()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Restore the logging of this process, which a command configures for its own."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    logs.configure(stream=io.StringIO())  # a service in another thread may log
    yield
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level
