"""Backfill gives each order that a route wants, and has no delivery of, one delivery, on both databases."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any

import httpx
import psycopg
import pytest
from msgspec.structs import replace

from adapter.conditions import Condition
from adapter.deliveries import backfill as backfill_module
from adapter.deliveries.backfill import Backfill, BackfillResult
from adapter.identifiers import Channel
from adapter.ledger.backfill import BackfillLedger, BackfillStep
from adapter.ledger.known_orders import known_orders
from adapter.ledger.maintenance import Maintenance, Retention, faults
from adapter.ledger.queries import Author
from adapter.norce.client import Account, Norce
from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler, Secret
from adapter.routing.routes import Callback, Route, Routes
from tests.databases import database_of, rows
from tests.deliveries.harness import route
from tests.ledgers import DELIVERED, EXPORT, HISTORY, HOUR, OTHER, REJECTED, Ends, Ledger, make_many, opened, receipt
from tests.plans import assert_no_scan, seen

BY = Author(who="anna@shop", why="the route is new")
IS_COMPLETED = Condition("/state/currentStatus", {"const": "completed"}).compile()
CALLBACK = Callback(name="order-status", kind="notification")
FJALLBODEN, ANNAN = EXPORT.channel, OTHER.channel
KEPT = timedelta(days=1000)


class Deliver(NotificationHandler[NoSettings]):
    async def deliver(self, _notification: Notification, _context: Context[NoSettings]) -> Done:
        return Done()


def make(name: str, **more: Any) -> Route:
    given: dict[str, Any] = {"callback": CALLBACK, "when": (IS_COMPLETED,)}
    return route(Deliver(), **{"name": name, **given, **more})


class House:
    """A ledger with a new route, and a Norce with the orders in `at_norce`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.at_norce: dict[str, Any] = {}  # the status of an order, or an answer
        self.asked: list[str] = []
        self.routes = [make("export"), make("history", refetch=False)]

    async def answer(self, request: httpx.Request) -> httpx.Response:
        order_id = request.url.path.rpartition("/")[2]
        self.asked.append(order_id)
        status = self.at_norce.get(order_id, httpx.Response(404, json={"code": "order-not-found"}))
        if isinstance(status, httpx.Response):
            return status
        return httpx.Response(200, json={"id": order_id, "state": {"currentStatus": status}})

    def receive(self, order_id: str, status: str | None, snapshot: int = 1, **more: Any) -> None:
        """Receive a notification that no route wants yet. None is one whose body was not read."""
        channel = more.pop("channel", FJALLBODEN)
        callback = more.pop("callback", "order-status")
        body = json.dumps({"id": order_id, "snapshot": snapshot, "state": {"currentStatus": status}}).encode()
        given = receipt(order_id, snapshot, body=body, **more)
        identity = given.identity if "identity" in more else f"{snapshot:08}/{callback}/{channel}/{order_id}".encode()
        changed = {"channel": channel, "callback": callback, "identity": identity}
        self.ledger.receive(replace(given, **changed))
        if status is None:
            self.prune(order_id, snapshot)

    def prune(self, order_id: str, snapshot: int) -> None:
        self.ledger.rows(
            f"UPDATE notifications SET body = NULL WHERE order_id = '{order_id}' AND snapshot_at = {snapshot}"
        )

    def step(self, name: str = "export", **more: Any) -> BackfillResult:
        return self.ledger.do(self.stepping(name, **more))

    async def stepping(self, name: str = "export", **more: Any) -> BackfillResult:
        accounts = {each: Account(base_url="https://norce.example", tokens=(Secret("token"),)) for each in
                    ("fjallboden", "annan")}  # fmt: skip
        norce = Norce(
            accounts, adapter_id="test", timeout=timedelta(seconds=20), transport=httpx.MockTransport(self.answer)
        )
        try:
            routes = Routes({"order-status": CALLBACK}, self.routes, [])
            work = Backfill(routes, norce, self.ledger.store, queue_ids=self.ledger.queues)
            return await work.step(BackfillStep(route=name, by=BY, **more))
        finally:
            await norce.aclose()

    def backfill(self, name: str = "export", **more: Any) -> list[BackfillResult]:
        """Run all steps."""
        results = [self.step(name, **more)]
        while results[-1].after is not None:
            results.append(self.step(name, **more, after=results[-1].after, action=results[-1].action))
        return results

    def added(self, queue: int | None = None) -> list[tuple[str, int]]:
        """Return order and snapshot of each delivery that waits, by order."""
        where = "" if queue is None else f" AND l.queue_id = {queue}"
        return self.ledger.rows(
            "SELECT n.order_id, n.snapshot_at FROM deliveries d JOIN notifications n ON n.id = d.notification_id"
            f" JOIN lanes l ON l.id = d.lane_id WHERE d.state = 'waiting'{where} ORDER BY n.order_id, n.snapshot_at"
        )


