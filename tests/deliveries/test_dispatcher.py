"""`adapter.deliveries.dispatcher` with a real ledger and real plugin loops, and a fake Norce."""

import asyncio
import io
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import Connection

from adapter import logs
from adapter.conditions import Condition
from adapter.deliveries import dispatcher as dispatcher_module
from adapter.deliveries.attempt import Attempts, Queue
from adapter.deliveries.dispatcher import SLACK, Dispatcher
from adapter.identifiers import Channel
from adapter.ledger.claims import AttemptRecord, Claim, Claimed, QueueKey, QueueLimits
from adapter.ledger.inbox import Inbox, ReceivedNotification, Wanted
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import LEASE_MS, Lease
from adapter.ledger.queries import Queries
from adapter.ledger.retry import DeadLetter, retry_dead_letters
from adapter.ledger.settlement import PausePolicy, Reason, Settlement
from adapter.ledger.store import Store, StoreUnavailable
from adapter.metrics import Metrics
from adapter.moments import to_datetime
from adapter.norce.client import Account, Norce
from adapter.plugin import (
    Context,
    Done,
    Misconfigured,
    NoSettings,
    Notification,
    NotificationHandler,
    Outcome,
    Reject,
    Retry,
    Secret,
    Skip,
    Unknown,
)
from adapter.routing.routes import Callback, Route
from adapter.routing.runner import Runner
from tests import PATIENCE
from tests.asynchronous import asynchronous
from tests.databases import rows
from tests.deliveries.handlers import Blocks, LooksUp, Plain, Repeatable, Step, wait_forever
from tests.ledgers import HandClock

NOON = 1_770_120_000_000
CANARY = "19811218-9876"
SECOND = timedelta(seconds=1)
NORCE_TIMEOUT = 20 * SECOND
SHORTLY = SECOND  # long enough for a handler to begin
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

    async def claim(self, asks: Sequence[QueueLimits], most: int) -> Claimed:
        self._fail("claim")
        taken = await super().claim(asks, most)
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
        "when": None,
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
    policy: PausePolicy = PausePolicy(),  # noqa: B008 - a value
    patience: timedelta = timedelta(seconds=PATIENCE),
    before: Callable[[Store, int], Awaitable[None]] | None = None,
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


@pytest.fixture(autouse=True)
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The log lines as they leave the process."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


# --- outcomes become rows -------------------------------------------------------------------------------------------


class OwnOutcome(Outcome):
    """An outcome of a plugin's own, which is a bug."""


@pytest.mark.parametrize(
    ("step", "handler", "expected"),
    [
        pytest.param(Done("shop-7"), Plain, ("done", "delivered", False, None, "shop-7"), id="done"),
        pytest.param(
            Skip("nothing-changed"), Plain, ("done", "skipped", False, "nothing-changed", None), id="skip"
        ),
        pytest.param(Retry("busy"), Plain, ("waiting", None, False, "busy", None), id="retry"),
        pytest.param(Reject("no-shop"), Plain, ("dead", "rejected", False, "no-shop", None), id="reject"),
        pytest.param(Unknown("no-answer"), Plain, ("dead", "unknown", True, "no-answer", None), id="unknown"),
        pytest.param(
            Unknown("no-answer"), LooksUp, ("waiting", None, True, "no-answer", None), id="unknown, looks up"
        ),
        pytest.param(
            Unknown("no-answer"), Repeatable, ("waiting", None, False, "no-answer", None), id="unknown, repeatable"
        ),
        pytest.param(
            Misconfigured("unauthorized"), Plain, ("waiting", None, False, "unauthorized", None), id="misconfigured"
        ),
        pytest.param(
            RuntimeError("bug"), LooksUp, ("waiting", None, True, "handler-failed", None), id="bug, looks up"
        ),
        pytest.param(RuntimeError("bug"), Plain, ("dead", "unknown", True, "handler-failed", None), id="bug"),
        pytest.param(None, Plain, ("dead", "unknown", True, "handler-failed", None), id="returns nothing"),
        pytest.param(OwnOutcome("mine"), Plain, ("dead", "unknown", True, "handler-failed", None), id="own outcome"),
        pytest.param(
            SystemExit(1), LooksUp, ("waiting", None, True, "handler-failed", None), id="tries to end the process"
        ),
    ],
)  # fmt: skip
@asynchronous
async def test_each_outcome_becomes_a_row(
    store_url: str, step: Step, handler: type[Plain], expected: tuple[Any, ...]
) -> None:
    async with working(store_url, route(handler(step))) as work:
        await work.owe()

        row = await work.settled()

        assert tuple(row[name] for name in ("state", "reason", "in_doubt", "code", "reference")) == expected


@asynchronous
async def test_a_handler_gets_the_current_and_the_received_order(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        await work.owe(currency="SEK")
        await work.settled()

        ((notification, context),) = handler.seen
        assert (notification.order.currency, notification.received.currency) == ("SEK", None)
        assert notification.raw == notification.received.raw
        assert (notification.merchant, notification.channel, notification.callback) == (
            "fjallboden", "1", "order-status",
        )  # fmt: skip
        assert (context.attempt, context.route, context.previous) == (1, "export", None)
        assert context.deadline == to_datetime(work.clock.now) + 30 * SECOND


@asynchronous
async def test_a_route_without_refetch_acts_on_the_received_order(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler, refetch=False)) as work:
        await work.owe(currency="SEK")
        await work.settled()

        assert handler.seen[0][0].order.currency is None
        assert work.norce.asked == []


