"""`adapter.deliveries`: one effect at the destination, whatever gateways answer and wherever a handler fails."""

from collections import Counter
from datetime import timedelta
from typing import Any

import httpx
import pytest

from adapter.plugin import Context, Done, Notification, NotificationHandler, Settings, Skip, Url
from adapter.routing.routes import Route
from tests.asynchronous import asynchronous
from tests.deliveries import harness
from tests.deliveries.harness import SECOND, working

SHOP = "https://shop.example"


class ShopSettings(Settings, frozen=True, kw_only=True):
    url: Url = Url(SHOP)


class Invoices(httpx.AsyncBaseTransport):
    """A shop behind a gateway. It writes every invoice that arrives; `answers` are those of the gateway."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers = list(answers)
        self.written: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        order_id = request.url.path.rpartition("/")[2]
        if request.method == "GET":
            return httpx.Response(200 if self.written[order_id] else 404, json={"number": "I-7"})
        self.written[order_id] += 1
        return self.answers.pop(0) if self.answers else httpx.Response(201, json={"number": "I-7"})


class Export(NotificationHandler[ShopSettings]):
    """Contains only the success path. `broken` are orders on which its mapping fails."""

    broken: frozenset[str] = frozenset()

    async def deliver(self, notification: Notification, context: Context[ShopSettings]) -> Done | Skip:
        if notification.order.id in self.broken and notification.order.currency is None:
            raise KeyError("currency")
        answer = await context.http.post(f"{context.settings.url}/invoices/{notification.order.id}")
        return Done(answer.raise_for_status().json()["number"])


class ExportWithLookup(Export):
    async def lookup(self, notification: Notification, context: Context[ShopSettings]) -> Done | None:
        answer = await context.http.get(f"{context.settings.url}/invoices/{notification.order.id}")
        return None if answer.status_code == 404 else Done(answer.raise_for_status().json()["number"])


def route(handler: NotificationHandler[Any]) -> Route:
    return harness.route(handler, settings={("fjallboden", "1"): ShopSettings()})


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
@asynchronous
async def test_a_write_that_was_done_and_answered_by_a_gateway_is_not_sent_again(store_url: str, status: int) -> None:
    shop = Invoices(httpx.Response(status, headers={"retry-after": "300"}))
    async with working(store_url, route(ExportWithLookup()), destination=shop) as work:
        await work.owe()
        row = await work.settled()
        assert (row["state"], row["in_doubt"]) == ("waiting", True)
        assert work.paused_until() == work.clock.now + 300_000

        work.move_to(row["next_at"])
        row = await work.settled()

        assert (row["state"], row["reason"], row["reference"]) == ("done", "delivered", "I-7")
        assert shop.written == {"order-1": 1}


@asynchronous
async def test_without_a_lookup_a_person_decides_about_a_write_that_a_gateway_answered(store_url: str) -> None:
    shop = Invoices(httpx.Response(503))
    async with working(store_url, route(Export()), destination=shop) as work:
        await work.owe()

        row = await work.settled()

        assert (row["state"], row["reason"]) == ("dead", "unknown")
        assert row["attempts"][0]["message"] == "POST /invoices/… was answered 503"
        assert shop.written == {"order-1": 1}


@asynchronous
async def test_a_bug_before_any_write_neither_holds_its_lane_nor_doubles_anything(store_url: str) -> None:
    shop, handler = Invoices(), Export()
    handler.broken = frozenset({"order-1"})
    async with working(store_url, route(handler), destination=shop) as work:
        await work.owe()
        row = await work.settled()
        assert (row["state"], row["reason"], row["code"], row["in_doubt"]) == (
            "dead", "broken", "handler-failed", False,
        )  # fmt: skip

        work.move_to(work.clock.now + int(timedelta(minutes=1) / SECOND) * 1000)
        await work.owe(snapshot=2, currency="SEK")
        row = await work.settled()

        assert (row["state"], row["reason"]) == ("done", "delivered")
        assert shop.written == {"order-1": 1}


@asynchronous
async def test_a_bug_on_every_order_pauses_the_queue(store_url: str) -> None:
    shop, handler = Invoices(), Export()
    handler.broken = frozenset(f"order-{number}" for number in range(20))
    async with working(store_url, route(handler), destination=shop, slots=1) as work:
        for number in range(20):
            await work.owe(f"order-{number}")
        await work.quiet()

        assert work.states() == {("dead", "broken"): 5, ("waiting", None): 15}
        assert list(work.pauses().values()) == ["handler-failed"]
