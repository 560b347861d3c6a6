"""A ledger of three queues that a test drives, on either database, with a clock that the test moves."""

import asyncio
import json
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import Connection

from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, Claimed, QueueKey, QueueLimits
from adapter.ledger.clock import Clock
from adapter.ledger.inbox import Inbox, Received, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.settlement import Broken, Ending, Handling, PausePolicy, Result
from adapter.ledger.store import Store
from adapter.plugin import Done, Misconfigured, Reject, Retry, Skip, Unknown
from tests.databases import open_migrated, rows

T = TypeVar("T")
NOON = 1_770_120_000_000
HOUR = 3_600_000
DAY = 24 * HOUR
DOUBT = 60_000
EXPORT = QueueKey("export", Channel("fjallboden", "1"))
HISTORY = QueueKey("history", Channel("fjallboden", "1"))
OTHER = QueueKey("export", Channel("annan", "1"))

POLICY = PausePolicy(after_failures=5, first=timedelta(seconds=30), longest=timedelta(minutes=10))
CANNOT_TELL = Handling(looks_up=False, repeatable=False)
LOOKS_UP = Handling(looks_up=True, repeatable=False)


@dataclass(frozen=True)
class Ends:
    """The end of an attempt. `due` is the time of the next one, or None if the schedule is used up."""

    result: Result
    reason: str = ""
    due: int | None = None
    handling: Handling = CANNOT_TELL


DELIVERED = Ends(Done(), "delivered")
SKIPPED = Ends(Skip("nothing-to-do"), "skipped")
REJECTED = Ends(Reject("no-such-shop"), "rejected")
EXHAUSTED = Ends(Retry("destination-busy"), "exhausted")
BROKEN = Ends(Broken("handler-failed"), "broken")
CONDITION = Ends(Ending.CONDITION, "condition")
MOVED_ON = Ends(Ending.MOVED_ON, "moved_on")
UNKNOWN = Ends(Unknown("connection-lost"), "unknown")
RELEASED = Ends(Ending.RELEASED)
NOT_THERE = Ends(Ending.NOT_THERE, due=0)
MISCONFIGURED = Ends(Misconfigured("destination-unauthorized"), due=0)
PAUSES = Ends(Retry("destination-busy", after=timedelta(minutes=1)), due=0)


def delivered(reference: str, **facts: Any) -> Ends:
    return Ends(Done(reference, facts), "delivered")


def waiting(due: int) -> Ends:
    return Ends(Retry("destination-busy"), due=due)


def in_doubt(due: int) -> Ends:
    return Ends(Unknown("connection-lost"), due=due, handling=LOOKS_UP)