@asynchronous
async def test_a_retry_is_due_on_time_with_the_same_key_and_the_next_number(store_url: str) -> None:
    handler = Plain(Retry("busy", after=90 * SECOND), Done())
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        assert row["next_at"] == "2026-02-03T12:01:30.000Z"

        work.move_to(NOON + 89_999)
        assert await work.a_turn() == []
        work.move_to(NOON + 90_000)
        row = await work.settled()

        assert (row["state"], row["tries"]) == ("done", 2)
        first, second = (context for _, context in handler.seen)
        assert (first.attempt, second.attempt) == (1, 2)
        assert first.first_attempt_at == second.first_attempt_at
        assert first.key() == second.key()


@asynchronous
async def test_a_delivery_is_dead_when_its_schedule_is_used_up(store_url: str) -> None:
    handler = Plain(*(Retry("busy") for _ in range(10)))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        while row["state"] == "waiting":
            work.move_to(row["next_at"])
            row = await work.settled()

        assert (row["state"], row["reason"], row["tries"]) == ("dead", "exhausted", 4)


@asynchronous
async def test_the_next_delivery_of_a_lane_gets_its_last_done(store_url: str) -> None:
    handler = Plain(Done("shop-7", {"digest": "abc"}))
    async with working(store_url, route(handler)) as work:
        await work.owe(snapshot=1)
        await work.settled()
        await work.owe(snapshot=2)
        await work.settled()

        previous = handler.seen[1][1].previous
        assert previous is not None
        assert (previous.reference, previous.facts) == ("shop-7", {"digest": "abc"})


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(Done("shop-7", {"amount": Decimal("1.50")}), id="facts that are no JSON"),  # type: ignore[dict-item]
        pytest.param(Done({"id": 7}), id="a reference that is no text"),  # type: ignore[arg-type]
        pytest.param(Done("\ud800"), id="a text that is no Unicode"),
    ],
)
@asynchronous
async def test_a_done_that_cannot_be_stored_is_done_without_its_texts(store_url: str, said: Done) -> None:
    async with working(store_url, route(Plain(said))) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["reason"], row["reference"]) == ("done", "delivered", None)
        assert not work.store.failing


@asynchronous
async def test_an_exception_is_logged_once_with_its_frames_and_without_its_message(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    async def bug(_notification: Notification, _context: Context[NoSettings]) -> Done:
        number = CANARY
        raise RuntimeError(f"cannot parse {number}")

    async with working(store_url, route(LooksUp(bug))) as work:
        await work.owe(customer={"billing": {"nationalIdentificationNumber": CANARY}})
        row = await work.settled()

    failed = [line for line in lines() if line["event"] == "handler_failed"]
    assert len(failed) == 1
    assert failed[0]["exception"][0]["type"] == "builtins.RuntimeError"
    assert any(" in bug" in frame for frame in failed[0]["exception"][0]["frames"])
    assert CANARY not in json.dumps(lines())
    assert CANARY not in json.dumps(row)


@asynchronous
async def test_every_attempt_is_logged_and_counted_once(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    async with working(store_url, route(Plain(Retry("busy"), Done("shop-7")))) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()

    told = [(line["event"], line["attempt"]) for line in lines() if line["event"].startswith("delivery_")]
    assert told == [("delivery_retried", 1), ("delivery_done", 2)]
    counted = {
        outcome: work.metrics.registry.get_sample_value(
            "norce_adapter_delivery_attempts_total", {"route": "export", "outcome": outcome}
        )
        for outcome in ("retry", "done")
    }
    assert counted == {"retry": 1, "done": 1}


@asynchronous
async def test_a_delivery_that_becomes_due_right_after_a_claim_is_claimed_at_once(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "POLL", timedelta(hours=1))

    async with working(store_url, route(Plain(Retry("busy"), Done("shop-7")))) as work:
        await work.owe()
        due = int(datetime.fromisoformat((await work.settled())["next_at"]).timestamp() * 1000)

        def later() -> None:
            work.clock.now = max(work.clock.now, due)

        work.lanes.after_claim = later  # the next claim finds nothing, and the delivery becomes due
        work.dispatcher.wake()

        row = await work.settled()  # long before the next poll
        assert row["state"] == "done"


class Busier(Retry):
    """A subclass of an outcome in a plugin."""


@asynchronous
async def test_a_subclass_of_an_outcome_is_counted_under_the_name_of_its_base(store_url: str) -> None:
    async with working(store_url, route(Plain(Busier("busy")))) as work:
        await work.owe()

        row = await work.settled()

        assert [attempt["outcome"] for attempt in row["attempts"]] == ["retry"]


# --- doubt ----------------------------------------------------------------------------------------------------------


@asynchronous
async def test_a_lane_in_doubt_is_looked_up_before_anything_is_sent_again(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), None, Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()
        row = await work.settled()

        assert handler.calls == ["deliver", "lookup", "deliver"]
        assert (row["state"], row["reason"]) == ("done", "delivered")
        assert [each["outcome"] for each in row["attempts"]] == ["unknown", "not_there", "done"]


@asynchronous
async def test_an_order_that_a_lookup_finds_is_not_sent_again(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        row = await work.settled()

        assert handler.calls == ["deliver", "lookup"]
        assert (row["state"], row["in_doubt"], row["reference"]) == ("done", False, "shop-7")


@asynchronous
async def test_a_lookup_waits_until_the_deadline_of_the_attempt_in_doubt(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done())
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await work.settled()
        doubt_ends = NOON + int((30 * SECOND + NORCE_TIMEOUT + SLACK).total_seconds() * 1000)

        work.move_to(doubt_ends - 1)
        assert await work.a_turn() == []
        assert handler.calls == ["deliver"]
        work.move_to(doubt_ends)
        await work.settled()

        assert handler.calls == ["deliver", "lookup"]


@pytest.mark.parametrize("step", [Reject("refused"), Retry("busy"), Unknown("no-answer"), RuntimeError()], ids=repr)
@asynchronous
async def test_a_lookup_that_fails_leaves_the_doubt(store_url: str, step: Exception) -> None:
    async with working(store_url, route(LooksUp(Unknown("no-answer"), step))) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])

        row = await work.settled()

        assert (row["state"], row["in_doubt"]) == ("waiting", True)


async def died_in_hand(store: Store, queue_id: int) -> None:
    """A process claimed the delivery and died. Its doubt has ended."""
    await Inbox(store).receive(
        ReceivedNotification(
            identity=b"in-hand", channel=Channel("fjallboden", "1"), callback="order-status", order_id="order-1",
            snapshot_at=1, source="callback", body=b'{"id": "order-1"}',
            wanted=(Wanted(queue_id=queue_id, refetch=True),),
        )
    )  # fmt: skip
    lease = Lease(store, version="test")
    await lease.enter()
    ask = QueueLimits(queue_id=queue_id, concurrency=1, doubt_ms=LEASE_MS + 1)
    taken = await Lanes(store, lease, policy=PausePolicy()).claim([ask], 1)
    assert isinstance(store.clock, HandClock)
    store.clock.now = taken.claims[0].doubt_ends_at


@pytest.mark.parametrize(
    ("handler", "calls", "expected"),
    [
        pytest.param(LooksUp, ["lookup"], ("done", "delivered"), id="looked up"),
        pytest.param(Repeatable, ["deliver"], ("done", "delivered"), id="repeated"),
        pytest.param(Plain, [], ("dead", "unknown"), id="for a person"),
    ],
)
@asynchronous
async def test_after_a_crash_nothing_is_sent_without_a_lookup(
    store_url: str, handler: type[Plain], calls: list[str], expected: tuple[str, str]
) -> None:
    shop = handler()
    async with working(store_url, route(shop, refetch=False), before=died_in_hand) as work:
        row = await work.settled()

        assert shop.calls == calls
        assert (row["state"], row["reason"]) == expected


@asynchronous
async def test_a_repeatable_handler_gets_the_same_key_again(store_url: str) -> None:
    shop = Repeatable(Unknown("no-answer"), Done())
    async with working(store_url, route(shop)) as work:
        await work.owe()
        work.move_to((await work.settled())["next_at"])
        await work.settled()

        first, second = (context.key("order") for _, context in shop.seen)
        assert first == second


# --- the order as norce has it now ----------------------------------------------------------------------------------

COMPLETED = Condition("/state/currentStatus", {"const": "completed"}).compile()


@asynchronous
async def test_an_order_that_no_longer_meets_the_condition_has_moved_on(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler, when=COMPLETED)) as work:
        await work.owe(state={"currentStatus": "declined"})

        row = await work.settled()

        assert handler.calls == []
        assert (row["state"], row["reason"]) == ("done", "moved_on")