@pytest.fixture
def house(ledger: Ledger) -> Iterator[House]:
    """A house whose ledger has no fault after the test."""
    yield House(ledger)
    with ledger.store.read_connection() as connection:
        assert faults(connection) == []


def test_an_order_gets_one_delivery_for_its_newest_notification_that_the_route_wants(house: House) -> None:
    house.receive("a", "accepted", 1)
    house.receive("a", "completed", 2)
    house.receive("b", "accepted", 3)
    house.receive("a", "completed", 4)
    house.receive("a", "removed", 5)

    (result,) = house.backfill()

    assert (result.changed, result.read) == (1, 5)
    assert house.added() == [("a", 4)]
    claim = house.ledger.claim_one()
    assert claim.identity == b"00000004/order-status/" + str(FJALLBODEN).encode() + b"/a"  # of its idempotency key


def test_a_second_backfill_finds_nothing(house: House) -> None:
    house.receive("a", "completed")

    assert [house.backfill()[-1].changed for _ in range(2)] == [1, 0]
    assert house.added() == [("a", 1)]


def _owe(house: House, ends: Ends | None) -> None:
    house.receive("a", "completed", 1, wanted=[(house.ledger.export, True)])
    if ends is not None:
        house.ledger.settle(house.ledger.claim_one(), ends)


@pytest.mark.parametrize("ends", [None, DELIVERED, REJECTED], ids=["waiting", "done", "dead"])
def test_an_order_with_a_delivery_on_the_route_is_passed_over(house: House, ends: Ends | None) -> None:
    _owe(house, ends)
    house.receive("a", "completed", 2)

    assert house.step().changed == 0


def test_a_delivery_on_another_route_or_of_another_merchant_does_not_count(house: House) -> None:
    house.receive("a", "completed", 1, wanted=[(house.ledger.history, False)])
    house.receive("a", "completed", 1, channel=ANNAN, wanted=[(house.ledger.other, True)])

    assert house.step().changed == 1
    assert house.added(house.ledger.export) == [("a", 1)]


def test_deliveries_that_a_route_in_shadow_mode_recorded_do_not_count(house: House) -> None:
    for snapshot in (1, 2):
        house.receive("a", "completed", snapshot, shadows=[house.ledger.export])

    assert house.step().changed == 1
    assert house.added() == [("a", 2)]
    assert len(house.ledger.claim()) == 1


@pytest.mark.parametrize("most", [1, 2, 3, 500])
def test_every_order_gets_one_delivery_whatever_the_size_of_the_steps(house: House, most: int) -> None:
    for number in range(6):
        house.receive(f"order-{number}", "completed", 1)
        house.receive(f"order-{number % 3}", "completed", 2 + number)

    results = house.backfill(most=most)

    assert sum(result.changed for result in results) == 6
    assert [order_id for order_id, _ in house.added()] == [f"order-{number}" for number in range(6)]
    assert house.ledger.rows("SELECT command, who, why, matching, changed FROM actions") == [
        ("backfill", "anna@shop", "the route is new", '{"route":"export"}', 6)
    ]


