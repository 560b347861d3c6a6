"""The writer on both databases: groups, failures and recovery."""

import asyncio
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, event, make_url, text

from adapter.ledger.databases import Postgres, Sqlite, database_at
from adapter.ledger.inbox import Received, ReceivedNotification
from adapter.ledger.store import (
    Store,
    StoreBusy,
    StoreInUse,
    StoreMissing,
    StoreUnavailable,
    open_for_reading,
)
from tests.databases import Server, database_of, postgres_server
from tests.ledgers import HandClock, Ledger, opened, receipt
from tests.pooler import pooler


@pytest.fixture
def in_a_file(tmp_path: Path) -> Iterator[Ledger]:
    """Yield a ledger on SQLite, for features that only SQLite has."""
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


def test_work_that_arrives_together_is_one_transaction(ledger: Ledger) -> None:
    async def together() -> list[Received]:
        wanted = [(ledger.export, True)]
        return await asyncio.gather(*(ledger.inbox.receive(receipt(f"o-{n}", wanted=wanted)) for n in range(50)))

    with commits_counted(ledger.store) as commits:
        received = ledger.do(together())

    assert received == [Received.NEW] * 50
    assert commits == ["commit"]
    assert len(ledger.rows("SELECT 1 FROM notifications")) == 50


def test_work_that_arrives_during_a_commit_becomes_the_next_transaction(ledger: Ledger) -> None:
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
    """A disk that is full on demand, without a file system of its own."""

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


def test_on_a_full_disk_every_caller_of_the_group_gets_the_error(in_a_file: Ledger) -> None:
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


def test_opening_fails_if_the_database_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")

    with pytest.raises(StoreUnavailable):
        Store.open(f"sqlite:///{tmp_path}/a-file/adapter.db")


def test_a_file_that_is_no_database_is_refused_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "adapter.db"
    path.write_bytes(b"this is no database, only some text that is long enough to look at" * 20)

    for _ in range(2):  # the second time shows that the lock was given back
        with pytest.raises(StoreUnavailable):
            Store.open(f"sqlite:///{path}")


@pytest.mark.parametrize("link", ["", "link.db", "folder/../adapter.db"], ids=["itself", "a link", "another spelling"])
def test_a_file_is_served_by_one_process_whatever_leads_to_it(tmp_path: Path, link: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "adapter.db")
    first = database_at(f"sqlite:///{tmp_path}/adapter.db")
    first.lock()

    with pytest.raises(StoreInUse):
        Store.open(f"sqlite:///{tmp_path}/{link or 'adapter.db'}")

    first.unlock()
    Store.open(f"sqlite:///{tmp_path}/{link or 'adapter.db'}").close()


def test_a_file_with_another_hard_link_is_refused(tmp_path: Path) -> None:
    Store.open(f"sqlite:///{tmp_path}/adapter.db").close()
    (tmp_path / "other.db").hardlink_to(tmp_path / "adapter.db")

    for name in ("adapter.db", "other.db"):
        with pytest.raises(StoreUnavailable, match="2 hard links"):
            Store.open(f"sqlite:///{tmp_path}/{name}")

    (tmp_path / "other.db").unlink()
    Store.open(f"sqlite:///{tmp_path}/adapter.db").close()


def test_a_device_or_pipe_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "adapter.db"
    os.mkfifo(pipe)
    pipe.chmod(0o666)

    with pytest.raises(StoreUnavailable, match="is no regular file"):
        Store.open(f"sqlite:///{pipe}")

    assert stat.S_IMODE(pipe.stat().st_mode) == 0o666


def test_the_lock_of_a_file_lasts_while_others_read_it(in_a_file: Ledger) -> None:
    in_a_file.owed(1)
    with open_for_reading(in_a_file.url).connect() as connection:
        connection.exec_driver_sql("SELECT 1 FROM lanes").all()

    with pytest.raises(StoreInUse):
        Store.open(in_a_file.url)
    in_a_file.owed(2)


def test_a_file_that_is_moved_while_it_is_served_is_unavailable_until_it_is_back(in_a_file: Ledger) -> None:
    path = Path(in_a_file.url.removeprefix("sqlite:///"))
    in_a_file.owed(1)

    path.rename(path.with_name("moved.db"))
    with pytest.raises(StoreUnavailable, match="moved or deleted"):
        in_a_file.owed(2)
    assert in_a_file.store.failing
    path.with_name("moved.db").rename(path)

    in_a_file.owed(3)
    assert not in_a_file.store.failing
    assert [snapshot for snapshot, _, _ in in_a_file.states()] == [1, 3]