@asynchronous
async def test_a_condition_that_cannot_be_evaluated_makes_a_dead_letter(store_url: str) -> None:
    deep: Any = "completed"
    for _ in range(100):
        deep = [deep]
    handler = Plain()
    async with working(store_url, route(handler, when=COMPLETED)) as work:
        await work.owe(state={"currentStatus": deep})

        row = await work.settled()

        assert handler.calls == []
        assert (row["state"], row["reason"]) == ("dead", "condition")


@asynchronous
async def test_a_lookup_runs_although_the_condition_no_longer_holds(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler, when=COMPLETED)) as work:
        await work.owe()
        row = await work.settled()
        work.norce.orders["order-1"]["state"] = {"currentStatus": "declined"}
        work.move_to(row["next_at"])

        row = await work.settled()

        assert handler.calls == ["deliver", "lookup"]
        assert row["reason"] == "delivered"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(httpx.Response(429, headers={"retry-after": "120"}), ("waiting", None, 120), id="429"),
        pytest.param(httpx.Response(503), ("waiting", None, 5), id="503"),
        pytest.param(httpx.Response(500), ("waiting", None, 5), id="500"),
        pytest.param(httpx.ConnectError("refused"), ("waiting", None, 5), id="no connection"),
        pytest.param(httpx.ReadTimeout("slow"), ("waiting", None, 5), id="no answer"),
        pytest.param(httpx.Response(200, text="<html>"), ("waiting", None, 5), id="a page in place of an order"),
        pytest.param(httpx.Response(200, json={}), ("waiting", None, 5), id="an object that is no order"),
        pytest.param(httpx.Response(200, json={"id": "order-2"}), ("waiting", None, 5), id="another order"),
        pytest.param(httpx.Response(404), ("dead", "rejected", None), id="404"),
    ],
)
@asynchronous
async def test_an_order_that_cannot_be_read_again_is_not_delivered(
    store_url: str, answer: httpx.Response | Exception, expected: tuple[str, str | None, int | None]
) -> None:
    handler = Plain()
    async with working(store_url, route(handler, when=COMPLETED)) as work:
        work.norce.answers = [answer, answer]  # a read without an answer is repeated once
        await work.owe()

        row = await work.settled()

        assert handler.calls == []
        due = row["next_at"] and datetime.fromisoformat(row["next_at"]) - to_datetime(work.clock.now)
        assert (row["state"], row["reason"], due and due.total_seconds()) == expected


