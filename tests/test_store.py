"""The writer: groups, failures and how they heal, on both databases."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledgers import HandClock, Ledger, receipt
from sqlalchemy import Connection, event, text

from adapter.ledger.inbox import Received
from adapter.ledger.store import Store, StoreBusy, StoreInUse, StoreMissing, StoreUnavailable, open_for_reading


@pytest.fixture
def in_a_file(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger on SQLite, for what only SQLite has."""
    with asyncio.Runner() as loop:
        ledger = Ledger(f"sqlite:///{tmp_path}/adapter.db", HandClock(), loop)
        try:
            yield ledger
        finally:
            ledger.store.close()


@contextmanager
def commits_counted(store: Store) -> Iterator[list[str]]:
    commits: list[str] = []

    def count(_connection: Connection) -> None:
        commits.append("commit")

    event.listen(store.engine, "commit", count)
    yield commits
    event.remove(store.engine, "commit", count)


def test_what_arrives_together_is_one_transaction(ledger: Ledger) -> None:
    async def together() -> list[Received]:
        wanted = [(ledger.export, True)]
        return await asyncio.gather(*(ledger.inbox.receive(receipt(f"o-{n}", wanted=wanted)) for n in range(50)))

    with commits_counted(ledger.store) as commits:
        received = ledger.do(together())

    assert received == [Received.NEW] * 50
    assert commits == ["commit"]
    assert len(ledger.rows("SELECT 1 FROM notifications")) == 50


def test_what_arrives_while_a_transaction_is_being_committed_becomes_the_next_one(ledger: Ledger) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def slowly(_connection: Connection, items: Sequence[Any]) -> Sequence[Any]:
        writing.set()
        go_on.wait(10)
        return items

    async def in_two_waves() -> None:
        first = asyncio.create_task(ledger.store.write(slowly, 0))
        await asyncio.to_thread(writing.wait, 10)
        rest = [asyncio.create_task(ledger.store.write(_as_is, n)) for n in range(10)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, *rest)

    with commits_counted(ledger.store) as commits:
        ledger.do(in_two_waves())

    assert commits == ["commit", "commit"]


def _as_is(_connection: Connection, items: Sequence[Any]) -> Sequence[Any]:
    return items


def test_a_row_that_cannot_be_stored_fails_alone(ledger: Ledger) -> None:
    wanted = [(ledger.export, True)]

    async def together() -> list[Received | BaseException]:
        each = [receipt("o-1", wanted=wanted), receipt("o-\ud800", identity=b"x", body=b"{}", wanted=wanted)]
        each.append(receipt("o-3", wanted=wanted))
        return await asyncio.gather(*(ledger.inbox.receive(one) for one in each), return_exceptions=True)

    first, second, third = ledger.do(together())

    assert (first, third) == (Received.NEW, Received.NEW)
    assert isinstance(second, UnicodeEncodeError)
    assert ledger.rows("SELECT order_id FROM notifications ORDER BY id") == [("o-1",), ("o-3",)]
    assert len(ledger.states()) == 2
    assert not ledger.store.failing


def test_a_value_of_a_type_that_no_column_takes_is_no_failure_of_the_database(ledger: Ledger) -> None:
    def odd(connection: Connection, items: Sequence[Any]) -> list[None]:
        for item in items:
            connection.execute(text("INSERT INTO processes VALUES (:id, 0, 4000000000000, 'x')"), {"id": item})
        return [None] * len(items)

    async def together() -> list[BaseException | None]:
        values: list[Any] = [100, {"no": "column"}, 101]
        return await asyncio.gather(*(ledger.store.write(odd, each) for each in values), return_exceptions=True)

    first, second, third = ledger.do(together())

    assert first is third is None
    assert isinstance(second, Exception)
    assert not isinstance(second, StoreUnavailable)
    assert not ledger.store.failing