def test_the_journal_of_a_file_that_was_moved_away_is_not_lost(in_a_file: Ledger) -> None:
    path = Path(in_a_file.url.removeprefix("sqlite:///"))
    in_a_file.owed(1)

    path.rename(path.with_name("moved.db"))
    in_a_file.store.close()
    with pytest.raises(StoreUnavailable, match="beside its journal"):
        Store.open(in_a_file.url)
    path.with_name("moved.db").rename(path)

    Store.open(in_a_file.url).close()
    assert [snapshot for snapshot, _, _ in in_a_file.states()] == [1]


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
def test_a_file_that_is_deleted_while_it_is_served_is_unavailable(in_a_file: Ledger, again: bool) -> None:
    path = Path(in_a_file.url.removeprefix("sqlite:///"))
    in_a_file.owed(1)

    path.unlink()
    if again:
        path.touch()

    with pytest.raises(StoreUnavailable, match="moved or deleted"):
        in_a_file.owed(2)
    assert path.exists() == again


@pytest.mark.parametrize("name", ["a%41.db", "a b?c#d.db", "%2e%2e", "ö%.db"])
def test_a_path_is_taken_literally(tmp_path: Path, name: str) -> None:
    database = Sqlite(URL.create("sqlite", database=f"{tmp_path}/{name}"))
    database.lock()
    with database.engine(read_only=False).connect() as connection:
        connection.exec_driver_sql("CREATE TABLE here (x)")
    database.unlock()

    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_the_ledger_and_its_folder_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    Store.open(f"sqlite:///{old}").close()
    before = os.umask(0)
    try:
        with asyncio.Runner() as loop:
            for path in (tmp_path / "new" / "folder" / "adapter.db", old):
                old.chmod(0o666)
                ledger = Ledger(f"sqlite:///{path}", HandClock(), loop)
                ledger.owed(1)
                files = [path, Path(f"{path}-wal"), Path(f"{path}-shm")]

                assert [stat.S_IMODE(each.stat().st_mode) for each in files] == [0o600] * 3
                ledger.store.close()
    finally:
        os.umask(before)
    for folder in ("new", "new/folder"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_commits_are_flushed_to_the_disk(in_a_file: Ledger) -> None:
    def pragmas(connection: Connection, items: Sequence[None]) -> list[tuple[str, int]]:
        names = ("journal_mode", "synchronous")
        journal, synchronous = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)
        return [(journal, synchronous) for _ in items]

    assert in_a_file.do(in_a_file.store.write(pragmas, None)) == ("wal", 2)


def test_a_reader_before_the_first_start_gets_store_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing):
        open_for_reading(f"sqlite:///{tmp_path}/adapter.db")


# --- a PostgreSQL that cannot be a ledger ---------------------------------------------------------------------------


@pytest.mark.parametrize("per_transaction", [True, False], ids=["transaction mode", "session mode"])
def test_a_pooler_in_transaction_mode_is_refused(postgres_url: str, per_transaction: bool) -> None:
    url = make_url(postgres_url)
    with pooler(f"{url.query['host']}/.s.PGSQL.5432", per_transaction=per_transaction) as running:
        through = url.set(host="127.0.0.1", port=running.port, query={})
        pooled = through.render_as_string(hide_password=False)
        if per_transaction:
            with pytest.raises(StoreUnavailable, match="pooler in transaction mode"):
                Store.open(pooled)
        else:
            Store.open(pooled).close()