@asynchronous
async def test_deliveries_of_a_channel_wait_while_it_is_switched_off(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler), merchants=("fjallboden", "annan")) as work:
        off = {("fjallboden", "1")}
        work.dispatcher.switched_off = off
        await work.owe()
        await work.owe("order-2", merchant="annan")

        assert (await work.settled())["order_id"] == "order-2"
        await work.a_turn()
        assert handler.calls == ["deliver"]
        off.clear()
        work.dispatcher.wake()

        assert (await work.settled())["order_id"] == "order-1"


@pytest.mark.parametrize("status", [401, 403])
@asynchronous
async def test_a_refused_token_at_norce_pauses_the_queue_and_keeps_the_work(store_url: str, status: int) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.norce.answers = [httpx.Response(status)]
        await work.owe()
        row = await work.settled()
        await work.owe("order-2")

        assert await work.a_turn() == []
        assert handler.calls == []
        assert (row["state"], row["tries"]) == ("waiting", 0)
        assert work.pauses() == {("export", "fjallboden", "1"): "norce-unauthorized"}


@asynchronous
async def test_a_claim_with_too_little_time_left_is_released(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:

        async def dawdle() -> None:
            work.clock.now += int((NORCE_TIMEOUT + SLACK).total_seconds() * 1000) + 1

        work.norce.answers = [dawdle]
        await work.owe()
        released, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        row = await work.settled()

        assert (released.outcome, settlement and settlement.counts) == ("released", False)
        assert handler.calls == ["deliver"]
        assert (row["state"], row["tries"]) == ("done", 1)


# --- deadlines ------------------------------------------------------------------------------------------------------


@asynchronous
async def test_a_handler_is_cancelled_at_its_deadline_and_its_outcome_is_unknown(store_url: str) -> None:
    async with working(store_url, route(LooksUp(wait_forever), timeout=SHORTLY)) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["in_doubt"], row["code"]) == ("waiting", True, "deadline-passed")


@asynchronous
async def test_an_outcome_after_the_deadline_is_recorded(store_url: str) -> None:
    async def late(_notification: Notification, _context: Context[NoSettings]) -> Done:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Done("late")
        raise AssertionError

    async with working(store_url, route(Plain(late), timeout=SHORTLY)) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["reference"]) == ("done", "late")


@asynchronous
async def test_a_lane_stays_claimed_until_a_handler_that_blocks_has_ended(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    blocks = Blocks()
    async with working(store_url, route(Plain(blocks), timeout=SHORTLY)) as work:
        await work.owe()
        await blocks.has_begun()
        while not any(line["event"] == "deadline_passed" for line in lines()):
            await work.a_turn()
        work.move_to(NOON + 3_600_000)
        assert await work.a_turn() == []
        assert work.dispatcher.running == 1

        blocks.go_on.set()
        row = await work.settled()

        assert (row["state"], row["reference"]) == ("done", "late")


@asynchronous
async def test_a_handler_that_is_no_coroutine_fails_on_the_plugins_thread(store_url: str) -> None:
    threads: list[int] = []

    class Synchronous(NotificationHandler[NoSettings]):
        def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:  # type: ignore[override]
            threads.append(threading.get_ident())
            return Done()

    async with working(store_url, route(Synchronous())) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["code"]) == ("dead", "handler-failed")
        assert threads != [threading.get_ident()]


# --- limits ---------------------------------------------------------------------------------------------------------


class Counting(NotificationHandler[NoSettings]):
    """Keeps every call waiting until `go_on`, and counts how many run at the same time."""

    def __init__(self) -> None:
        self.running = self.peak = 0
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.entered.release()
        try:
            await asyncio.to_thread(self.go_on.wait, PATIENCE)
        finally:
            self.running -= 1
        return Done()

    async def has_begun(self, times: int) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE)


@asynchronous
async def test_the_concurrency_of_a_queue_limits_its_attempts(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler, concurrency=2)) as work:
        for number in range(5):
            await work.owe(f"order-{number}")
        await handler.has_begun(2)
        assert work.dispatcher.running == 2

        handler.go_on.set()
        for _ in range(5):
            assert (await work.settled())["state"] == "done"

        assert handler.peak == 2


@asynchronous
async def test_the_slots_limit_all_attempts(store_url: str) -> None:
    handler = Counting()
    routes = route(handler), route(handler, name="other")
    async with working(store_url, *routes, slots=3) as work:
        for number in range(4):
            await work.owe(f"order-{number}")
            await work.owe(f"order-{number}", route="other")
        await handler.has_begun(3)

        handler.go_on.set()
        for _ in range(8):
            await work.settled()

        assert handler.peak == 3


@asynchronous
async def test_a_full_queue_does_not_delay_another(store_url: str) -> None:
    full, free = Counting(), Plain()
    async with working(store_url, route(full, concurrency=1), route(free, name="other")) as work:
        await work.owe("order-1")
        await work.owe("order-2")
        await full.has_begun(1)

        await work.owe("order-3", route="other")
        row = await work.settled()

        assert (row["route"], row["state"]) == ("other", "done")
        full.go_on.set()


# --- pauses ---------------------------------------------------------------------------------------------------------


class Shop(NotificationHandler[NoSettings]):
    """A destination that remembers orders. `says` are merchants whose orders it refuses, and how."""

    repeatable = True

    def __init__(self) -> None:
        self.says: dict[str, Callable[[], Awaitable[None]]] = {}
        self.calls = 0
        self.taken: Counter[str] = Counter()

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done | Skip:
        self.calls += 1
        if notification.merchant in self.says:
            await self.says[notification.merchant]()
        self.taken[notification.order.id] += 1
        return Done()