class HandClock(Clock):
    """A clock that the test moves."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def read(self, connection: Connection, *, alone: bool = False) -> int:
        return self.now


class Ledger:
    """A ledger of three queues, for tests that are no coroutines.

    Args:
        url: Its database.
        clock: Its clock.
        loop: The loop that runs its coroutines.
        migrated: The tables are up to date, and the clock is a `HandClock`.
    """

    def __init__(self, url: str, clock: Any, loop: asyncio.Runner, *, migrated: bool = False) -> None:
        self.url, self.clock, self._loop = url, clock, loop
        self.store = open_migrated(url, clock) if migrated else Store.open(url, clock=clock)
        self.lease = Lease(self.store, version="test")
        self.do(self.lease.enter())
        self.inbox, self.lanes = Inbox(self.store), Lanes(self.store, self.lease, policy=POLICY)
        self.queues = self.do(self.lanes.open_queues([EXPORT, HISTORY, OTHER]))
        self.export, self.history, self.other = (self.queues[key] for key in (EXPORT, HISTORY, OTHER))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    def receive(self, receipt: ReceivedNotification) -> Received:
        return self.do(self.inbox.receive(receipt))

    def limits(self, *queues: int, concurrency: int = 100) -> list[QueueLimits]:
        return [
            QueueLimits(queue_id=each, concurrency=concurrency, doubt_ms=DOUBT, schedule=())
            for each in queues or (self.export,)
        ]

    def take(self, *queues: int, most: int = 100, concurrency: int = 100, idle: Sequence[int] = ()) -> Claimed:
        return self.do(self.lanes.claim(self.limits(*queues, concurrency=concurrency), most, idle=idle))

    def claim(self, *queues: int, most: int = 100) -> list[Claim]:
        return self.take(*queues, most=most).claims

    def claim_one(self, *queues: int) -> Claim:
        (claim,) = self.claim(*queues)
        return claim

    def next_due_at(self) -> int | None:
        return self.take(*self.queues.values(), most=0).next_due_at

    def settle(self, claim: Claim, ends: Ends = DELIVERED, **more: Any) -> bool:
        return self.do(self.settle_later(claim, ends, **more))

    async def settle_later(self, claim: Claim, ends: Ends = DELIVERED, **more: Any) -> bool:
        now = self.clock()
        record = AttemptRecord(
            claim=claim if ends.due is None else replace(claim, doubt_ends_at=now),
            result=ends.result,
            kind="deliver",
            handling=ends.handling,
            schedule=() if ends.due is None else [timedelta(milliseconds=max(ends.due - now, 0))] * 50,
            jitter=0,
            **{"refetch": True, **more},
        )
        return await self.lanes.settle(record) is not None

    def owed(self, *snapshots: int, refetch: bool = True, order_id: str = "order-1") -> None:
        """Receive a notification for each snapshot, in this order."""
        queue = self.export if refetch else self.history
        for snapshot in snapshots:
            self.receive(receipt(order_id, snapshot, wanted=[(queue, refetch)]))

    def states(self) -> list[tuple[int, str, str | None]]:
        """Return snapshot, state and reason of every delivery, in order of arrival."""
        return self.rows(
            "SELECT n.snapshot_at, d.state, d.reason FROM deliveries d JOIN notifications n ON n.id = d.notification_id"
            " ORDER BY d.id"
        )

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return rows(self.url, sql)

    def reopened(self) -> "Ledger":
        """Open the ledger as after a crash: nothing is settled, and the lease has ended."""
        self.store.close()
        rows(self.url, "UPDATE processes SET lease_until = 0")
        return Ledger(self.url, self.clock, self._loop, migrated=isinstance(self.clock, HandClock))


def body_of(order_id: str, snapshot: int, **members: Any) -> bytes:
    return json.dumps({"id": order_id, "total": 100.0, "snapshot": snapshot, **members}).encode()


def receipt(
    order_id: str = "order-1",
    snapshot: int | None = 1,
    *,
    wanted: Sequence[tuple[int, bool]] = (),
    refetching: Sequence[int] = (),
    shadows: Sequence[int] = (),
    body: bytes | None = None,
    identity: bytes | None = None,
    source: str = "callback",
    digest: bytes | None = None,
    reference: str | None = None,
) -> ReceivedNotification:
    in_shadow = [Wanted(queue_id=queue, refetch=True, shadow=True) for queue in shadows]
    return ReceivedNotification(
        identity=identity if identity is not None else f"{order_id}/{snapshot}/".encode(),  # none begins with another
        channel=Channel("fjallboden", "1"),
        callback="order-status",
        order_id=order_id,
        snapshot_at=snapshot,
        source=source,
        body=body if body is not None else body_of(order_id, snapshot or 0),
        digest=digest,
        reference=reference,
        wanted=(*(Wanted(queue_id=queue, refetch=refetch) for queue, refetch in wanted), *in_shadow),
        wanted_in_conflict=(*(Wanted(queue_id=queue, refetch=True) for queue in refetching), *in_shadow),
    )


@contextmanager
def opened(url: str) -> Iterator[Ledger]:
    with asyncio.Runner() as loop:
        ledger = Ledger(url, HandClock(), loop)
        try:
            yield ledger
        finally:
            ledger.store.close()


def make_verdicts(ledger: Ledger, number: int) -> None:
    """Insert a number of late verdicts of different orders, a second apart, the last one now."""
    ledger.rows(
        "INSERT INTO verdicts (at, kind, callback, route, merchant, channel, order_id, decided, codes, answered,"
        f" took_ms) WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {number})"
        f" SELECT {ledger.clock.now} - 1000 * ({number} - i), 'late', 'order-rules', 'limits', 'fjallboden', '1',"
        " 'order-' || i, 'approve', '[]', 'approve', 2000 FROM s"
    )
    ledger.rows("ANALYZE")


def make_many(ledger: Ledger, number: int, state: str = "done") -> None:
    """Insert a number of orders with one delivery each into the export queue."""
    if ledger.url.startswith("sqlite"):
        series = f"WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {number})"
    else:
        series = f"WITH s(i) AS (SELECT * FROM generate_series(1, {number}))"
    order = f"'{state}-' || i"
    identity = f"CAST({order} AS BLOB)" if ledger.url.startswith("sqlite") else f"convert_to({order}, 'UTF8')"
    due, claims = (NOON, 0) if state == "waiting" else ("NULL", 1)
    ended, reason = {
        "waiting": ("NULL", "NULL"), "done": (NOON, "'delivered'"), "dead": (NOON, "'rejected'"),
    }[state]  # fmt: skip
    for into in (
        "notifications (identity, merchant, channel, callback, order_id, snapshot_at, received_at, source)"
        f" {series} SELECT {identity}, 'fjallboden', '1', 'order-status', {order}, 1, {NOON}, 'callback' FROM s",
        "lanes (queue_id, order_id, claim, settled, next_at)"
        f" {series} SELECT {ledger.export}, {order}, {claims}, {claims}, {due} FROM s",
        "deliveries (notification_id, lane_id, position, state, reason, attempts, ended_at)"
        f" SELECT n.id, l.id, 0, '{state}', {reason}, {claims}, {ended} FROM notifications n"
        f" JOIN lanes l ON l.order_id = n.order_id AND l.queue_id = {ledger.export} WHERE n.order_id LIKE '{state}-%'"
        " ORDER BY n.id",
        "attempts (delivery_id, claim, kind, started_at, ended_at, outcome)"
        f" SELECT id, 1, 'deliver', {NOON}, {NOON}, 'done' FROM deliveries WHERE state = '{state}' AND attempts > 0",
    ):
        ledger.rows(f"INSERT INTO {into}")
        ledger.rows("ANALYZE")  # its statistics may be those of a former test