def test_a_pooler_that_takes_its_connections_in_turn_is_refused(postgres_url: str) -> None:
    url = make_url(postgres_url)
    with pooler(f"{url.query['host']}/.s.PGSQL.5432", per_transaction=True, round_robin=True) as running:
        pooled = url.set(host="127.0.0.1", port=running.port, query={}).render_as_string(hide_password=False)
        for _ in range(4):  # with every number of connections that it has kept
            with pytest.raises(StoreUnavailable, match="pooler in transaction mode"):
                Store.open(pooled)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_text_is_utf_8_whatever_the_environment_says(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    with opened(postgres_url) as ledger:
        ledger.owed(1, order_id="order-ö→🙂")

        assert ledger.claim_one().order_id == "order-ö→🙂"


def test_a_database_that_is_not_utf_8_is_refused(postgres: Server) -> None:
    with postgres.connect("postgres") as connection:
        connection.execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
    url = make_url(postgres.empty()).set(database="ascii").render_as_string(hide_password=False)
    try:
        with pytest.raises(StoreUnavailable, match="encoded as SQL_ASCII; create it with ENCODING 'UTF8'"):
            Store.open(url)
    finally:
        postgres.drop(url)


# --- a PostgreSQL that fails ----------------------------------------------------------------------------------------


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[Ledger]:
    with asyncio.Runner() as loop:
        ledger = Ledger(postgres_url, HandClock(), loop)
        try:
            yield ledger
        finally:
            ledger.store.close()


def connections(ledger: Ledger) -> int:
    own = "application_name = 'norce-adapter' AND datname = current_database()"
    return int(ledger.rows(f"SELECT count(*) FROM pg_stat_activity WHERE {own}")[0][0])


def in_a_group(ledger: Ledger, *receipts: ReceivedNotification) -> list[Received | BaseException]:
    async def together() -> list[Received | BaseException]:
        return await asyncio.gather(*map(ledger.inbox.receive, receipts), return_exceptions=True)

    return ledger.do(together())


def test_a_postgresql_that_is_stopped_is_said_to_everybody_and_heals_without_a_restart() -> None:
    with postgres_server() as server, asyncio.Runner() as loop:
        ledger = Ledger(server.fresh(), HandClock(), loop)
        ledger.owed(1)
        server.stop()
        for _ in range(2):
            answers = in_a_group(ledger, *(receipt(f"during-{n}") for n in range(3)))
            assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
            assert ledger.store.failing
            with pytest.raises(StoreUnavailable):
                ledger.do(ledger.lease.renew())
        server.start()

        assert ledger.receive(receipt("after")) is Received.NEW
        assert not ledger.store.failing
        assert ledger.settle(ledger.claim_one())
        assert ledger.rows("SELECT order_id FROM notifications ORDER BY id") == [("order-1",), ("after",)]
        assert connections(ledger) == 1
        ledger.store.close()


def test_a_connection_that_is_lost_while_idle_is_replaced_before_anybody_notices(
    on_postgres: Ledger, postgres: Server
) -> None:
    on_postgres.owed(1)
    for _ in range(3):
        postgres.disconnect(on_postgres.url)

        answers = in_a_group(on_postgres, receipt("a"), receipt("a"))

        assert set(answers) <= {Received.NEW, Received.REPEAT}
        assert not on_postgres.store.failing
    assert on_postgres.settle(on_postgres.claim_one())
    assert connections(on_postgres) == 1


class Cut:
    """Breaks the writer's connection at a commit: before it, or after it but before the answer."""

    def __init__(self, ledger: Ledger, server: Server, *, done: bool) -> None:
        self._url, self._server, self._done = ledger.url, server, done
        self._is_over = False
        event.listen(ledger.store.engine, "commit", self._cut)

    def _cut(self, connection: Connection) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._done:
            connection.connection.driver_connection.execute("COMMIT")
        self._server.disconnect(self._url)
        connection.connection.driver_connection.execute("SELECT 'what the driver would say at the commit'")


@pytest.mark.parametrize("done", [True, False], ids=["it is on the disk", "nothing is on the disk"])
def test_a_commit_that_was_not_answered_is_no_acknowledgement_and_the_same_again_is_stored_once(
    on_postgres: Ledger, postgres: Server, done: bool
) -> None:
    wanted = [(on_postgres.export, True)]
    Cut(on_postgres, postgres, done=done)

    answers = in_a_group(on_postgres, receipt(wanted=wanted), receipt("order-2", wanted=wanted))

    assert [type(answer) for answer in answers] == [StoreUnavailable] * 2
    assert on_postgres.store.failing
    again = on_postgres.receive(receipt(wanted=wanted))
    assert again is (Received.REPEAT if done else Received.NEW)
    assert not on_postgres.store.failing
    assert on_postgres.receive(receipt("order-2", wanted=wanted)) is again
    assert len(on_postgres.states()) == 2
    assert connections(on_postgres) == 1


@pytest.mark.parametrize("done", [True, False], ids=["it is on the disk", "nothing is on the disk"])
def test_a_claim_whose_commit_was_not_confirmed_is_undone(on_postgres: Ledger, postgres: Server, done: bool) -> None:
    on_postgres.owed(1, order_id="held")
    held = on_postgres.claim_one()
    on_postgres.owed(1)
    Cut(on_postgres, postgres, done=done)
    with pytest.raises(StoreUnavailable):
        on_postgres.claim()

    given_back = on_postgres.do(on_postgres.lanes.give_back([held.fence]))

    assert given_back == (1 if done else 0)
    claim = on_postgres.claim_one()
    assert (claim.order_id, claim.attempt, claim.in_doubt) == ("order-1", 1, False)
    assert on_postgres.settle(claim)
    assert on_postgres.settle(held)


@pytest.mark.parametrize("done", [True, False], ids=["it is on the disk", "nothing is on the disk"])
def test_a_settlement_that_was_not_answered_is_kept_once(on_postgres: Ledger, postgres: Server, done: bool) -> None:
    on_postgres.owed(1)
    claim = on_postgres.claim_one()
    Cut(on_postgres, postgres, done=done)
    with pytest.raises(StoreUnavailable):
        on_postgres.settle(claim)

    assert on_postgres.settle(claim)

    assert on_postgres.states() == [(1, "done", "delivered")]
    assert on_postgres.rows("SELECT count(*) FROM attempts") == [(1,)]


def test_a_statement_that_takes_too_long_is_cancelled_and_the_next_one_works(postgres_url: str) -> None:
    def slow(connection: Connection, items: Sequence[float]) -> list[None]:
        for item in items:
            connection.execute(text("SELECT pg_sleep(:s)"), {"s": item})
        return [None for _ in items]

    store = Store(Postgres(make_url(postgres_url), patience_ms=200), clock=HandClock())
    try:
        with asyncio.Runner() as loop:
            with pytest.raises(StoreUnavailable, match="timeout"):
                loop.run(store.write(slow, 30.0))
            assert store.failing
            loop.run(store.write(slow, 0.0))
            assert not store.failing
    finally:
        store.close()


def test_a_database_that_only_reads_is_said_and_heals_without_a_restart(on_postgres: Ledger, postgres: Server) -> None:
    name = database_of(on_postgres.url)
    with postgres.connect("postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.disconnect(on_postgres.url)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="read-only"):
            on_postgres.receive(receipt())
        assert on_postgres.store.failing
    with postgres.connect("postgres") as connection:
        connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")

    assert on_postgres.receive(receipt()) is Received.NEW
    assert not on_postgres.store.failing


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_only_reads_is_said_when_the_file_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)

    with pytest.raises(StoreUnavailable, match="cannot open"):
        Store.open(f"sqlite:///{folder}/adapter.db")


def test_a_file_that_only_reads_is_said_and_heals_without_a_restart(in_a_file: Ledger) -> None:
    class ReadOnly:
        on = True

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA query_only = {'on' if ReadOnly.on else 'off'}")

    event.listen(in_a_file.store.engine, "begin", begin)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="readonly"):
            in_a_file.receive(receipt())
        assert in_a_file.store.failing
    ReadOnly.on = False

    assert in_a_file.receive(receipt()) is Received.NEW
    assert not in_a_file.store.failing