def raising(outcome: Callable[[], Outcome]) -> Callable[[], Awaitable[None]]:
    async def say() -> None:
        raise outcome()

    return say


OUTAGES = {
    "busy": raising(lambda: Retry("destination-busy")),
    "busy, and says how long": raising(lambda: Retry("destination-busy", after=90 * SECOND)),
    "without answer": raising(lambda: Unknown("no-answer")),
}


@pytest.mark.parametrize("says", OUTAGES.values(), ids=OUTAGES)
@asynchronous
async def test_an_outage_costs_one_call_for_each_pause_and_loses_no_order(
    store_url: str, says: Callable[[], Awaitable[None]]
) -> None:
    shop = Shop()
    async with working(store_url, route(shop)) as work:
        shop.says["fjallboden"] = says
        for number in range(20):
            await work.owe(f"order-{number}")
        await work.quiet()
        at_first = shop.calls
        assert at_first < 5 + 4  # the failures in a row that pause a queue, and the attempts under way then
        assert work.pauses().keys() == {("export", "fjallboden", "1")}

        for probe in range(6):
            work.move_to(work.paused_until())
            await work.quiet()
            assert shop.calls == at_first + probe + 1
        assert work.states() == {("waiting", None): 20}

        shop.says.clear()
        work.move_to(work.paused_until())
        await work.quiet()
        work.move_to(work.clock.now + 3_600_000)  # orders that wait by their own schedule
        await work.quiet()

        assert work.states() == {("done", "delivered"): 20}
        assert shop.taken == {f"order-{number}": 1 for number in range(20)}
        assert work.pauses() == {}


@asynchronous
async def test_an_outage_that_is_longer_than_any_schedule_exhausts_nothing(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop, schedule=(5 * SECOND,)), policy=PausePolicy(after_failures=3)) as work:
        shop.says["fjallboden"] = OUTAGES["busy"]
        for number in range(3):
            await work.owe(f"order-{number}")
        await work.quiet()
        for _ in range(9):  # each order is the probe three times; two attempts would be its last
            work.move_to(max(work.paused_until(), work.clock.now + 60_000))  # one of them is due by then
            await work.quiet()
        calls = shop.calls

        assert calls == 3 + 9
        assert work.states() == {("waiting", None): 3}
        assert [work.shown(number)["tries"] for number in (1, 2, 3)] == [1, 1, 1]


async def hang() -> None:
    await asyncio.Event().wait()


TROUBLES = {
    **OUTAGES,
    "refusing the credentials": raising(lambda: Misconfigured("destination-unauthorized")),
    "hanging": hang,
}


@pytest.mark.parametrize("says", TROUBLES.values(), ids=TROUBLES)
@asynchronous
async def test_an_outage_of_one_merchant_does_not_affect_another(
    store_url: str, says: Callable[[], Awaitable[None]]
) -> None:
    shop = Shop()
    async with working(store_url, route(shop), merchants=("fjallboden", "annan")) as work:
        shop.says["annan"] = says
        for number in range(20):
            await work.owe(f"his-{number}", merchant="annan")
        for number in range(5):
            await work.owe(f"hers-{number}")
        while work.states("fjallboden") != {("done", "delivered"): 5}:
            await work.settled()

        assert work.states("annan") == {("waiting", None): 20}
        assert work.pauses().keys() <= {("export", "annan", "1")}


@asynchronous
async def test_a_refused_token_pauses_only_the_queue_of_its_merchant(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop), merchants=("fjallboden", "annan")) as work:
        work.norce.refuses.add("annan")
        for number in range(5):
            await work.owe(f"his-{number}", merchant="annan")
            await work.owe(f"hers-{number}")
        await work.quiet()

        assert work.states("fjallboden") == {("done", "delivered"): 5}
        assert work.states("annan") == {("waiting", None): 5}
        assert work.pauses() == {("export", "annan", "1"): "norce-unauthorized"}


@asynchronous
async def test_broken_credentials_pause_the_queue_until_the_next_start(store_url: str) -> None:
    shop = Shop()
    async with working(store_url, route(shop)) as work:
        shop.says["fjallboden"] = TROUBLES["refusing the credentials"]
        await work.owe()
        await work.quiet()
        shop.says.clear()
        work.move_to(NOON + 365 * 86_400_000)
        assert await work.a_turn() == []
        assert shop.calls == 1

        await work.lanes.open_queues([KEY])
        work.dispatcher.wake()
        row = await work.settled()
        while row["state"] == "waiting":
            row = await work.settled()

        assert (row["state"], row["tries"]) == ("done", 1)


@asynchronous
async def test_attempts_cut_short_by_a_shutdown_pause_no_queue(store_url: str) -> None:
    handler = Plain(*[wait_forever] * 6)
    async with working(store_url, route(handler, concurrency=8)) as work:
        for number in range(6):
            await work.owe(f"order-{number}")
        while len(handler.calls) < 6:
            await work.a_turn()

        await work.dispatcher.stop(timedelta(0))

        assert work.states() == {("dead", "unknown"): 6}
        assert work.rows("SELECT paused_until, failed_lanes FROM queues") == [(None, None)]


# --- a handler that blocks its thread ------------------------------------------------------------------------------

HELD = timedelta(seconds=1)


