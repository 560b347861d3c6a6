"""
What routes decided that counted for nothing: too late, or in the shadow. Written down for
people, beside the answers and never in their way.

Nothing of it is promised as a notification is: it gathers in memory, goes to the disk in groups, and is dropped and
counted where the ledger cannot be written for long. A connection that breaks at the commit may leave a group twice.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import structlog
from sqlalchemy import Connection

from adapter.identifiers import Channel
from adapter.ledger.schema import verdicts
from adapter.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)

MOST_WAITING = 4_000
MOST_A_STATEMENT = 500  # the intake waits for no more than these
GATHERED_FOR = timedelta(seconds=1)
LAST_WORDS = timedelta(seconds=2)
MOST_CODES = 20
LONGEST_CODE = 200
COLUMNS = [column.name for column in verdicts.c if column.name != "id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedVerdict:
    """What one route decided about one callback. Codes and places only, never a value of the order's."""

    kind: str  # late or shadow
    callback: str
    route: str
    channel: Channel
    order_id: str
    decided: str  # approve, reject, accept, patch, refuse or failed
    codes: tuple[str, ...]  # of its problems or its refusal, or the pointers that it patches
    answered: str | None  # what counted in its stead: approve or reject; None for a shadow
    took_ms: int  # until it was known


class VerdictLog:
    """
    Where that is written down: `record` it, while `keep` runs, and `flush` at the end.

    `dropped` hears how many were not written, and `gathered_for` is how long the first of a group waits for more.
    """

    def __init__(self, store: Store, *, dropped: Callable[[int], None], gathered_for: timedelta = GATHERED_FOR) -> None:
        self._store = store
        self._clock = store.clock
        self._dropped = dropped
        self._gathered_for = gathered_for
        self._waiting: list[tuple[int, LoggedVerdict]] = []
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._add = store.database.inserter(verdicts, COLUMNS)

    def record(self, logged: LoggedVerdict) -> None:
        """Takes it and returns at once; what there is no room for is dropped. To be called on the event loop."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped(1)
            return
        self._waiting.append((self._clock(), logged))
        self._news.set()

    async def keep(self) -> None:
        """Writes what gathers, until cancelled. While the store is away it stays in memory, as far as there is room."""
        while True:
            await self._news.wait()
            await asyncio.sleep(self._gathered_for.total_seconds())
            self._news.clear()
            await asyncio.shield(self._write())  # cancelled halfway, it would be written twice, or not at all
            if self._waiting:
                self._news.set()

    async def flush(self, within: timedelta = LAST_WORDS) -> None:
        """Writes what is left, when `keep` has been cancelled. What cannot be written now is gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within.total_seconds()):
                await self._write()
        if self._waiting:
            log.warning("verdicts_lost", count=len(self._waiting))
            self._drop(len(self._waiting))

    async def _write(self) -> None:
        async with self._writing:
            while some := self._waiting[:MOST_A_STATEMENT]:
                try:
                    await self._store.write(self._insert, some)
                except StoreUnavailable:  # the store has said so itself
                    return
                except Exception as error:  # it is in one of them, and would be in the way of all that follow
                    log.error("verdicts_unwritable", count=len(some), exc_info=error)
                    self._drop(len(some))
                else:
                    del self._waiting[: len(some)]

    def _drop(self, number: int) -> None:
        del self._waiting[:number]
        self._dropped(number)

    # --- in the writer's thread, inside its transaction ---

    def _insert(self, connection: Connection, items: Sequence[Sequence[tuple[int, LoggedVerdict]]]) -> list[None]:
        rows = [_row(at, logged) for some in items for at, logged in some]
        self._add(connection.connection.cursor(), rows)
        return [None for _ in items]


def _row(at: int, logged: LoggedVerdict) -> tuple[int | str | None, ...]:
    # Only the codes are a handler's own words: escaped and cut off, a database takes them whatever they are.
    codes = json.dumps([code[:LONGEST_CODE] for code in logged.codes[:MOST_CODES]])
    merchant, channel = logged.channel
    facts = asdict(logged) | {"at": at, "merchant": merchant, "channel": channel, "codes": codes}
    return tuple(facts[name] for name in COLUMNS)