class Disk:
    """A disk that is full while it is told to be, without a file system of its own."""

    def __init__(self, store: Store) -> None:
        self.full = False
        event.listen(store.engine, "begin", self._limit)

    def _limit(self, connection: Connection) -> None:
        # SQLite never goes below what the file has already: 1 means "not a page more".
        connection.exec_driver_sql(f"PRAGMA max_page_count = {1 if self.full else 1_000_000}")


def test_a_full_disk_is_said_and_heals_without_a_restart(in_a_file: Ledger) -> None:
    disk = Disk(in_a_file.store)
    wanted = [(in_a_file.export, True)]
    large = b'{"filler": "' + b"x" * 100_000 + b'"}'
    in_a_file.receive(receipt("before", wanted=wanted))

    disk.full = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="full"):
            in_a_file.receive(receipt("during", wanted=wanted, body=large))
    assert in_a_file.store.failing

    disk.full = False
    assert in_a_file.receive(receipt("during", wanted=wanted, body=large)) is Received.NEW
    assert not in_a_file.store.failing
    assert in_a_file.rows("SELECT order_id FROM notifications ORDER BY id") == [("before",), ("during",)]
    assert [claim.order_id for claim in in_a_file.claim()] == ["before", "during"]


def test_on_a_full_disk_everybody_of_the_group_is_told(in_a_file: Ledger) -> None:
    disk = Disk(in_a_file.store)
    disk.full = True

    async def together() -> list[Received | BaseException]:
        each = [receipt(f"o-{n}", body=b'"' + b"x" * 50_000 + b'"') for n in range(5)]
        return await asyncio.gather(*(in_a_file.inbox.receive(one) for one in each), return_exceptions=True)

    answers = in_a_file.do(together())

    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert in_a_file.rows("SELECT 1 FROM notifications") == []


def test_a_beat_finds_that_the_store_has_healed(in_a_file: Ledger) -> None:
    disk = Disk(in_a_file.store)
    disk.full = True
    with pytest.raises(StoreUnavailable):
        in_a_file.receive(receipt(body=b'"' + b"x" * 100_000 + b'"'))
    disk.full = False

    in_a_file.do(in_a_file.lease.renew())

    assert not in_a_file.store.failing


def test_beyond_its_capacity_the_store_is_busy_and_takes_more_afterwards(ledger: Ledger) -> None:
    ledger.store.capacity = 3

    async def together() -> list[Received | BaseException]:
        return await asyncio.gather(
            *(ledger.inbox.receive(receipt(f"o-{n}")) for n in range(5)), return_exceptions=True
        )

    answers = ledger.do(together())

    assert answers[:3] == [Received.NEW] * 3
    assert [type(answer) for answer in answers[3:]] == [StoreBusy] * 2
    assert ledger.receive(receipt("o-4")) is Received.NEW


def test_a_second_process_does_not_get_the_database(in_a_file: Ledger) -> None:
    with pytest.raises(StoreInUse):
        Store.open(in_a_file.url)

    assert in_a_file.receive(receipt()) is Received.NEW


def test_a_closed_store_gives_the_database_back(ledger: Ledger) -> None:
    ledger.store.close()

    Store.open(ledger.url).close()


def test_where_the_database_cannot_be_made_opening_says_so(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")

    with pytest.raises(StoreUnavailable):
        Store.open(f"sqlite:///{tmp_path}/a-file/adapter.db")


def test_a_file_that_is_no_database_is_refused_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "adapter.db"
    path.write_bytes(b"this is no database, only some text that is long enough to look at" * 20)

    for _ in range(2):  # the second time shows that the lock was given back
        with pytest.raises(StoreUnavailable):
            Store.open(f"sqlite:///{path}")


def test_commits_are_flushed_to_the_disk(in_a_file: Ledger) -> None:
    def pragmas(connection: Connection, items: Sequence[None]) -> list[tuple[str, int]]:
        names = ("journal_mode", "synchronous")
        journal, synchronous = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)
        return [(journal, synchronous) for _ in items]

    assert in_a_file.do(in_a_file.store.write(pragmas, None)) == ("wal", 2)


def test_a_reader_that_comes_before_the_first_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing):
        open_for_reading(f"sqlite:///{tmp_path}/adapter.db")