@asynccontextmanager
async def watched(url: str, *routes: Route, **more: Any) -> AsyncIterator[Work]:
    async with working(url, *routes, patience=HELD, **more) as work:
        watching = asyncio.create_task(work.runner.watch(every=timedelta(milliseconds=10)))
        try:
            yield work
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@asynchronous
async def test_a_blocked_delivery_is_a_dead_letter_whose_lane_stays_claimed(
    store_url: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY, concurrency=2), slots=1) as work:
        await work.owe("order-1")
        row = await work.settled()
        assert (row["state"], row["reason"], row["in_doubt"]) == ("dead", "unknown", True)
        assert [each["outcome"] for each in row["attempts"]] == ["blocked"]
        assert work.rows("SELECT holder, next_at FROM lanes") == [(work.lease.process_id, None)]

        await work.owe("order-2")  # in the only slot, on the new loop
        row = await work.settled()
        assert (row["order_id"], row["state"], row["tries"]) == ("order-2", "done", 1)

        await holds.ends()
        await asyncio.wait_for(work.lanes.released.get(), PATIENCE)
        assert work.rows("SELECT holder, next_at, settled FROM lanes WHERE order_id = 'order-1'") == [(None, None, 0)]
        assert (work.shown(1)["state"], len(work.shown(1)["attempts"])) == ("dead", 1)

    (line,) = [line for line in lines() if line["event"] == "plugins_loop_replaced"]
    assert (line["route"], line["level"]) == ("export", "error")
    labels = {"loop": "plugins-deliveries", "route": "export"}
    assert work.metrics.registry.get_sample_value("norce_adapter_plugin_loops_replaced_total", labels) == 1


@asynchronous
async def test_a_blocked_lane_counts_for_the_concurrency_of_its_queue(store_url: str) -> None:
    holds, other = Blocks(), Plain()
    routes = route(Plain(holds), timeout=SHORTLY, concurrency=1), route(other, name="other")
    async with watched(store_url, *routes, slots=1) as work:
        await work.owe("order-1")
        await work.settled()
        await work.owe("order-2")
        await work.owe("order-3", route="other")
        row = await work.settled()
        assert row["order_id"] == "order-3"
        assert await work.a_turn() == []

        await holds.ends()
        row = await work.settled()

        assert (row["order_id"], row["state"]) == ("order-2", "done")


@asynchronous
async def test_other_handlers_on_an_abandoned_loop_are_in_doubt_and_do_nothing_more(store_url: str) -> None:
    holds, began, effects = Blocks(), asyncio.Event(), []
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def waits(_notification: Notification, _context: Context[NoSettings]) -> Done:
        loop.call_soon_threadsafe(began.set)
        await go_on.wait()
        effects.append("sent")
        return Done()

    async def wakes_it_and_holds(notification: Notification, context: Context[NoSettings]) -> Done:
        go_on.set()
        return await holds(notification, context)

    neighbour = LooksUp(waits, Done("shop-7"))
    holder = route(Plain(wakes_it_and_holds), name="holder", timeout=SHORTLY)
    async with watched(store_url, route(neighbour), holder) as work:
        await work.owe("order-1")
        await began.wait()
        await work.owe("order-2", route="holder")
        rows_ = {row["order_id"]: row for row in [await work.settled(), await work.settled()]}
        assert rows_["order-2"]["reason"] == "unknown"
        beside = rows_["order-1"]
        assert (beside["state"], beside["in_doubt"], beside["code"]) == ("waiting", True, "loop-abandoned")
        await holds.ends()
        assert effects == []

        work.move_to(beside["next_at"])
        row = await work.settled()

        assert neighbour.calls == ["deliver", "lookup"]
        assert (row["state"], row["reference"]) == ("done", "shop-7")
        assert effects == []


@asynchronous
async def test_a_delivery_that_had_not_begun_on_an_abandoned_loop_runs_on_the_next(store_url: str) -> None:
    holds, waiting = Blocks(), Plain()
    routes = route(Plain(holds), name="holder", timeout=SHORTLY), route(waiting)
    async with watched(store_url, *routes) as work:
        await work.owe("order-1", route="holder")
        await holds.has_begun()
        await work.owe("order-2")
        settled = [await work.settled() for _ in range(3)]

        row = next(row for row in settled if row["state"] == "done")
        assert [each["outcome"] for each in row["attempts"]] == ["released", "done"]
        assert (row["order_id"], row["tries"], row["in_doubt"]) == ("order-2", 1, False)
        await holds.ends()
        assert waiting.calls == ["deliver"]


@asynchronous
async def test_stopping_does_not_wait_for_a_blocked_thread(store_url: str) -> None:
    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY)) as work:
        await work.owe()
        await work.settled()

        async with asyncio.timeout(PATIENCE):
            await work.dispatcher.stop(timedelta(seconds=PATIENCE * 5))

        assert (work.shown()["state"], work.shown()["reason"]) == ("dead", "unknown")
        assert work.rows("SELECT holder FROM lanes") == [(work.lease.process_id,)]
    assert not holds.go_on.is_set()
    await holds.ends()


@asynchronous
async def test_a_dead_letter_is_not_retried_while_its_handler_still_runs(store_url: str) -> None:
    def retry(connection: Connection, items: Sequence[None]) -> list[int]:
        return [
            retry_dead_letters(connection, [DeadLetter(1, 1)], NOON, reasons=Reason, ends_doubt=True) for _ in items
        ]

    holds = Blocks()
    async with watched(store_url, route(Plain(holds), timeout=SHORTLY)) as work:
        await work.owe()
        await work.settled()
        assert await work.store.write(retry, None) == 0

        await holds.ends()
        await asyncio.wait_for(work.lanes.released.get(), PATIENCE)
        assert await work.store.write(retry, None) == 1
        work.dispatcher.wake()
        row = await work.settled()

        assert (row["state"], row["tries"]) == ("done", 1)


