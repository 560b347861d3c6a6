"""A dispatcher with a real ledger and real plugin loops, and a fake Norce."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx

from adapter.deliveries.attempt import Attempts, Queue
from adapter.deliveries.dispatcher import Dispatcher
from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, Claimed, QueueKey, QueueLimits
from adapter.ledger.inbox import Inbox, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.queries import Queries
from adapter.ledger.settlement import PausePolicy, Settlement
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Account, Norce
from adapter.outgoing import Outgoing
from adapter.plugin import NoSettings, NotificationHandler, Secret
from adapter.routing.routes import Callback, Route
from adapter.routing.runner import Runner
from tests import PATIENCE
from tests.databases import rows
from tests.ledgers import POLICY, HandClock

NOON = 1_770_120_000_000
CANARY = "19811218-9876"
SECOND = timedelta(seconds=1)
NORCE_TIMEOUT = 20 * SECOND
SHORTLY = SECOND  # long enough for a handler to begin
BEAT_MS = 20  # with the fixture `fast_heartbeat`
KEY = QueueKey("export", Channel("fjallboden", "1"))


class FakeNorce:
    """Answers with the prepared `answers` first, and then with its orders."""

    def __init__(self) -> None:
        self.orders: dict[str, dict[str, Any]] = {}
        self.answers: list[httpx.Response | Exception | Callable[[], Awaitable[None]]] = []
        self.asked: list[str] = []
        self.refuses: set[str] = set()  # merchants whose token is refused

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        order_id = request.url.path.rpartition("/")[2]
        self.asked.append(order_id)
        answer = self.answers.pop(0) if self.answers else None
        if request.url.path.split("/")[1] in self.refuses:
            return httpx.Response(401)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        if answer is not None:
            await answer()
        return httpx.Response(200, json=self.orders[order_id])


class WatchedLanes(Lanes):
    """Lanes that report what was claimed, settled and released, and can delay a claim or fail."""

    def __init__(self, store: Store, lease: Lease, *, policy: PausePolicy) -> None:
        super().__init__(store, lease, policy=policy)
        self.claimed: asyncio.Queue[list[Claim]] = asyncio.Queue()
        self.settled: asyncio.Queue[tuple[AttemptRecord, Settlement | None]] = asyncio.Queue()
        self.released: asyncio.Queue[Claim] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.claims = 0
        self.failures = {"claim": 0, "settle": 0}
        self.mistakes: set[str] = set()  # orders on which settling meets a bug of ours
        self.left_open = {"claim": 0, "settle": 0}  # commits whose answer gets lost
        self.keep_back: asyncio.Event | None = None
        self.after_claim: Callable[[], None] = lambda: None

    async def claim(self, asks: Sequence[QueueLimits], most: int, *, idle: Container[int] = frozenset()) -> Claimed:
        self._fail("claim")
        taken = await super().claim(asks, most, idle=idle)
        if taken.claims:
            self._lose("claim")
        self.claims += len(taken.claims)
        self.claimed.put_nowait(taken.claims)
        self.after_claim()
        if self.keep_back is not None and taken.claims:
            await self.keep_back.wait()
        return taken

    async def settle(self, record: AttemptRecord) -> Settlement | None:
        self._fail("settle")
        if record.claim.order_id in self.mistakes:
            raise ZeroDivisionError
        settlement = await super().settle(record)
        self._lose("settle")
        self.settled.put_nowait((record, settlement))
        return settlement

    async def release(self, claim: Claim) -> None:
        await super().release(claim)
        self.released.put_nowait(claim)

    def _fail(self, what: str) -> None:
        if self.failures[what]:
            self.failures[what] -= 1
            raise StoreUnavailable("the disk is full")

    def _lose(self, what: str) -> None:
        if self.left_open[what]:
            self.left_open[what] -= 1
            self.lost.put_nowait(what)
            raise StoreUnavailable("the connection broke at the commit")


class WatchedLease(Lease):
    """A lease that reports when it was entered and renewed, and can fail."""

    def __init__(self, store: Store, *, version: str) -> None:
        super().__init__(store, version=version)
        self.renewed: asyncio.Queue[bool | StoreUnavailable] = asyncio.Queue()
        self.entered: asyncio.Queue[int] = asyncio.Queue()
        self.failing = False

    async def enter(self) -> None:
        await super().enter()
        self.entered.put_nowait(self.process_id)

    async def renew(self) -> bool:
        if self.failing:
            error = StoreUnavailable("the disk is full")
            self.renewed.put_nowait(error)
            raise error
        renewed = await super().renew()
        self.renewed.put_nowait(renewed)
        return renewed

    async def two_beats(self) -> None:
        """Wait for two renewals that begin after this call."""
        while not self.renewed.empty():
            self.renewed.get_nowait()
        for _ in range(3):  # the first may have been under way
            await asyncio.wait_for(self.renewed.get(), PATIENCE)


@dataclass
class Work:
    """A running dispatcher. `queue_ids` are by route and merchant."""

    url: str
    store: Store
    lease: WatchedLease
    lanes: WatchedLanes
    norce: FakeNorce
    clock: HandClock
    runner: Runner
    dispatcher: Dispatcher
    metrics: Metrics
    queue_ids: dict[tuple[str, str], int]

    async def owe(
        self,
        order_id: str = "order-1",
        snapshot: int = 1,
        *,
        route: str = "export",
        merchant: str = "fjallboden",
        **now: Any,
    ) -> None:
        """Store a notification of an order. `now` are members that the order has when it is read again."""
        order = {"id": order_id, "merchant": merchant, "channel": "1", "state": {"currentStatus": "completed"}}
        self.norce.orders[order_id] = {**order, **now}
        await Inbox(self.store).receive(
            ReceivedNotification(
                identity=f"{order_id}/{snapshot}/{route}/{merchant}".encode(),
                channel=Channel(merchant, "1"),
                callback="order-status",
                order_id=order_id,
                snapshot_at=snapshot,
                source="callback",
                body=json.dumps(order).encode(),
                wanted=(Wanted(queue_id=self.queue_ids[route, merchant], refetch=True),),
            )
        )
        self.dispatcher.wake()

    async def settled(self) -> dict[str, Any]:
        """Return the next delivery that is settled, as `deliveries show` prints it."""
        record, _ = await asyncio.wait_for(self.lanes.settled.get(), PATIENCE)
        return self.shown(record.claim.delivery_id)

    def shown(self, delivery_id: int = 1) -> dict[str, Any]:
        with self.store.read_connection() as connection:
            shown = Queries(connection).delivery(delivery_id)
        assert shown is not None
        return shown

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return rows(self.url, sql)

    def pauses(self) -> dict[tuple[str, str, str], str]:
        with self.store.read_connection() as connection:
            return dict(Queries(connection).overview(self.clock.now).paused)

    def move_to(self, moment: str | int) -> None:
        """Set the clock and wake the dispatcher."""
        if isinstance(moment, str):
            moment = int(datetime.fromisoformat(moment).timestamp() * 1000)
        self.clock.now = moment
        self.dispatcher.wake()

    async def a_turn(self) -> list[Claim]:
        """Return the claims of a turn that begins after this call."""
        for _ in range(2):  # the first may have been under way
            while not self.lanes.claimed.empty():
                self.lanes.claimed.get_nowait()
            self.dispatcher.wake()
            claims = await asyncio.wait_for(self.lanes.claimed.get(), PATIENCE)
        return claims

    async def quiet(self) -> None:
        """Wait until no attempt runs and no delivery is due."""
        while True:
            idle, claims = not self.dispatcher.running, self.lanes.claims
            await self.a_turn()
            if idle and self.lanes.claims == claims:
                return

    def paused_until(self) -> int:
        ((moment,),) = self.rows("SELECT paused_until FROM queues")
        return int(moment)

    def states(self, merchant: str = "fjallboden") -> Counter[tuple[str, str | None]]:
        with self.store.read_connection() as connection:
            shown = Queries(connection).deliveries()
        return Counter((row["state"], row["reason"]) for row in shown if row["merchant"] == merchant)


def route(handler: NotificationHandler[Any], **more: Any) -> Route:
    given: dict[str, Any] = {
        "name": "export",
        "callback": Callback(name="order-status", kind="notification"),
        "when": (),
        "handler_name": "shop",
        "handler": handler,
        "settings": {("fjallboden", "1"): NoSettings(), ("annan", "1"): NoSettings()},
        "refetch": True,
        "no_answer": None,
        "timeout": 30 * SECOND,
        "schedule": (5 * SECOND, 60 * SECOND, 300 * SECOND),
        "concurrency": 4,
    }
    return Route(**{**given, **more})


@asynccontextmanager
async def working(
    url: str,
    *routes: Route,
    merchants: Sequence[str] = ("fjallboden",),
    slots: int = 8,
    policy: PausePolicy = POLICY,
    patience: timedelta = timedelta(seconds=PATIENCE),
    before: Callable[[Store, int], Awaitable[None]] | None = None,
    destination: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Work]:
    """Run a dispatcher on an empty database. `before` is called before its process starts."""
    clock, fake, metrics = HandClock(), FakeNorce(), Metrics("test")
    store = Store.open(url, clock=clock)

    def norce() -> Norce:
        accounts = {
            merchant: Account(base_url=f"https://norce.example/{merchant}", tokens=(Secret("token"),))
            for merchant in merchants
        }
        return Norce(accounts, adapter_id="test", timeout=NORCE_TIMEOUT, transport=httpx.MockTransport(fake))

    lease = WatchedLease(store, version="test")
    lanes = WatchedLanes(store, lease, policy=policy)
    of_route = {each.name: each for each in routes}
    ids = await lanes.open_queues([QueueKey(name, Channel(m, "1")) for name in of_route for m in merchants])
    if before is not None:
        await before(store, ids[KEY])
    await lease.enter()
    runner = Runner(
        make_norce=norce,
        make_outgoing=lambda: Outgoing(destination),
        clock=lambda: to_datetime(clock.now),
        patience=patience,
        replaced=lambda *which: metrics.plugin_loops_replaced.labels(*which).inc(),
    )
    our_norce = norce()
    dispatcher = Dispatcher(
        {id_: Queue(route=of_route[key.route], channel=key.channel)
         for key, id_ in ids.items()},
        lanes=lanes, lease=lease, attempts=Attempts(runner=runner, norce=our_norce, clock=clock),
        before_handler=NORCE_TIMEOUT, metrics=metrics, clock=clock, slots=slots, random=lambda: 0.0,
        shared=store.shared,
    )  # fmt: skip
    run = asyncio.create_task(dispatcher.run())
    queue_ids = {(key.route, key.channel.merchant): id_ for key, id_ in ids.items()}
    try:
        yield Work(url, store, lease, lanes, fake, clock, runner, dispatcher, metrics, queue_ids)
    finally:
        await dispatcher.stop(timedelta(0))
        await run
        await runner.stop(timedelta(seconds=PATIENCE))
        await our_norce.aclose()
        store.close()
