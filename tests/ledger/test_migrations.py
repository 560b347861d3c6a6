"""Migrations: they make the tables of the schema, and nodes keep working beside them."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect

from adapter.ledger.inbox import Received
from adapter.ledger.schema import metadata
from adapter.ledger.store import Store, known_revisions
from tests.databases import Server, rows
from tests.ledgers import HandClock, Ledger, receipt


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def empty_postgres_url(postgres: Server) -> Iterator[str]:
    url = postgres.empty()
    try:
        yield url
    finally:
        postgres.drop(url)


def test_the_migrations_make_exactly_the_tables_of_the_schema(empty_url: str) -> None:
    store = Store.open(empty_url)
    try:
        with store.read_connection() as connection:
            differences = compare_metadata(MigrationContext.configure(connection), metadata)
            assert differences == []
            assert defaults(connection) == {
                (table.name, column.name)
                for table in metadata.sorted_tables
                for column in table.c
                if column.server_default is not None
            }
    finally:
        store.close()


def defaults(connection: Connection) -> set[tuple[str, str]]:
    """Return the columns with a default, without the keys."""
    return {
        (table.name, column["name"])
        for table in metadata.sorted_tables
        for column in inspect(connection).get_columns(table.name)
        if column["default"] is not None and not column["default"].startswith("nextval")
    }


def test_opening_a_migrated_database_again_keeps_its_rows(empty_url: str, loop: asyncio.Runner) -> None:
    first = Ledger(empty_url, HandClock(), loop)
    first.receive(receipt())
    first.store.close()

    Store.open(empty_url).close()

    assert rows(empty_url, "SELECT count(*) FROM notifications") == [(1,)]
    assert rows(empty_url, "SELECT version_num FROM alembic_version") == [(known_revisions()[0],)]


def test_a_running_node_works_on_while_a_newer_one_migrates(empty_postgres_url: str, loop: asyncio.Runner) -> None:
    ledger = Ledger(empty_postgres_url, HandClock(), loop)
    try:
        ledger.owed(1)
        claim = ledger.claim_one()
        rows(ledger.url, "ALTER TABLE lanes ADD COLUMN colour text")  # statements that were prepared before
        rows(ledger.url, "ALTER TABLE queues ADD COLUMN weight integer NOT NULL DEFAULT 1")
        rows(ledger.url, "ALTER TABLE notifications ADD COLUMN colour text")
        rows(ledger.url, "UPDATE alembic_version SET version_num = '9999'")

        assert ledger.settle(claim)
        ledger.owed(2)
        assert ledger.settle(ledger.claim_one())
        assert ledger.do(ledger.lease.renew())
    finally:
        ledger.store.close()


def test_a_node_works_with_a_newer_revision_than_its_own(store_url: str, loop: asyncio.Runner) -> None:
    rows(store_url, "UPDATE alembic_version SET version_num = '9999'")

    ledger = Ledger(store_url, HandClock(), loop)

    try:
        assert ledger.receive(receipt()) is Received.NEW
        assert ledger.rows("SELECT version_num FROM alembic_version") == [("9999",)]
    finally:
        ledger.store.close()


def test_nodes_that_start_at_once_on_an_empty_database_all_succeed(empty_postgres_url: str) -> None:
    with ThreadPoolExecutor(4) as nodes:
        stores = list(nodes.map(lambda _: Store.open(empty_postgres_url), range(4)))
    moments = [store.clock() for store in stores]
    for store in stores:
        store.close()

    assert rows(empty_postgres_url, "SELECT version_num FROM alembic_version") == [(known_revisions()[0],)]
    assert max(moments) - min(moments) < 1000