# --- the lease ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def leased(url: str, *routes: Route) -> AsyncIterator[Work]:
    """Run a dispatcher that renews its lease all the time."""
    async with working(url, *routes) as work:
        beating = asyncio.create_task(work.dispatcher.keep_lease())
        try:
            yield work
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


BEAT_MS = 20


@pytest.fixture
def at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT", timedelta(milliseconds=BEAT_MS))
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))


@pytest.mark.usefixtures("at_every_moment")
@asynchronous
async def test_the_lease_is_renewed_with_every_heartbeat(store_url: str) -> None:
    async with leased(store_url, route(Plain())) as work:
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - 1
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - 1
        await work.lease.two_beats()

        held = work.rows("SELECT id, lease_until FROM processes")
        assert held == [(work.lease.process_id, work.clock.now + LEASE_MS)]
        assert work.lease.until == work.clock.now + LEASE_MS
        assert work.lease.entered.qsize() == 1


@pytest.mark.usefixtures("at_every_moment")
@asynchronous
async def test_a_lost_lease_cancels_all_handlers_and_work_continues_under_a_new_one(store_url: str) -> None:
    handler = LooksUp(wait_forever, Done("shop-2"), Done("shop-1"))
    async with leased(store_url, route(handler)) as work:
        await work.owe("order-1")
        while not handler.calls:
            await work.a_turn()
        work.lease.entered.get_nowait()
        work.rows("DELETE FROM processes")

        record, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        assert (record.code, settlement) == ("lease-lost", None)
        await asyncio.wait_for(work.lease.entered.get(), PATIENCE)
        assert work.rows("SELECT id FROM processes") == [(work.lease.process_id,)]
        await work.owe("order-2")
        row = await work.settled()
        assert (row["order_id"], row["state"]) == ("order-2", "done")

        assert work.shown(1)["in_doubt"]
        ((due,),) = work.rows("SELECT next_at FROM lanes WHERE order_id = 'order-1'")
        work.move_to(due)
        row = await work.settled()
        assert handler.calls == ["deliver", "deliver", "lookup"]
        assert (row["order_id"], row["state"], row["reference"]) == ("order-1", "done", "shop-1")


@pytest.mark.usefixtures("at_every_moment")
@asynchronous
async def test_a_store_that_fails_until_the_lease_ends_cancels_only_if_it_is_shared(
    store_url: str,
) -> None:
    """No other process can take the lanes of a SQLite file."""
    handler = Counting()
    async with leased(store_url, route(handler, timeout=60 * SECOND)) as work:
        await work.owe()
        await handler.has_begun(1)
        await work.lease.two_beats()
        work.lease.failing = True
        work.clock.now = work.lease.until - BEAT_MS
        await work.lease.two_beats()
        assert work.dispatcher.running == 1
        assert work.lanes.settled.empty()

        work.clock.now = work.lease.until
        await work.lease.two_beats()
        if not work.store.shared:
            handler.go_on.set()
        row = await work.settled()

        if work.store.shared:
            assert (row["state"], row["in_doubt"], row["code"]) == ("dead", True, "lease-lost")
        else:
            assert (row["state"], row["in_doubt"]) == ("done", False)
        handler.go_on.set()


@pytest.mark.usefixtures("at_every_moment")
@asynchronous
async def test_a_store_that_recovers_before_the_lease_ends_cancels_nothing(store_url: str) -> None:
    handler = Counting()
    async with leased(store_url, route(handler, timeout=60 * SECOND)) as work:
        await work.owe()
        await handler.has_begun(1)
        work.lease.failing = True
        await work.lease.two_beats()
        work.clock.now = work.lease.until - BEAT_MS
        work.lease.failing = False
        await work.lease.two_beats()
        work.clock.now += LEASE_MS - BEAT_MS
        await work.lease.two_beats()

        handler.go_on.set()

        assert (await work.settled())["state"] == "done"
        assert work.lease.entered.qsize() == 1


# --- stopping -------------------------------------------------------------------------------------------------------


@asynchronous
async def test_stopping_waits_for_running_attempts_and_claims_nothing(store_url: str) -> None:
    handler = Counting()
    async with working(store_url, route(handler)) as work:
        await work.owe("order-1")
        await handler.has_begun(1)
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(seconds=PATIENCE)))
        await work.owe("order-2")

        handler.go_on.set()
        await stopping

        assert (work.shown(1)["state"], work.shown(2)["state"]) == ("done", "waiting")
        assert work.shown(2)["tries"] == 0


@asynchronous
async def test_attempts_longer_than_the_grace_are_cancelled_and_in_doubt(store_url: str) -> None:
    begun = threading.Event()

    async def hangs(_notification: Notification, _context: Context[NoSettings]) -> Done:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with working(store_url, route(LooksUp(hangs))) as work:
        await work.owe()
        await asyncio.to_thread(begun.wait, PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"], row["code"]) == ("waiting", True, "shutdown")


@asynchronous
async def test_a_lane_whose_handler_cannot_be_cancelled_stays_claimed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "CANCEL_GRACE", timedelta(milliseconds=1))

    entered, go_on = threading.Event(), threading.Event()

    async def blocks(_notification: Notification, _context: Context[NoSettings]) -> Done:
        entered.set()
        go_on.wait(PATIENCE)
        return Done()

    async with working(store_url, route(LooksUp(blocks))) as work:
        await work.owe()
        await asyncio.to_thread(entered.wait, PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"], row["attempts"]) == ("waiting", True, [])
        go_on.set()


@asynchronous
async def test_a_lane_claimed_while_the_service_stops_is_released(store_url: str) -> None:
    """Otherwise an order that was never sent would be in doubt, and might wait for a person."""
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.lanes.keep_back = asyncio.Event()
        await work.owe()
        while not await asyncio.wait_for(work.lanes.claimed.get(), PATIENCE):
            pass
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(0)))
        await asyncio.sleep(0)
        work.lanes.keep_back.set()

        await stopping

        assert work.dispatcher.running == 0
        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)