# --- one row's fault ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order_id",
    [
        pytest.param("o-\0", id="NUL"),
        pytest.param("o-\ud800", id="a lone surrogate"),
        pytest.param("".join(map(chr, range(0x4E00, 0x9E00))), id="longer than an index takes"),
    ],
)
def test_a_row_that_the_database_does_not_take_fails_alone(ledger: Ledger, order_id: str) -> None:
    wanted = [(ledger.history, False)]
    receipts = [
        receipt(each, identity=b"%d" % n, body=b"{}", wanted=wanted) for n, each in enumerate(["a", order_id, "b"])
    ]

    first, odd, last = in_a_group(ledger, *receipts)

    assert (first, last) == (Received.NEW, Received.NEW)
    assert odd is Received.NEW or not isinstance(odd, StoreUnavailable)  # SQLite takes what PostgreSQL does not
    assert not ledger.store.failing
    assert {"a", "b"} <= {order for (order,) in ledger.rows("SELECT order_id FROM lanes")}
    assert ledger.rows("SELECT count(*) FROM notifications") == ledger.rows("SELECT count(*) FROM deliveries")


# --- how much waits -------------------------------------------------------------------------------------------------


def test_beyond_so_many_bytes_the_store_is_busy_and_takes_more_afterwards(ledger: Ledger) -> None:
    ledger.store.capacity_bytes = 3000
    body = b'"' + b"x" * 1000 + b'"'
    answers = in_a_group(ledger, *(receipt(f"o-{n}", body=body) for n in range(4)))

    assert [answer if isinstance(answer, Received) else type(answer) for answer in answers] == [
        *[Received.NEW] * 2,
        *[StoreBusy] * 2,
    ]
    assert ledger.receive(receipt("o-3", body=body)) is Received.NEW


def test_a_caller_that_goes_away_holds_nothing_up(ledger: Ledger) -> None:
    async def gone() -> Received:
        task = asyncio.create_task(ledger.inbox.receive(receipt("gone")))
        await asyncio.sleep(0)
        task.cancel()
        return await ledger.inbox.receive(receipt("stays"))

    assert ledger.do(gone()) is Received.NEW
    assert ledger.rows("SELECT count(*) FROM notifications") == [(2,)]


def test_a_closed_store_leaves_neither_thread_nor_connection(store_url: str) -> None:
    before = set(threading.enumerate())
    with asyncio.Runner() as loop:
        ledger = Ledger(store_url, HandClock(), loop)
        ledger.owed(1)
        ledger.store.close()

    assert set(threading.enumerate()) <= before
    if ledger.store.shared:
        assert connections(ledger) == 0
