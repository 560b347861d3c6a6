"""The memory of calls: how often each callback, channel and URL key was used on each day.

Before a person removes a name, the counts show whether open orders still carry it. Calls are counted in memory and
written in groups in the background, so that no request waits. If the ledger is unavailable, the counts wait. A process
that is killed loses those of its last seconds, and a connection that breaks at a commit may leave a group counted
twice.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import structlog
from sqlalchemy import Connection, case, func, select

from adapter.identifiers import Channel
from adapter.ledger.schema import uses
from adapter.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)

DAY_MS = 86_400_000
RECENT_DAYS = 7
MOST_DIFFERENT = 10_000  # combinations of names that wait to be written; calls of further ones are not counted
GATHER_FOR = timedelta(seconds=5)
FLUSH_WITHIN = timedelta(seconds=2)
COLUMNS = [column.name for column in uses.c]
ADD = (
    "ON CONFLICT (day, callback, merchant, channel, key) DO UPDATE SET calls = uses.calls + excluded.calls,"
    " last_at = CASE WHEN excluded.last_at > uses.last_at THEN excluded.last_at ELSE uses.last_at END"
)


class UsedNames(NamedTuple):
    """The names that a call used, and its day. The key is empty without a signature."""

    day: int
    callback: str
    merchant: str
    channel: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentUse:
    """The calls with the same names in the last `RECENT_DAYS`."""

    callback: str
    channel: Channel
    key: str
    calls: int
    today: int
    last_at: int  # in milliseconds


class Uses:
    """Counts calls in the background.

    Call `record()` for each call, keep `run()` running, and call `flush()` on shutdown.
    """

    def __init__(self, store: Store, *, gather_for: timedelta = GATHER_FOR) -> None:
        self._store = store
        self._clock = store.clock
        self._gather_for = gather_for
        self._counted: dict[UsedNames, tuple[int, int]] = {}  # the calls, and the moment of the last one
        self._writing = asyncio.Lock()
        self._add = store.database.inserter(uses, COLUMNS, ADD)

    def record(self, callback: str, channel: Channel, key: str) -> None:
        """Count a call. Call this on the event loop."""
        now = self._clock()
        self._add_up(UsedNames(now // DAY_MS, callback, *channel, key), 1, now)

    def _add_up(self, names: UsedNames, calls: int, last_at: int) -> None:
        before, at = self._counted.get(names, (0, 0))
        if before or len(self._counted) < MOST_DIFFERENT:
            self._counted[names] = before + calls, max(last_at, at)

    async def run(self) -> None:
        """Write the counts regularly until cancelled."""
        while True:
            await asyncio.sleep(self._gather_for.total_seconds())
            await asyncio.shield(self._write())  # a cancelled write would be done twice, or not at all

    async def flush(self, within: timedelta = FLUSH_WITHIN) -> None:
        """Write the rest after `run` was cancelled, as far as this time allows."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within.total_seconds()):
                await self._write()

    async def _write(self) -> None:
        async with self._writing:
            if not self._counted:
                return
            counted, self._counted = self._counted, {}
            # Sorted: nodes that write at once lock in one order.
            rows = sorted((*names, *count) for names, count in counted.items())
            try:
                await self._store.run(lambda connection: self._add(connection.connection.cursor(), rows))
            except StoreUnavailable:  # logged by the store
                for names, (calls, last_at) in counted.items():
                    self._add_up(names, calls, last_at)
            except Exception as error:  # one of them cannot be stored, and would block all later ones
                log.error("uses_unwritable", count=len(rows), exc_info=error)


def recent_uses(connection: Connection, now: int) -> list[RecentUse]:
    """Return the uses of the last days. `now` is the ledger's clock."""
    u, today = uses.c, now // DAY_MS
    of_today = func.sum(case((u.day >= today, u.calls), else_=0))
    names = (u.callback, u.merchant, u.channel, u.key)
    recent = select(*names, func.sum(u.calls).label("calls"), of_today.label("today"), func.max(u.last_at).label("at"))
    rows = connection.execute(recent.where(u.day > today - RECENT_DAYS).group_by(*names).order_by(*names))
    return [
        RecentUse(
            callback=row.callback,
            channel=Channel(row.merchant, row.channel),
            key=row.key,
            calls=int(row.calls),  # PostgreSQL adds up to a decimal number
            today=int(row.today),
            last_at=row.at,
        )
        for row in rows
    ]