@asynchronous
async def test_a_lane_whose_order_is_being_read_while_the_service_stops_is_released(store_url: str) -> None:
    handler, reading, go_on = Plain(), asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        reading.set()
        await go_on.wait()

    async with working(store_url, route(handler)) as work:
        work.norce.answers = [slowly]
        await work.owe()
        await reading.wait()
        stopping = asyncio.create_task(work.dispatcher.stop(timedelta(seconds=PATIENCE)))
        await asyncio.sleep(0)
        go_on.set()

        await stopping

        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)


# --- a store that fails ---------------------------------------------------------------------------------------------


@asynchronous
async def test_settling_is_retried_until_the_store_recovers(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))

    handler = Plain(Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        work.lanes.failures["settle"] = 3
        await work.owe()

        row = await work.settled()

        assert handler.calls == ["deliver"]
        assert (row["state"], row["reference"]) == ("done", "shop-7")


@asynchronous
async def test_claiming_is_retried_until_the_store_recovers(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))

    async with working(store_url, route(Plain())) as work:
        work.lanes.failures["claim"] = 3
        await work.owe()

        assert (await work.settled())["state"] == "done"


@asynchronous
async def test_an_attempt_that_is_never_stored_leaves_its_lane_in_doubt(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))

    handler = Counting()
    async with working(store_url, route(handler)) as work:
        await work.owe()
        await handler.has_begun(1)
        work.lanes.failures["settle"] = 1_000_000
        handler.go_on.set()

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert (row["state"], row["in_doubt"]) == ("waiting", True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "STORE_RETRY", timedelta(milliseconds=1))


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_claims_committed_without_an_answer_run_once_and_without_doubt(store_url: str) -> None:
    busy, handler = Counting(), LooksUp()
    async with working(store_url, route(busy), route(handler, name="other")) as work:
        await work.owe("order-1")
        await busy.has_begun(1)
        work.lanes.left_open["claim"] = 1
        await work.owe("order-2", route="other")
        await work.owe("order-3", route="other")

        rows_ = [await work.settled(), await work.settled()]

        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "deliver"]
        assert [context.attempt for _, context in handler.seen] == [1, 1]
        assert [(row["state"], row["tries"], len(row["attempts"])) for row in rows_] == [("done", 1, 1)] * 2
        busy.go_on.set()  # the running attempt has kept its lane
        row = await work.settled()
        assert (row["order_id"], row["state"], row["tries"]) == ("order-1", "done", 1)
        assert busy.peak == 1


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_claim_committed_without_an_answer_keeps_earlier_doubt(store_url: str) -> None:
    handler = LooksUp(Unknown("no-answer"), Done("shop-7"))
    async with working(store_url, route(handler)) as work:
        await work.owe()
        row = await work.settled()
        work.lanes.left_open["claim"] = 1
        work.move_to(row["next_at"])
        row = await work.settled()

        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "lookup"]
        assert (row["state"], row["tries"]) == ("done", 2)


@asynchronous
async def test_stopping_releases_claims_committed_without_an_answer(store_url: str) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        await work.a_turn()  # the next claim follows only a wake-up
        work.lanes.left_open["claim"] = 1
        await work.owe()
        await asyncio.wait_for(work.lanes.lost.get(), PATIENCE)

        await work.dispatcher.stop(timedelta(0))

        row = work.shown()
        assert handler.calls == []
        assert (row["state"], row["in_doubt"], row["tries"]) == ("waiting", False, 0)
        assert work.rows("SELECT holder FROM lanes") == [(None,)]


@pytest.mark.usefixtures("impatient")
@asynchronous
async def test_a_lane_whose_attempt_met_our_own_bug_stays_in_doubt(
    store_url: str,
) -> None:
    handler = Plain()
    async with working(store_url, route(handler)) as work:
        work.lanes.mistakes.add("order-1")
        await work.owe("order-1")
        while not handler.calls or work.dispatcher.running:
            await work.a_turn()
        work.lanes.left_open["claim"] = 1
        await work.owe("order-2")
        row = await work.settled()
        await work.quiet()

        assert (row["order_id"], row["state"]) == ("order-2", "done")
        assert not work.lanes.lost.empty()
        assert handler.calls == ["deliver", "deliver"]
        assert (work.shown(1)["state"], work.shown(1)["in_doubt"]) == ("waiting", True)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("step", [Done("shop-7"), Retry("busy"), Reject("no-shop")], ids=repr)
@asynchronous
async def test_an_attempt_settled_without_an_answer_is_not_settled_again(store_url: str, step: Step) -> None:
    handler = Plain(step)
    async with working(store_url, route(handler)) as work:
        work.lanes.left_open["settle"] = 1
        await work.owe()

        record, settlement = await asyncio.wait_for(work.lanes.settled.get(), PATIENCE)
        await work.quiet()

        assert not work.lanes.lost.empty()
        row = work.shown()
        assert settlement is not None
        assert settlement.state.value == row["state"]
        assert (row["tries"], row["in_doubt"], len(row["attempts"])) == (1, False, 1)
        labels = {"route": "export", "outcome": record.outcome}
        assert work.metrics.registry.get_sample_value("norce_adapter_delivery_attempts_total", labels) == 1
        assert handler.calls == ["deliver"]
