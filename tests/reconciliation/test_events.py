"""Reconciliation stores every missing notification of Norce's event log once."""

import asyncio
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, delete
from starlette.routing import Route, Router
from structlog.testing import capture_logs

from adapter import config as configuration
from adapter.callbacks.endpoints import CallbackEndpoint
from adapter.callbacks.intake import Intake
from adapter.callbacks.limits import Load
from adapter.callbacks.senders import Senders
from adapter.callbacks.server import CALLBACK_PATH
from adapter.identifiers import Channel
from adapter.ledger.inbox import Inbox
from adapter.ledger.key_values import Watermarks
from adapter.ledger.lanes import Lanes
from adapter.ledger.lease import Lease
from adapter.ledger.names import Names
from adapter.ledger.schema import deliveries, lanes, notifications
from adapter.ledger.store import Store, StoreUnavailable
from adapter.ledger.uses import Uses
from adapter.metrics import Metrics
from adapter.moments import to_text
from adapter.norce.client import Norce, NorceError
from adapter.plugin import Context, Done, Notification, NotificationHandler, Settings
from adapter.reconciliation.events import CHECK_EVERY_SECONDS, MAX_CLOCK_DIFFERENCE, LogProgress, run_when_due
from adapter.reconciliation.from_config import reconciliation
from adapter.reconciliation.listing import PAGE_SIZE
from adapter.registrations.on_orders import Registrar
from adapter.routing.from_config import norce_client, queue_keys
from adapter.routing.routes import build
from adapter.sandbox.caller import Caller
from adapter.sandbox.norce import Simulator
from adapter.testing import virtual_time
from tests.databases import Files, rows
from tests.ledgers import POLICY
from tests.simulators import TickingClock

CHANNEL = Channel("norce", "1")
TOKEN = "a token"
MINUTES = timedelta(minutes=1)
TREE: dict[str, Any] = {
    "adapter": {"id": "our_adapter", "public_url": "http://127.0.0.1:8080"},
    "norce": {"base_url": "http://127.0.0.1:1/checkout"},
    "merchants": {"norce": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}, "2": {}}}},
    "senders": {"signed_urls": {"keys": {"k1": "${env:KEY}"}}},
    "callbacks": {"order-status": {"kind": "notification", "scope": "/state/currentStatus"}},
    "routes": {"export": {"callback": "order-status", "handler": "remember", "refetch": False}},
}


class Remember(NotificationHandler[Settings]):
    async def deliver(self, _notification: Notification, _context: Context[Settings]) -> Done:
        return Done()


class Point:
    name = "remember"

    def load(self) -> Any:
        return Remember