def test_only_what_was_received_since_a_moment_is_evaluated(house: House) -> None:
    house.receive("a", "completed", 1)
    house.receive("b", "accepted", 2)
    house.receive("b", "completed", 3)
    house.ledger.clock.now += 2 * HOUR
    house.receive("c", "completed", 4)
    house.receive("b", "accepted", 5)

    results = house.backfill(since=house.ledger.clock.now, most=1)

    assert house.added() == [("c", 4)]
    assert sum(result.read for result in results) < 5  # it ends before the last notification


@pytest.mark.parametrize(("given", "channel"), [({"merchant": "annan"}, ANNAN), ({"channel": "1"}, None), ({}, None)])
def test_merchant_and_channel_limit_the_queues(house: House, given: dict[str, str], channel: Channel | None) -> None:
    for each in (FJALLBODEN, ANNAN):
        house.receive("a", "completed", channel=each)

    assert house.step(**given).changed == (1 if channel else 2)
    if channel:
        assert house.added(house.ledger.other) == [("a", 1)]


def test_notifications_of_other_callbacks_and_channels_are_left_alone(house: House) -> None:
    house.receive("a", "completed", callback="cart-status")
    house.receive("b", "completed", channel=Channel("fjallboden", "2"))

    assert house.step().changed == 0


def test_a_condition_that_cannot_be_evaluated_counts_as_on_receipt(house: House) -> None:
    house.routes = [make("export", when=(Condition("/payments/0/state", {"const": "paid"}).compile(),))]
    body = b'{"id": "a", "payments": [{"state": "open"}]}'
    house.ledger.receive(receipt("a", body=body))

    assert house.step().changed == 1


# --- bodies that are gone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "changed"), [("completed", 1), ("accepted", 0)])
def test_an_order_without_a_body_is_read_from_norce(house: House, status: str, changed: int) -> None:
    house.receive("a", None)
    house.at_norce["a"] = status

    result = house.step()

    assert (result.changed, result.unread, house.asked) == (changed, [], ["a"])
    assert len(house.added()) == changed


@pytest.mark.parametrize(
    ("answer", "words"),
    [(httpx.Response(404, json={"code": "order-not-found"}), "no such order"), (httpx.Response(503), "503"),
     (httpx.Response(401), "tokens"), (httpx.Response(200, json=[]), "no order")],
    ids=["deleted", "down", "refused", "no order"],
)  # fmt: skip
def test_an_order_that_norce_does_not_give_is_named(house: House, answer: httpx.Response, words: str) -> None:
    house.receive("a", None)
    house.receive("b", "completed")
    house.at_norce["a"] = answer

    result = house.step()

    assert house.added() == [("b", 1)]
    ((merchant, channel, order_id, reason),) = [
        (each.merchant, each.channel, each.order_id, each.reason) for each in result.unread
    ]
    assert (merchant, channel, order_id) == ("fjallboden", "1", "a")
    assert words in reason


def test_an_older_body_decides_if_the_order_at_norce_is_not_wanted(house: House) -> None:
    house.receive("a", "completed", 1)
    house.receive("a", None, 2)
    house.at_norce["a"] = "removed"

    house.step()

    assert house.added() == [("a", 1)]


def test_an_order_without_a_body_is_named_for_a_route_that_needs_the_body(house: House) -> None:
    for order_id, status in (("a", "completed"), ("b", "accepted")):
        house.receive(order_id, None)
        house.at_norce[order_id] = status

    result = house.step("history")

    assert (result.changed, [each.order_id for each in result.unread]) == (0, ["a"])


def test_few_orders_are_read_from_norce_in_a_step(house: House) -> None:
    for number in range(40):
        house.receive(f"order-{number}", None)
        house.at_norce[f"order-{number}"] = "completed"

    results = house.backfill()

    assert [result.changed for result in results] == [16, 16, 8]
    assert len(house.asked) == 40


