"""The verdict log: refusals and patches that were answered, and verdicts without effect.

A verdict has no effect if it was late or if its route is a shadow. Plain approvals are not recorded. Verdicts are
written in the background and never delay an answer. Unlike a notification, a verdict may be lost: the log gathers them
in memory and writes them in groups, and drops and counts them if the ledger is unavailable for long. A connection that
breaks at a commit may leave a group in the log twice.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from datetime import timedelta

import msgspec
import structlog
from sqlalchemy import Connection

from adapter.identifiers import Channel
from adapter.ledger.schema import verdicts
from adapter.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)

MAX_WAITING = 4_000
MAX_PER_STATEMENT = 500  # the inbox waits for no more than these
GATHER_FOR = timedelta(seconds=1)
FLUSH_WITHIN = timedelta(seconds=2)
MAX_CODES = 20
MAX_CODE_LENGTH = 200
COLUMNS = [column.name for column in verdicts.c if column.name != "id"]


class LoggedVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict of one route on one callback, without values from the order."""

    kind: str  # answer (it is part of the answer), late or shadow
    callback: str
    route: str
    channel: Channel
    order_id: str
    decided: str  # approve, reject, accept, patch, refuse or failed
    codes: tuple[str, ...]  # of its problems or refusal, the pointers that it patches, or the reason why it failed
    answered: str | None  # in its place: approve or reject (its `no_answer`), or busy (503); None if it counted
    took_ms: int


class VerdictLog:
    """Writes verdicts to the ledger in the background.

    Call `record()` for each verdict, keep `run()` running, and call `flush()` on shutdown.

    Args:
        store: The ledger.
        dropped: Called with the number of verdicts that were not written.
        gather_for: Time from the first verdict of a group until the group is written.
    """

    def __init__(self, store: Store, *, dropped: Callable[[int], None], gather_for: timedelta = GATHER_FOR) -> None:
        self._store = store
        self._clock = store.clock
        self._dropped = dropped
        self._gather_for = gather_for
        self._waiting: list[tuple[int, LoggedVerdict]] = []
        self._has_work = asyncio.Event()
        self._writing = asyncio.Lock()
        self._insert_verdicts = store.database.inserter(verdicts, COLUMNS)

    def record(self, verdict: LoggedVerdict) -> None:
        """Queue a verdict, or drop it if there is no room. Call this on the event loop."""
        if len(self._waiting) >= MAX_WAITING:
            self._dropped(1)
            return
        self._waiting.append((self._clock(), verdict))
        self._has_work.set()

    async def run(self) -> None:
        """Write groups until cancelled. If the store is unavailable, they wait in memory."""
        while True:
            await self._has_work.wait()
            await asyncio.sleep(self._gather_for.total_seconds())
            self._has_work.clear()
            await asyncio.shield(self._write_waiting())  # a cancelled write would be done twice, or not at all
            if self._waiting:
                self._has_work.set()

    async def flush(self, within: timedelta = FLUSH_WITHIN) -> None:
        """Write the rest after `run` was cancelled, and drop what cannot be written in this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within.total_seconds()):
                await self._write_waiting()
        if self._waiting:
            log.warning("verdicts_lost", count=len(self._waiting))
            self._drop(len(self._waiting))

    async def _write_waiting(self) -> None:
        async with self._writing:
            while group := self._waiting[:MAX_PER_STATEMENT]:
                try:
                    await self._store.run(self._insert, [_row(at, verdict) for at, verdict in group])
                except StoreUnavailable:  # logged by the store
                    return
                except Exception as error:  # one of them cannot be stored, and would block all later ones
                    log.error("verdicts_unwritable", count=len(group), exc_info=error)
                    self._drop(len(group))
                else:
                    del self._waiting[: len(group)]

    def _drop(self, number: int) -> None:
        del self._waiting[:number]
        self._dropped(number)

    def _insert(self, connection: Connection, rows: list[tuple[int | str | None, ...]]) -> None:
        self._insert_verdicts(connection.connection.cursor(), rows)


def _row(at: int, verdict: LoggedVerdict) -> tuple[int | str | None, ...]:
    # Codes are texts of a handler. Escaped as JSON and cut, they fit into any database.
    codes = json.dumps([code[:MAX_CODE_LENGTH] for code in verdict.codes[:MAX_CODES]])
    # The columns of the table after its key, in their order.
    return (
        at,
        verdict.kind,
        verdict.callback,
        verdict.route,
        *verdict.channel,
        verdict.order_id,
        verdict.decided,
        codes,
        verdict.answered,
        verdict.took_ms,
    )