class Flaky(httpx.AsyncBaseTransport):
    """Forwards to Norce. After `down_after` requests for events, Norce is down."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self.down_after: int | None = None
        self.asked = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            self.asked += 1
            if self.down_after is not None and self.asked > self.down_after:
                raise httpx.ConnectError("down")
        return await self._inner.handle_async_request(request)


class House:
    """A ledger whose callbacks an offline Norce calls, in one process."""

    def __init__(self, folder: Path, store_url: str, **changed: Any) -> None:
        self.loop = asyncio.Runner()
        self.url = store_url
        path = folder / "config.yaml"
        path.write_text(json.dumps(TREE | {"store": {"url": store_url}} | changed))
        self.config = configuration.load(path, {"TOKEN": TOKEN, "KEY": "a key for signing, long enough"})
        self.routes = build(self.config, [Point()])  # type: ignore[list-item]
        self.metrics = Metrics("0")
        self.loop.run(self._open())

    async def _open(self) -> None:
        self.store = Store.open(self.url)
        lanes = Lanes(self.store, Lease(self.store, version="0"), policy=POLICY)
        queues = await lanes.open_queues(queue_keys(self.config))
        self.intake = Intake(self.routes, Inbox(self.store), queue_ids=queues, metrics=self.metrics)
        self.endpoint = CallbackEndpoint(
            routes=self.routes,
            senders=Senders(self.config.senders),
            channels=frozenset(self.config.channels),
            intake=self.intake,
            verdicts=None,  # type: ignore[arg-type]
            metrics=self.metrics,
            adapter_id="our_adapter",
            max_body_bytes=1024 * 1024,
            load=Load(),
            clock=self.store.clock,
            names=Names(self.store),
            uses=Uses(self.store),
        )
        app = Router(routes=[Route(CALLBACK_PATH, self.endpoint)])
        self.simulator = Simulator(token=TOKEN, transport=httpx.ASGITransport(app), clock=TickingClock(), seed=7)
        await self.simulator.__aenter__()
        self.caller = Caller(self.simulator, TOKEN, Channel("norce", "1"))
        self.line = Flaky(httpx.ASGITransport(self.simulator.app))
        self.norce: Norce = norce_client(self.config, self.metrics, transport=self.line)
        self.healing = reconciliation(self.config, self.norce, self.intake, self.store, self.metrics)
        self.watermarks = Watermarks(self.store)

    def close(self) -> None:
        async def end() -> None:
            await self.caller.__aexit__()
            await self.norce.aclose()
            await self.simulator.__aexit__(None, None, None)

        self.loop.run(end())
        self.loop.close()
        self.store.close()

    def orders(self, count: int, *, channel: Channel = CHANNEL, moves: int = 1) -> list[str]:
        """So many orders, each registered on and moved: a notification for each move."""
        states = ("processing", "checkout")

        async def bought() -> list[str]:
            made = []
            for _ in range(count):
                order_id = await self.caller.create({"currency": "SEK"}, channel=channel)
                await Registrar(self.config, self.norce).register(channel, order_id)
                await self.caller.move(order_id, *(states[number % 2] for number in range(moves)))
                made.append(order_id)
                await self.simulator.wait_until_idle()
            return made

        return self.loop.run(bought())

    def reconciled(self, **given: Any) -> LogProgress:
        async def run() -> LogProgress:
            return [each async for each in self.healing.run(**given)][-1]  # of the last merchant

        return self.loop.run(run())

    def in_turn(self, every: timedelta = timedelta(minutes=10)) -> None:
        self.loop.run(self.healing.run_if_due(every))

    def missed(self) -> float:
        """Return the metrics on which an operator is alerted."""
        return float(self.metrics.notifications_missed.labels("order-status", "norce")._value.get())

    def stored(self) -> list[tuple[str, str, int]]:
        """Order, source and how many deliveries, of each notification."""
        return rows(
            self.url,
            "SELECT n.order_id, n.source, count(d.id) FROM notifications n"
            " LEFT JOIN deliveries d ON d.notification_id = n.id GROUP BY n.id, n.order_id, n.source ORDER BY n.id",
        )


@pytest.fixture
def house(store_url: str, tmp_path: Path) -> Iterator[House]:
    with opened(store_url, tmp_path) as made:
        yield made


@contextmanager
def opened(store_url: str, folder: Path, **changed: Any) -> Iterator[House]:
    made = House(folder, store_url, **changed)
    try:
        yield made
    finally:
        made.close()


def test_missing_notifications_are_stored_once_and_received_ones_are_known(house: House) -> None:
    came = house.orders(2)
    house.simulator.set_switches(notifications_lost=1.0)
    lost = house.orders(3)

    first, again = house.reconciled(), house.reconciled()

    assert (first.events, first.received, first.missed, first.others, first.done) == (5, 2, 3, 0, True)
    assert (again.events, again.received, again.missed) == (5, 5, 0)
    assert house.stored() == [(each, "callback", 1) for each in came] + [(each, "reconciliation", 1) for each in lost]


def test_an_event_is_missing_if_only_another_order_came_under_its_identity(house: House) -> None:
    house.orders(2)
    order_id = house.stored()[0][0]
    forged = b'{"id": "forged"}'.hex()
    literal = f"x'{forged}'" if house.url.startswith("sqlite") else f"'\\x{forged}'"
    rows(house.url, f"UPDATE notifications SET digest = NULL, body = {literal} WHERE order_id = '{order_id}'")

    first, again = house.reconciled(), house.reconciled()

    assert (first.received, first.missed, house.missed()) == (1, 1, 1)
    assert (again.received, again.missed) == (2, 0)
    assert [each[:2] for each in house.stored()[2:]] == [(order_id, "reconciliation")]


def test_a_callback_that_comes_later_is_a_repeat(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(1)
    house.reconciled()

    async def retry() -> None:
        await house.caller.ask("retry_event", event_id=house.simulator.events()[-1]["id"])
        await house.simulator.wait_until_idle()

    house.loop.run(retry())

    assert [source for _, source, _ in house.stored()] == ["reconciliation"]


def test_a_dry_run_counts_missing_notifications_and_stores_nothing(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(2)

    assert house.reconciled(dry_run=True).missed == 2
    assert house.stored() == []
    assert house.missed() == 0
    assert house.reconciled().missed == 2
    assert house.missed() == 2


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_a_run_reads_the_log_back_to_the_last_one_on_a_clock_that_is_off(
    tmp_path: Path, store_url: str, skew: float
) -> None:
    with opened(store_url, tmp_path, reconciliation={"overlap": "0s"}) as house:
        house.simulator.set_switches(clock_skew_seconds=skew)
        house.orders(PAGE_SIZE // 2, moves=5)
        assert house.reconciled().missed == 0
        house.simulator.set_switches(notifications_lost=1.0)
        house.orders(3, moves=5)
        house.line.asked = 0

        found = house.reconciled()

        assert found.missed == 15
        # If Norce's clock is ahead, the watermark is our own time, so more is read again.
        assert house.line.asked <= (4 if skew > 0 else 3)
        assert house.reconciled().missed == 0


def test_since_reads_further_back_than_the_watermark(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0, clock_skew_seconds=-3 * 86400)
    house.orders(1)
    house.simulator.set_switches(clock_skew_seconds=0)
    house.in_turn()  # which begins now

    assert house.reconciled().missed == 0
    assert house.reconciled(since=datetime.now(UTC) - timedelta(days=4)).missed == 1


def test_the_first_run_begins_now_and_stores_nothing_older(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0, clock_skew_seconds=-120)
    house.orders(2)

    house.in_turn()

    assert house.stored() == []


def test_one_of_several_nodes_has_the_turn(house: House) -> None:
    house.in_turn()
    asked = house.line.asked

    house.in_turn()

    assert house.line.asked == asked > 0
    house.loop.run(house.watermarks.put("reconciliation", 0))
    house.in_turn()
    assert house.line.asked > asked


def test_a_start_reads_the_log_although_it_is_not_due_and_names_the_gap(house: House) -> None:
    house.loop.run(house.watermarks.put("reconciled since norce", 0))
    house.simulator.set_switches(notifications_lost=1.0, clock_skew_seconds=-120)
    house.orders(2)
    an_hour_ago = house.store.clock() - 3_600_000
    house.loop.run(house.watermarks.put("reconciliation", an_hour_ago))

    with capture_logs() as logs:
        house.loop.run(house.healing.run_at_start(timedelta(days=7)))

    assert len(house.stored()) == 2
    (line,) = [each for each in logs if each["event"] == "reconciled_at_start"]
    assert (line["since"], line["missed"]) == (to_text(an_hour_ago), 2)


def test_a_start_shortly_after_a_run_reads_nothing(house: House) -> None:
    """Another node has just read the log, and what is younger is left for the next run."""
    house.in_turn()
    asked = house.line.asked

    house.loop.run(house.healing.run_at_start(timedelta(minutes=10)))

    assert house.line.asked == asked


def test_young_events_are_left_for_the_next_run(house: House) -> None:
    house.in_turn()
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(1)
    house.loop.run(house.watermarks.put("reconciliation", 0))

    house.in_turn()

    assert house.stored() == []
    assert house.reconciled().missed == 1


def test_a_failed_run_is_repeated_from_its_beginning(house: House) -> None:
    house.reconciled()
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(50, moves=5)
    house.line.asked, house.line.down_after = 0, 2

    with pytest.raises(NorceError, match="norce: no answer"):
        house.reconciled()
    halfway = len(house.stored())
    house.line.down_after = None
    house.reconciled()

    assert 0 < halfway < 250
    assert len(house.stored()) == 250
    assert {deliveries for *_, deliveries in house.stored()} == {1}


def test_a_merchant_whose_log_cannot_be_read_does_not_stop_the_others(tmp_path: Path, store_url: str) -> None:
    merchants = {"broken": {"tokens": ["${env:KEY}"], "channels": {"1": {}}}} | TREE["merchants"]
    with opened(store_url, tmp_path, merchants=merchants) as house:
        house.simulator.set_switches(notifications_lost=1.0)
        house.orders(1)

        with pytest.raises(NorceError, match=r"^broken: Norce answered 401.*tokens[^;]*$"):
            house.reconciled()

        assert len(house.stored()) == 1


def test_every_merchant_whose_log_cannot_be_read_is_named(tmp_path: Path, store_url: str) -> None:
    merchants = {name: {"tokens": ["${env:KEY}"], "channels": {"1": {}}} for name in ("first", "second")}
    with opened(store_url, tmp_path, merchants=merchants) as house:
        told: list[LogProgress] = []

        async def run() -> None:
            async for each in house.healing.run():
                told.append(each)

        with pytest.raises(NorceError, match=r"^first: .*; second: "):
            house.loop.run(run())

        assert [(each.merchant, bool(each.error), each.done) for each in told] == [
            ("first", True, False),
            ("second", True, False),
        ]


def test_a_later_since_leaves_the_gap_for_the_next_run(tmp_path: Path, store_url: str) -> None:
    with opened(store_url, tmp_path, reconciliation={"overlap": "0s"}) as house:
        a_week_ago = datetime.now(UTC) - timedelta(days=7)
        house.loop.run(house.watermarks.put("reconciled norce", int(a_week_ago.timestamp() * 1000)))
        house.simulator.set_switches(notifications_lost=1.0, clock_skew_seconds=-3 * 86400)
        house.orders(1)
        house.simulator.set_switches(clock_skew_seconds=0)
        house.orders(1)

        assert house.reconciled(since=datetime.now(UTC) - timedelta(days=1)).missed == 1
        assert house.reconciled().missed == 1
        assert house.reconciled(since=datetime.min.replace(tzinfo=UTC)).missed == 0


def test_events_that_the_ledger_has_forgotten_are_not_stored_again(tmp_path: Path, store_url: str) -> None:
    store = {"url": store_url, "retention": {"rows": "2d"}}
    with opened(store_url, tmp_path, store=store, reconciliation={"overlap": "30d"}) as house:
        house.loop.run(house.watermarks.put("reconciled norce", house.store.clock()))
        house.simulator.set_switches(clock_skew_seconds=-3 * 86400)
        house.orders(1)  # it came
        house.loop.run(_forget(house.store))

        assert house.reconciled().missed == 0
        assert house.reconciled(since=datetime.now(UTC) - timedelta(days=30)).missed == 0


@pytest.mark.parametrize(("age", "missed"), [(timedelta(hours=46), 1), (timedelta(hours=47, minutes=1), 0)])
def test_an_event_at_the_end_of_the_ledgers_memory_is_left_alone(
    tmp_path: Path, store_url: str, age: timedelta, missed: int
) -> None:
    """Norce's clock may be an hour behind, and the ledger may have forgotten the event."""
    assert timedelta(hours=1) == MAX_CLOCK_DIFFERENCE
    store = {"url": store_url, "retention": {"rows": "2d"}}
    with opened(store_url, tmp_path, store=store) as house:
        house.simulator.set_switches(clock_skew_seconds=-age.total_seconds(), notifications_lost=1.0)
        house.orders(1)

        assert house.reconciled().missed == missed