def test_a_step_that_finds_nothing_ends_after_its_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill_module, "STEP_SECONDS", 0.0)
    for number in range(3):
        house.receive(f"order-{number}", "accepted")

    assert [result.read for result in house.backfill(most=1)] == [1, 1, 1, 0]


def test_bodies_are_read_a_few_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    bodies = BackfillLedger.bodies

    def watched(self: BackfillLedger, ids: Sequence[int]) -> dict[int, bytes]:
        loaded.append(len(ids))
        return bodies(self, ids)

    monkeypatch.setattr(BackfillLedger, "bodies", watched)
    monkeypatch.setattr(backfill_module, "MAX_BYTES_AT_ONCE", 200)
    for number in range(7):
        house.receive(f"order-{number}", "completed")

    assert house.step().changed == 7
    assert loaded == [2, 2, 2, 1]


# --- a route that does not read the order again ---------------------------------------------------------------------


def test_the_latest_snapshot_counts_on_a_route_that_needs_the_body(house: House) -> None:
    house.receive("a", "completed", 3)
    house.receive("a", "completed", 2)  # came late

    assert sum(result.changed for result in house.backfill("history", most=1)) == 1
    assert house.added() == [("a", 3)]
    assert house.ledger.rows("SELECT position FROM deliveries") == [(3,)]


def test_a_conflict_counts_only_on_a_route_that_reads_the_order_again(house: House) -> None:
    house.receive("a", "accepted")
    house.receive("a", "completed", identity=house.ledger.rows("SELECT identity FROM notifications")[0][0])

    assert house.step("history").changed == 0
    assert house.step("export").changed == 1


def test_no_statement_reads_a_whole_table(house: House) -> None:
    make_many(house.ledger, 3000)
    house.receive("a", "completed")
    store = house.ledger.store

    def run() -> None:
        house.step(most=10)
        house.step("history", most=10)
        known_orders(store, FJALLBODEN, ["a", "done-1"])

    for engine in (store.engine, store._reader):
        for statement, parameters in seen(engine, run):
            assert_no_scan(house.ledger, statement, parameters, ("deliveries", "lanes", "attempts"))
            if "ORDER BY" not in statement:  # these end after the rows of a step
                assert_no_scan(house.ledger, statement, parameters)


# --- preview and refusals -------------------------------------------------------------------------------------------


def test_a_dry_run_names_the_orders_and_changes_nothing(house: House) -> None:
    house.receive("a", "completed", 1)
    house.receive("b", "accepted", 1)
    house.receive("a", "completed", 2)

    results = house.backfill(dry_run=True, most=1)

    assert {each.order_id for result in results for each in result.found} == {"a"}
    assert {result.action for result in results} == {None}
    assert {result.changed for result in results} == {0}
    assert house.added() == []
    assert house.ledger.rows("SELECT 1 FROM actions") == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "no-such"}, "there are: export, history"),
        ({"name": "limits"}, "no notification route limits"),
        ({"name": "silent"}, "shadow"),
        ({"merchant": "nobody"}, "not for this merchant"),
        ({"channel": "9"}, "not for this merchant or channel"),
    ],
)
def test_a_route_that_would_deliver_nothing_is_refused(house: House, given: dict[str, Any], words: str) -> None:
    rules = Callback(name="order-rules", kind="validation")
    house.routes += [make("silent", shadow=True), make("limits", callback=rules)]

    with pytest.raises(ValueError, match=words):
        house.step(**given)


def test_paused_queues_are_named_at_the_end(house: House) -> None:
    house.receive("a", "completed")
    until = house.ledger.clock.now + HOUR
    house.ledger.rows(f"UPDATE queues SET paused_by = 'person', paused_until = {until} WHERE id = {house.ledger.other}")

    first, last = house.backfill(most=1)

    assert (first.paused, last.paused) == ([], [ANNAN])


# --- beside others --------------------------------------------------------------------------------------------------


