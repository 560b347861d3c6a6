"""The verdict log: verdicts are written in the background."""

import asyncio
import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Connection

from adapter.identifiers import Channel
from adapter.ledger.verdict_log import (
    MAX_CODE_LENGTH,
    MAX_CODES,
    MAX_PER_STATEMENT,
    MAX_WAITING,
    LoggedVerdict,
    VerdictLog,
)
from tests import PATIENCE
from tests.ledgers import NOON, Ledger, opened

LATE = LoggedVerdict(
    kind="late",
    callback="order-rules",
    route="swedish-orders-have-an-id",
    channel=Channel("fjallboden", "1"),
    order_id="order-1",
    decided="reject",
    codes=("national-id-missing", "no-name"),
    answered="approve",
    took_ms=2300,
)
SHADOW = replace(LATE, kind="shadow", decided="approve", codes=(), answered=None, took_ms=4)


class Writing:
    """A verdict log that counts what it drops."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.dropped = 0
        self.verdict_log = VerdictLog(ledger.store, dropped=self._drop, gather_for=timedelta(0))

    def record(self, *logged: LoggedVerdict) -> None:
        for each in logged:
            self.verdict_log.record(each)

    def flush(self) -> None:
        self.ledger.do(self.verdict_log.flush())

    def written(self, columns: str = "order_id") -> list[Any]:
        rows = self.ledger.rows(f"SELECT {columns} FROM verdicts ORDER BY id")
        return [row[0] if len(row) == 1 else row for row in rows]

    def _drop(self, number: int) -> None:
        self.dropped += number


@pytest.fixture
def writing(ledger: Ledger) -> Writing:
    return Writing(ledger)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - what it waits for is in a database
            await asyncio.sleep(0)


def hold(writer: threading.Event) -> Callable[[Connection, Any], list[None]]:
    """Return work that occupies the writer until the event is set."""

    def work(_connection: Connection, items: Any) -> list[None]:
        assert writer.wait(PATIENCE)
        return [None for _ in items]

    return work


def test_a_verdict_is_stored_with_the_time_of_its_record(writing: Writing) -> None:
    writing.record(LATE)
    writing.ledger.clock.now += 5
    writing.record(SHADOW)
    writing.ledger.clock.now += 5
    writing.flush()

    facts = "at, kind, callback, route, merchant, channel, order_id, decided, codes, answered, took_ms"
    place = ("order-rules", "swedish-orders-have-an-id", "fjallboden", "1", "order-1")
    assert writing.written(facts) == [
        (NOON, "late", *place, "reject", '["national-id-missing", "no-name"]', "approve", 2300),
        (NOON + 5, "shadow", *place, "approve", "[]", None, 4),
    ]
    assert writing.dropped == 0


def test_verdicts_are_written_until_the_end(writing: Writing) -> None:
    async def service() -> None:
        keeping = asyncio.create_task(writing.verdict_log.run())
        for number in range(3):
            writing.record(replace(LATE, order_id=f"order-{number}"))
            await until(lambda number=number: len(writing.written()) == number + 1)  # type: ignore[misc]
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        writing.record(replace(LATE, order_id="order-3"))
        await writing.verdict_log.flush()

    writing.ledger.do(service())

    assert writing.written() == ["order-0", "order-1", "order-2", "order-3"]


def test_gathered_verdicts_are_written_in_one_statement_up_to_a_limit(postgres_url: str) -> None:
    with opened(postgres_url) as ledger:
        writing = Writing(ledger)
        writing.record(*[LATE] * (2 * MAX_PER_STATEMENT + 1))
        writing.flush()

        transactions = ledger.rows("SELECT count(*) FROM verdicts GROUP BY xmin ORDER BY 1")
        assert transactions == [(1,), (MAX_PER_STATEMENT,), (MAX_PER_STATEMENT,)]


def test_verdicts_without_room_are_dropped_and_counted(writing: Writing) -> None:
    writing.record(*[LATE] * (MAX_WAITING + 3))

    assert writing.dropped == 3
    writing.flush()
    assert len(writing.written()) == MAX_WAITING
    writing.record(SHADOW)
    assert writing.dropped == 3


def test_verdicts_are_kept_while_the_store_is_unavailable(writing: Writing) -> None:
    ledger = writing.ledger
    ledger.rows("ALTER TABLE verdicts RENAME TO elsewhere")

    async def service() -> None:
        keeping = asyncio.create_task(writing.verdict_log.run())
        writing.record(LATE)
        await until(lambda: ledger.store.failing)
        ledger.rows("ALTER TABLE elsewhere RENAME TO verdicts")
        await until(lambda: bool(writing.written()))
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    ledger.do(service())

    assert (writing.written(), writing.dropped) == (["order-1"], 0)


def test_verdicts_that_cannot_be_written_at_the_end_are_counted(writing: Writing) -> None:
    writing.ledger.rows("ALTER TABLE verdicts RENAME TO elsewhere")
    writing.record(LATE, SHADOW)

    writing.flush()

    writing.ledger.rows("ALTER TABLE elsewhere RENAME TO verdicts")
    assert writing.dropped == 2
    writing.flush()
    assert writing.written() == []


def test_the_end_does_not_wait_long_for_a_writer_that_hangs(writing: Writing) -> None:
    let_go = threading.Event()

    async def shutdown() -> None:
        held = asyncio.create_task(writing.ledger.store.write(hold(let_go), None))
        writing.record(LATE)
        await writing.verdict_log.flush(within=timedelta(milliseconds=1))
        let_go.set()
        await held

    writing.ledger.do(shutdown())

    assert writing.dropped == 1


def test_a_verdict_that_cannot_be_stored_does_not_block_the_others(writing: Writing) -> None:
    writing.record(replace(LATE, order_id="order-\ud800"))
    writing.flush()
    writing.record(LATE)
    writing.flush()

    assert (writing.written(), writing.dropped) == (["order-1"], 1)


def test_codes_of_a_handler_are_stored_whatever_they_contain_and_cut(writing: Writing) -> None:
    writing.record(replace(LATE, codes=("nul\0", "half \ud800", "å" * 10_000, *map(str, range(100)))))
    writing.flush()

    (codes,) = map(json.loads, writing.written("codes"))
    assert codes[:4] == ["nul\0", "half \ud800", "å" * MAX_CODE_LENGTH, "0"]
    assert len(codes) == MAX_CODES


def test_a_shutdown_in_the_middle_of_a_group_neither_loses_nor_doubles_it(writing: Writing) -> None:
    let_go = threading.Event()

    async def service() -> None:
        held = asyncio.create_task(writing.ledger.store.write(hold(let_go), None))
        keeping = asyncio.create_task(writing.verdict_log.run())
        writing.record(LATE)
        await until(writing.verdict_log._writing.locked)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        let_go.set()
        await writing.verdict_log.flush()
        await held

    writing.ledger.do(service())

    assert (writing.written(), writing.dropped) == (["order-1"], 0)