async def _forget(store: Store) -> None:
    def all_of_it(connection: Connection, items: Sequence[None]) -> list[None]:
        for table in (deliveries, lanes, notifications):
            connection.execute(delete(table))
        return [None for _ in items]

    await store.write(all_of_it, None)


def test_a_new_merchants_log_begins_when_the_service_starts(tmp_path: Path, store_url: str) -> None:
    with opened(store_url, tmp_path) as house:
        house.in_turn()
    merchants = TREE["merchants"] | {"another": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}}}
    with opened(store_url, tmp_path, merchants=merchants) as house:
        house.in_turn()

        assert house.line.asked == 0  # it is not due
        assert house.loop.run(house.watermarks.value("reconciled since another")) is not None


def test_a_shorter_interval_counts_at_once(house: House) -> None:
    house.in_turn(timedelta(days=7))
    asked = house.line.asked

    house.in_turn(timedelta(0))

    assert house.line.asked > asked


def test_an_event_that_is_not_utf_8_does_not_stop_the_run(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(2)
    house.line._inner = Liar(house.line._inner, b'"invoke":"http', b'"invoke":"\xff')

    found = house.reconciled()

    assert (found.others, found.done) == (2, True)


def test_half_an_emoji_in_one_event_hides_no_other(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(2)
    cut_off = b'"currency":"SEK\\\\\\ud83d"'  # after an escaped backslash
    house.line._inner = Liar(house.line._inner, b'"currency":"SEK"', cut_off)

    assert house.reconciled().missed == 2


def test_other_tasks_run_between_two_events(house: House) -> None:
    """A page has up to 64 MiB of orders. Parsing 62 MB at once blocked the event loop for 4.5 s."""
    house.orders(10, moves=5)
    loop_turn = 0
    looked_at: list[int] = []  # in which turn of the event loop each event was

    def clock() -> int:
        looked_at.append(loop_turn)
        return house.store.clock()

    house.healing._clock = clock

    async def beside() -> None:
        nonlocal loop_turn
        while True:
            await asyncio.sleep(0)
            loop_turn += 1

    async def run() -> LogProgress:
        others = asyncio.create_task(beside())
        found = [each async for each in house.healing.run()][-1]
        others.cancel()
        return found

    found = house.loop.run(run())

    assert found.received == 50
    assert max(map(looked_at.count, looked_at)) < 10


def test_one_order_of_a_page_is_parsed_at_a_time(house: House) -> None:
    """A parsed order is ten times as large as its text: a page of 61 MB took 690 MB."""
    house.orders(20)
    trees: list[int] = []  # at each look

    def clock() -> int:
        trees.append(sum(isinstance(each, dict) and "lastModified" in each for each in gc.get_objects()))
        return house.store.clock()

    house.healing._clock = clock

    assert house.reconciled().received == 20
    assert max(trees) - trees[0] < 5


def test_events_without_a_configured_callback_or_channel_are_counted(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(1, channel=Channel("norce", "2"))
    house.orders(1)
    events = house.simulator.records.events
    known = list(events.values())
    changes: list[dict[str, Any]] = [
        {"channel": "3"},
        {"payload": {"notification": {"reference": "another", "invoke": "http://x/y"}, "order": {"id": "o"}}},
        {"payload": {"notification": {"reference": "order-status"}, "order": {"id": "another"}}},
        {"payload": {}},
    ]
    for number, change in enumerate(changes):
        event = {**known[0], **change, "id": f"bad-{number}"}
        if "payload" in change:
            event["reference"] = None
        events[event["id"]] = event

    found = house.reconciled()

    assert (found.missed, found.others) == (2, 4)


def test_events_of_an_unconfigured_channel_log_no_warning(house: House) -> None:
    """They may belong to another deployment with thousands of orders an hour."""
    house.orders(2)
    events = house.simulator.records.events
    for event_id, event in list(events.items()):
        events[event_id] = {**event, "channel": "3"}

    with capture_logs() as lines:
        found = house.reconciled()

    assert found.others == 2
    assert [each["event"] for each in lines if each["log_level"] == "warning"] == []


def test_an_undocumented_event_hides_no_other(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(3)
    events = house.simulator.records.events
    spoiled = list(events)[1]
    events[spoiled] = {name: value for name, value in events[spoiled].items() if name != "createdAt"}

    found = house.reconciled()

    assert (found.events, found.missed, found.others, found.done) == (3, 2, 1, True)


class Liar(httpx.AsyncBaseTransport):
    """A Norce whose log differs from the events that it sent."""

    def __init__(self, inner: httpx.AsyncBaseTransport, said: bytes, says: bytes) -> None:
        self._inner, self.said, self.says = inner, said, says

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._inner.handle_async_request(request)
        content = (await answer.aread()).replace(self.said, self.says)
        return httpx.Response(answer.status_code, content=content)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b'"merchant":"norce"', b'"merchant":"another"'),
        (b'"adapterId":"our_adapter"', b'"adapterId":"another_adapter"'),
    ],
    ids=["another merchant", "another adapter"],
)
def test_events_of_another_merchant_or_adapter_are_ignored(
    tmp_path: Path, store_url: str, said: bytes, says: bytes
) -> None:
    merchants = TREE["merchants"] | {"another": {"tokens": ["${env:TOKEN}"], "channels": {"1": {}}}}
    with opened(store_url, tmp_path, merchants=merchants) as house:
        house.simulator.set_switches(notifications_lost=1.0)
        house.orders(1)
        house.line._inner = Liar(house.line._inner, said, says)

        house.reconciled()

        assert house.stored() == []


def test_a_callback_without_a_reference_is_found_by_its_address(house: House) -> None:
    house.simulator.set_switches(notifications_lost=1.0)
    house.orders(1)
    for event_id, event in house.simulator.records.events.items():
        del event["payload"]["notification"]["reference"]
        house.simulator.records.events[event_id] = {**event, "reference": None}

    assert house.reconciled().missed == 1


def test_an_order_from_the_future_keeps_its_identity_when_its_time_has_come(house: House) -> None:
    """Its lastModified was too far in the future to count when it came, and counts now."""
    house.simulator.set_switches(clock_skew_seconds=11 * 60)
    house.orders(1)
    now = house.store.clock()
    clock = lambda: now + 5 * 60_000  # noqa: E731
    house.healing._clock = clock

    assert house.reconciled().received == 1
    assert len(house.stored()) == 1


def test_of_a_thousand_the_few_that_are_lost_are_found(files: Files, tmp_path: Path) -> None:
    with opened(files.fresh(), tmp_path) as house:
        house.simulator.set_switches(notifications_lost=0.02, clock_skew_seconds=600)
        house.orders(40, moves=25)
        assert len(house.simulator.events()) == 1000
        came = len(house.stored())

        found = house.reconciled()

        assert 900 < came < 1000
        assert found.missed == 1000 - came
        stored = house.stored()
        assert len(stored) == 1000  # gap 0
        assert {deliveries for *_, deliveries in stored} == {1}  # doubled 0
        assert house.reconciled().missed == 0


@pytest.mark.parametrize(
    ("every", "ran"), [(timedelta(days=1), ["start", "start", "due", "due"]), (timedelta(0), [])], ids=str
)
def test_a_run_follows_the_start_and_later_ones_are_tried_until_due(every: timedelta, ran: list[str]) -> None:
    """The first one is repeated after a failure of the store; 0 is never."""
    calls: list[str] = []

    async def at_start(_every: timedelta) -> None:
        calls.append("start")
        if calls == ["start"]:
            raise StoreUnavailable("the disk is full")

    async def if_due(given: timedelta) -> None:
        assert given == every
        calls.append("due")

    async def work() -> None:
        task = asyncio.create_task(run_when_due(if_due, every, first=at_start))
        await asyncio.sleep(3.5 * CHECK_EVERY_SECONDS)
        task.cancel()

    virtual_time.run(work())

    assert calls == ran
