"""
The tables through the versions: every revision can be reached from every earlier one with what is in it, and each only
adds, so that an older node keeps working beside a newer one that has migrated.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from adapter import ledger as package
from adapter.ledger.databases import database_at
from adapter.ledger.inbox import Received
from adapter.ledger.schema import metadata
from adapter.ledger.store import Store
from tests.databases import Server, rows
from tests.ledgers import DOUBT, NOON, HandClock, Ledger, receipt

SCRIPTS = Path(package.__file__).parent / "migrations"
REVISIONS = [script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions()][::-1]

# What a node of the first revision writes: an order that waits, one in a dead process's hands, and one that is done.
OLD_ROWS = [
    "INSERT INTO processes (started_at, lease_until, version) VALUES (1, 2, '0.1')",
    "INSERT INTO queues (route, merchant, channel) VALUES ('export', 'fjallboden', '1')",
    *(
        "INSERT INTO notifications (identity, conflicts_with, merchant, channel, callback, order_id, snapshot_at,"
        f" received_at, source, digest, body) VALUES ({{bytes}}, NULL, 'fjallboden', '1', 'order-status',"
        f" 'order-{number}', 1, 1, 'callback', NULL, {{bytes}})".replace(
            "{bytes}", f"CAST('order-{number}/1' AS {{blob}})"
        )
        for number in (1, 2, 3)
    ),
    "INSERT INTO lanes (queue_id, order_id, holder, claim, settled, current_delivery_id, next_at, newest_snapshot_at)"
    f" VALUES (1, 'order-1', NULL, 0, 0, NULL, 1, 1), (1, 'order-2', 1, 3, 2, 2, {NOON + DOUBT}, 1),"
    " (1, 'order-3', NULL, 1, 1, NULL, NULL, 1)",
    "INSERT INTO deliveries (notification_id, lane_id, snapshot_at, state, reason, attempts, first_attempt_at,"
    " ended_at) VALUES (1, 1, 1, 'waiting', NULL, 0, NULL, NULL), (2, 2, 1, 'waiting', NULL, 3, 5, NULL),"
    " (3, 3, 1, 'done', 'delivered', 1, 5, 6)",
    "INSERT INTO attempts (delivery_id, claim, kind, started_at, ended_at, outcome)"
    " VALUES (3, 1, 'deliver', 5, 6, 'done')",
]


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


def at_revision(url: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    with database_at(url).engine(read_only=False).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def written_by_an_old_node(url: str) -> None:
    for sql in OLD_ROWS:
        rows(url, sql.replace("{blob}", "BLOB" if url.startswith("sqlite") else "BYTEA"))


def columns(url: str) -> dict[str, dict[str, Any]]:
    with database_at(url).engine(read_only=True).connect() as connection:
        look = inspect(connection)
        return {table: {each["name"]: each for each in look.get_columns(table)} for table in look.get_table_names()}


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
    """What fills itself in, but for the keys."""
    return {
        (table.name, column["name"])
        for table in metadata.sorted_tables
        for column in inspect(connection).get_columns(table.name)
        if column["default"] is not None and not column["default"].startswith("nextval")
    }


@pytest.mark.parametrize("revision", REVISIONS)
def test_what_an_older_node_left_is_worked_off_after_the_upgrade(
    empty_url: str, revision: str, loop: asyncio.Runner
) -> None:
    at_revision(empty_url, revision)
    written_by_an_old_node(empty_url)

    ledger = Ledger(empty_url, HandClock(), loop)

    try:
        assert ledger.export == 1
        assert ledger.receive(receipt(wanted=[(ledger.export, True)], body=b"order-1/1")) is Received.REPEAT
        assert ledger.receive(receipt("order-4", wanted=[(ledger.export, True)])) is Received.NEW
        fresh = ledger.claim()
        assert [(each.order_id, each.in_doubt) for each in fresh] == [("order-1", False), ("order-4", False)]
        ledger.clock.now += DOUBT
        (taken_over,) = ledger.claim()
        assert (taken_over.order_id, taken_over.attempt, taken_over.number) == ("order-2", 4, 4)
        assert taken_over.in_doubt
        assert all(ledger.settle(claim) for claim in (*fresh, taken_over))
        assert ledger.rows("SELECT DISTINCT state, reason FROM deliveries") == [("done", "delivered")]
    finally:
        ledger.store.close()


@pytest.mark.parametrize(("before", "after"), list(pairwise(REVISIONS)))
def test_a_migration_only_adds_and_what_it_adds_fills_itself_in(empty_url: str, before: str, after: str) -> None:
    at_revision(empty_url, before)
    old = columns(empty_url)

    at_revision(empty_url, after)

    new = columns(empty_url)
    assert old.keys() <= new.keys()
    for table, were in old.items():
        assert were.keys() <= new[table].keys(), f"{table} has lost a column"
        for name, was in were.items():
            now = new[table][name]
            assert (str(now["type"]), now["default"]) == (str(was["type"]), was["default"]), f"{table}.{name}"
            assert now["nullable"] >= was["nullable"], f"{table}.{name}"
        for name in new[table].keys() - were.keys():
            added = new[table][name]
            assert added["nullable"] or added["default"] is not None, f"{table}.{name} must be given by everybody"


def test_a_node_of_the_first_revision_keeps_writing_after_every_later_one(empty_url: str) -> None:
    Store.open(empty_url).close()

    written_by_an_old_node(empty_url)

    assert rows(empty_url, "SELECT count(*) FROM lanes") == [(3,)]


def test_a_running_node_goes_on_while_a_newer_one_migrates(empty_postgres_url: str, loop: asyncio.Runner) -> None:
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


def test_a_new_table_comes_while_every_other_one_is_being_written(empty_postgres_url: str) -> None:
    before, after = REVISIONS[REVISIONS.index("0004") - 1], "0004"
    at_revision(empty_postgres_url, before)
    written_by_an_old_node(empty_postgres_url)

    with database_at(empty_postgres_url).engine(read_only=False).begin() as connection:
        for table in columns(empty_postgres_url).keys() - {"alembic_version"}:
            connection.exec_driver_sql(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
        at_revision(empty_postgres_url, after)

    assert "verdicts" in columns(empty_postgres_url)


def test_a_node_that_finds_a_newer_revision_than_it_knows_works_with_it(store_url: str, loop: asyncio.Runner) -> None:
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

    assert rows(empty_postgres_url, "SELECT version_num FROM alembic_version") == [(REVISIONS[-1],)]
    assert max(moments) - min(moments) < 1000