def test_two_backfills_at_the_same_time_add_one_delivery(house: House) -> None:
    for number in range(20):
        house.receive(f"order-{number}", "completed")

    async def both() -> list[BackfillResult]:
        return await asyncio.gather(*(house.stepping() for _ in range(4)))

    results = house.ledger.do(both())

    assert sum(result.changed for result in results) == 20
    assert len(house.added()) == 20


@pytest.fixture(params=["export", "history"])
def found(request: pytest.FixtureRequest, house: House) -> tuple[BackfillLedger, Callable[[], int]]:
    """A step that has evaluated a notification and has not added the delivery yet."""
    refetch = request.param == "export"
    queue_id = house.ledger.export if refetch else house.ledger.history
    house.receive("a", "completed")
    work = BackfillLedger(
        house.ledger.store, callback="order-status", queue_ids={HISTORY.channel: queue_id}, refetch=refetch
    )
    wanted = work.following(None, 500, None).found
    assert len(wanted) == 1

    def add() -> int:
        added, _ = house.ledger.do(work.add(wanted, BackfillStep(route=request.param, by=BY)))
        return added

    return work, add


def test_a_notification_that_arrives_meanwhile_gets_the_only_delivery(
    house: House, found: tuple[BackfillLedger, Callable[[], int]]
) -> None:
    house.receive("a", "completed", 2, wanted=[(house.ledger.export, True), (house.ledger.history, False)])

    assert found[1]() == 0
    assert house.added(house.ledger.export) == house.added(house.ledger.history) == [("a", 2)]


def test_a_notification_that_arrives_later_supersedes_the_delivery(house: House) -> None:
    house.receive("a", "completed")
    house.step()
    house.receive("a", "completed", 2, wanted=[(house.ledger.export, True)])

    assert house.added() == [("a", 2)]
    assert len(house.ledger.claim()) == 1


def test_a_notification_that_is_pruned_meanwhile_gets_no_delivery(
    house: House, found: tuple[BackfillLedger, Callable[[], int]]
) -> None:
    house.ledger.rows("DELETE FROM notifications")

    assert found[1]() == 0
    assert house.ledger.rows("SELECT 1 FROM deliveries") == []


def test_a_body_that_is_pruned_meanwhile_counts_only_if_the_route_needs_it(
    house: House, found: tuple[BackfillLedger, Callable[[], int]], request: pytest.FixtureRequest
) -> None:
    house.prune("a", 1)

    assert found[1]() == (1 if "export" in request.node.name else 0)


def _retention(**changed: timedelta) -> Retention:
    return Retention(**dict.fromkeys((field.name for field in fields(Retention)), KEPT) | changed)


def test_the_body_of_a_backfilled_notification_is_kept_like_that_of_a_wanted_one(house: House) -> None:
    house.receive("a", "completed")
    house.receive("b", "accepted")
    house.step()
    house.ledger.settle(house.ledger.claim_one())
    house.ledger.clock.now += HOUR

    house.ledger.do(Maintenance(house.ledger.store, _retention(unwanted=timedelta(minutes=1))).step())

    assert house.ledger.rows("SELECT order_id FROM notifications WHERE body IS NOT NULL") == [("a",)]


def test_pruning_passes_a_notification_over_that_is_being_backfilled(postgres_url: str) -> None:
    with opened(postgres_url) as ledger:
        house = House(ledger)
        house.receive("a", "completed")
        house.receive("b", "completed")
        ledger.clock.now += HOUR
        maintenance = Maintenance(ledger.store, _retention(rows=timedelta(minutes=1)))
        host = postgres_url.partition("host=")[2]
        with psycopg.connect(host=host, user="postgres", dbname=database_of(postgres_url)) as other:
            other.execute("SELECT id FROM notifications WHERE order_id = 'a' FOR NO KEY UPDATE")

            pruned = ledger.do(maintenance.step())

            assert pruned.notifications == 1
        assert rows(postgres_url, "SELECT order_id FROM notifications") == [("a",)]
