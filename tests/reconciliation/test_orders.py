"""Reconciliation with Norce's orders finds every order that never came, and brings it once."""

import json
from collections.abc import Iterator
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from adapter.identifiers import Channel
from adapter.ledger.queries import Author
from adapter.norce.client import NorceError
from adapter.reconciliation import orders as orders_module
from adapter.reconciliation.from_config import order_reconciliation
from adapter.reconciliation.orders import OrdersProgress
from adapter.registrations.on_orders import Registrar
from tests.databases import rows
from tests.reconciliation.test_events import CHANNEL, TREE, House, opened

BY = Author(who="anna@shop", why="they were never registered")
HOUR = 3600.0
SECOND_CHANNEL = Channel("norce", "2")
ON_COMPLETED = {
    "order-status": {"kind": "notification", "scope": "/state/currentStatus", "schema": {"const": "completed"}}
}


class Shop:
    """A house beside which orders are made that its callbacks do not know."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.switched_off: set[Channel] = set()
        self.work = order_reconciliation(
            house.config, house.norce, house.intake, house.store, house.metrics, self.switched_off
        )
        self.age()

    def age(self, seconds: float = HOUR) -> None:
        """Let Norce's clock be so far behind, so that what it stores now is so old."""
        self.house.simulator.set_switches(clock_skew_seconds=-seconds)

    def order(self, *statuses: str, channel: Channel = CHANNEL, registered: bool = False) -> str:
        async def make() -> str:
            order_id = await self.house.caller.create({"currency": "SEK"}, channel=channel)
            if registered:
                await Registrar(self.house.config, self.house.norce).register(channel, order_id)
            await self.house.caller.move(order_id, *statuses)
            await self.house.simulator.wait_until_idle()
            return order_id

        return self.house.loop.run(make())

    def lines(self, **given: Any) -> list[OrdersProgress]:
        async def run() -> list[OrdersProgress]:
            return [copy(each) async for each in self.work.run(**given)]

        return self.house.loop.run(run())

    def compare(self, **given: Any) -> OrdersProgress:
        """Return the findings in the first channel."""
        return [each for each in self.lines(**given) if each.channel == CHANNEL.name][-1]

    def missing(self, **given: Any) -> list[str]:
        return [order_id for each in self.lines(**given) for order_id in each.ids]

    def run_if_due(self, every: timedelta = timedelta(days=1)) -> None:
        self.house.loop.run(self.work.run_if_due(every))

    def answer_list(self, answers: list[Any]) -> None:
        """Let Norce answer the next lists of orders with these, and then as before."""
        inner = self.house.line.handle_async_request

        async def handle(request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/checkout/orders") and answers:
                answer = answers.pop(0)
                if callable(answer):
                    listed = await inner(request)
                    await listed.aread()
                    answer = answer(listed)
                if isinstance(answer, Exception):
                    raise answer
                return answer  # type: ignore[no-any-return]
            return await inner(request)

        self.house.line.handle_async_request = handle  # type: ignore[method-assign]


def _listed(*orders: Any, total: int | None = None) -> httpx.Response:
    return httpx.Response(
        200, json={"data": orders, "pagination": {"totalSize": len(orders) if total is None else total}}
    )


def _order(order_id: str, *, hours: float = 1.0, **more: Any) -> dict[str, Any]:
    at = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    state = {"currentStatus": "completed", "transitions": []}
    return {
        "id": order_id,
        "merchant": "norce",
        "channel": "1",
        "created": at,
        "lastModified": at,
        "state": state,
    } | more


@pytest.fixture
def shop(store_url: str, tmp_path: Path) -> Iterator[Shop]:
    with opened(store_url, tmp_path) as house:
        yield Shop(house)


def test_an_order_without_our_registration_is_missing_and_others_are_known(shop: Shop) -> None:
    shop.order("processing", registered=True)
    missing = [shop.order("processing") for _ in range(2)]

    with capture_logs() as logs:
        found = shop.lines()

    assert sorted(order_id for each in found for order_id in each.ids) == sorted(missing)
    last = [each for each in found if each.channel == "1"][-1]
    assert (last.orders, last.missing, last.brought, last.done) == (3, 2, 0, True)
    assert len(shop.house.stored()) == 1  # nothing was brought
    (warning,) = [each for each in logs if each["event"] == "orders_missing"]
    assert (warning["count"], sorted(warning["order_ids"].split())) == (2, sorted(missing))
    assert shop.house.metrics.orders_missing.labels(*CHANNEL)._value.get() == 2


def test_an_order_whose_notification_and_event_are_lost_is_missing(shop: Shop) -> None:
    shop.house.simulator.set_switches(notifications_lost=1.0)
    lost = shop.order("processing", registered=True)

    assert shop.missing() == [lost]


def test_missing_orders_are_brought_once_and_routed_like_any_other(shop: Shop) -> None:
    missing = [shop.order("processing") for _ in range(3)]

    first, again = shop.compare(by=BY), shop.compare(by=BY)

    assert (first.missing, first.brought, again.missing) == (3, 3, 0)
    assert sorted(shop.house.stored()) == sorted((each, "orders", 1) for each in missing)
    actions = rows(shop.house.url, "SELECT command, who, why, changed FROM actions")
    assert actions == [("reconcile-orders", "anna@shop", "they were never registered", 3)]


def test_a_callback_that_comes_after_its_order_was_brought_is_a_repeat(shop: Shop) -> None:
    shop.house.simulator.set_switches(notifications_lost=1.0)
    shop.order("processing", registered=True)
    shop.compare(by=BY)

    async def retry() -> None:
        await shop.house.caller.ask("retry_event", event_id=shop.house.simulator.events()[-1]["id"])
        await shop.house.simulator.wait_until_idle()

    shop.house.loop.run(retry())

    assert [source for _, source, _ in shop.house.stored()] == ["orders"]


def test_an_order_that_changed_within_ten_minutes_is_left_for_the_next_run(shop: Shop) -> None:
    shop.age(9 * 60)
    young = shop.order("processing")

    assert (shop.compare().young, shop.missing(), shop.compare(by=BY).brought) == (1, [], 0)
    shop.age()
    old = shop.order("processing")
    assert young not in shop.missing()
    assert shop.missing() == [old]


def test_a_change_far_in_the_future_does_not_keep_an_order_young(shop: Shop) -> None:
    ahead = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    shop.answer_list([_listed(_order("a", lastModified=ahead))])

    assert shop.missing() == ["a"]


@pytest.mark.parametrize(
    ("statuses", "missing"), [((), 0), (("processing",), 1), (("processing", "checkout"), 1)], ids=str
)
def test_an_order_in_its_first_state_leaves_no_event_and_is_not_missing(
    shop: Shop, statuses: tuple[str, ...], missing: int
) -> None:
    shop.order(*statuses)

    assert shop.compare().missing == missing


@pytest.mark.parametrize(("changed", "missing"), [({}, []), ({"lastModified": "2026-01-01T00:00:00Z"}, ["a"])])
def test_an_untouched_order_is_not_missing_for_a_callback_of_another_part(
    tmp_path: Path, store_url: str, changed: dict[str, str], missing: list[str]
) -> None:
    callbacks = {"order-status": {"kind": "notification", "scope": "/cart", "schema": {"type": "object"}}}
    state = {"currentStatus": "checkout", "transitions": [{"status": "checkout"}]}
    with opened(store_url, tmp_path, callbacks=callbacks) as house:
        shop = Shop(house)
        shop.answer_list([_listed(_order("a", state=state, cart={}, **changed))])

        assert shop.missing() == missing


def test_only_orders_that_a_callback_wants_are_missing(tmp_path: Path, store_url: str) -> None:
    with opened(store_url, tmp_path, callbacks=ON_COMPLETED) as house:
        shop = Shop(house)
        shop.order("processing")
        wanted = shop.order("processing", "accepted", "completed")

        assert shop.missing() == [wanted]


def test_an_order_that_no_route_wanted_is_known(tmp_path: Path, store_url: str) -> None:
    routes = {"export": TREE["routes"]["export"] | {"when": {"scope": "/total/none", "schema": {"const": 1}}}}
    with opened(store_url, tmp_path, routes=routes) as house:
        shop = Shop(house)
        shop.order("processing", registered=True)

        assert [deliveries for *_, deliveries in house.stored()] == [0]
        assert shop.missing() == []


def test_an_order_that_every_route_delivered_is_known_although_its_callback_has_another_name(
    tmp_path: Path, store_url: str
) -> None:
    with opened(store_url, tmp_path) as house:
        Shop(house).order("processing", registered=True)
        rows(house.url, "UPDATE notifications SET callback = 'order-state'")

        assert Shop(house).missing() == []
        rows(house.url, "UPDATE queues SET route = 'another'")
        assert len(Shop(house).missing()) == 1


def test_an_order_of_another_channel_or_that_cannot_be_read_is_left_alone(shop: Shop) -> None:
    shop.answer_list(
        [
            _listed(
                _order("a"), _order("b", channel="2"), _order("c", merchant="other"), "text", {"id": 7},
                _order("d", created=None), _order("e", cart=[[]] * 10),
            )
        ]
    )  # fmt: skip

    found = shop.lines()

    assert [order_id for each in found for order_id in each.ids] == ["a", "e"]
    assert [each for each in found if each.channel == "1"][-1].others == 5


def test_only_orders_created_since_a_moment_are_compared(shop: Shop) -> None:
    shop.age(60 * HOUR)
    old = shop.order("processing")
    shop.age()
    new = shop.order("processing")

    assert shop.missing() == [new]
    assert shop.missing(since=datetime.now(UTC) - timedelta(hours=61)) == [new, old]


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_every_order_is_found_whichever_way_norce_sorts(shop: Shop, direction: str) -> None:
    shop.house.simulator.set_switches(clock_skew_seconds=-HOUR)
    orders = [_order(f"order-{number}", hours=1 + number / 100) for number in range(250)]
    ordered = orders if direction == "desc" else orders[::-1]

    def page(offset: int, limit: int) -> httpx.Response:
        return _listed(*ordered[offset : offset + limit], total=len(ordered))

    inner = shop.house.line.handle_async_request

    async def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/checkout/orders") and request.headers["x-channel"] == "1":
            return page(int(request.url.params["offset"]), int(request.url.params["limit"]))
        return await inner(request)

    shop.house.line.handle_async_request = handle  # type: ignore[method-assign]

    assert sorted(shop.missing()) == sorted(order["id"] for order in orders)


def test_an_order_that_a_shifted_page_shows_again_is_named_once(shop: Shop) -> None:
    one, two = _order("a"), _order("b")
    shop.answer_list([_listed(one, two, total=3), _listed(one, two, total=4), _listed(two, total=3)])

    found = shop.lines()

    ids = [order_id for each in found for order_id in each.ids]
    assert sorted(ids) == ["a", "b"]


def test_an_order_that_changes_or_is_deleted_while_it_is_brought_is_brought_as_it_is_then(
    tmp_path: Path, store_url: str
) -> None:
    with opened(store_url, tmp_path, callbacks=ON_COMPLETED) as house:
        shop = Shop(house)
        stays, changes, deleted = (shop.order("processing", "accepted", "completed") for _ in range(3))

        def change(answer: httpx.Response) -> httpx.Response:
            house.simulator.records.orders[changes]["state"]["currentStatus"] = "removed"
            del house.simulator.records.orders[deleted]
            return httpx.Response(200, content=answer.content)

        shop.answer_list([change])

        found = shop.compare(by=BY)

        assert (found.missing, found.brought) == (3, 1)
        assert house.stored() == [(stays, "orders", 1)]


def test_a_channel_whose_orders_cannot_be_listed_does_not_stop_the_others(shop: Shop) -> None:
    other = shop.order("processing", channel=SECOND_CHANNEL)
    shop.answer_list([httpx.Response(500)])
    found: list[OrdersProgress] = []

    async def run() -> None:
        async for each in shop.work.run():
            found.append(copy(each))

    with pytest.raises(NorceError, match=r"^norce, channel 1: Norce answered 500[^;]*$"):
        shop.house.loop.run(run())

    assert [order_id for each in found for order_id in each.ids] == [other]
    assert [(each.channel, each.done, each.error is None) for each in found if each.done or each.error] == [
        ("1", False, False), ("2", True, True),
    ]  # fmt: skip


def test_norce_failing_in_the_middle_leaves_what_was_found(shop: Shop) -> None:
    page = _listed(*(_order(f"order-{number}", hours=1 + number / 100) for number in range(100)), total=250)
    shop.answer_list([page, page, httpx.Response(503)])

    with capture_logs() as logs, pytest.raises(NorceError):
        shop.lines()

    (warning,) = [each for each in logs if each["event"] == "orders_missing"]
    assert warning["count"] == 100
    assert 0 < len(warning["order_ids"]) <= orders_module.LONGEST_IDS


# --- by itself ------------------------------------------------------------------------------------------------------


def test_a_periodic_run_reports_and_brings_nothing_and_one_node_has_the_turn(shop: Shop) -> None:
    shop.house.loop.run(shop.house.watermarks.put("reconciled since norce", 0))
    shop.order("processing")

    with capture_logs() as logs:
        shop.run_if_due()
        shop.run_if_due()

    assert [each["count"] for each in logs if each["event"] == "orders_missing"] == [1]
    assert shop.house.stored() == []


def test_the_first_periodic_run_leaves_out_orders_from_before_the_ledger(shop: Shop) -> None:
    shop.order("processing")

    with capture_logs() as logs:
        shop.run_if_due()

    assert [each for each in logs if each["event"] == "orders_missing"] == []


def test_a_channel_that_is_switched_off_is_left_out_of_a_periodic_run(shop: Shop) -> None:
    shop.house.loop.run(shop.house.watermarks.put("reconciled since norce", 0))
    shop.order("processing")
    shop.switched_off.add(CHANNEL)

    with capture_logs() as logs:
        shop.run_if_due()

    assert [each for each in logs if each["event"] == "orders_missing"] == []
    assert len(shop.missing()) == 1


def test_a_periodic_run_that_failed_is_repeated_after_an_hour(shop: Shop) -> None:
    shop.house.loop.run(shop.house.watermarks.put("reconciled since norce", 0))
    shop.answer_list([httpx.Response(500)])

    shop.run_if_due()

    turn = shop.house.loop.run(shop.house.watermarks.value("orders reconciled"))
    due_in = turn + 86_400_000 - shop.house.store.clock()
    assert 3_590_000 < due_in <= 3_600_000


def test_an_order_in_a_log_line_is_its_id_alone(shop: Shop) -> None:
    canary = "19811218-9876"
    shop.answer_list([_listed(_order("a", customer={"billing": {"nationalIdentificationNumber": canary}}))])

    with capture_logs() as logs:
        shop.lines()

    assert canary not in json.dumps(logs, default=str)
