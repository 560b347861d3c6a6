"""Scenarios: purchases that are played against a running service.

A scenario creates orders at a simulator, registers the service's callbacks on them and moves the orders through the
API. It fails if an order is lost, doubled or ends otherwise. The 200 that a notification gets does not show what became
of the order, so `play` also reads the service's ledger.
"""

import asyncio
import copy
import inspect
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import httpx

from adapter.identifiers import Channel
from adapter.sandbox.caller import Caller, Unexpected, codes
from adapter.sandbox.norce import Simulator
from adapter.sandbox.norce.orders import ACCEPTED, CHECKOUT, COMPLETED, DECLINED, PROCESSING, REMOVED, money

PATIENCE_SECONDS = 60.0
AT_ONCE = 32  # orders of a burst in parallel; more would keep validations waiting beyond Norce's three seconds
_PERSON = {
    "type": "person",
    "givenName": "Tove",
    "familyName": "Testsson",
    "streetAddress": "Provgatan 12",
    "postalCode": "411 23",
    "city": "Göteborg",
    "country": "SE",
    "email": "tove.testsson@example.com",
}
_LINE = {
    "reference": "1",
    "name": "Ullstrumpor, 3-pack",
    "sku": "SOCK-3P",
    "quantity": 2,
    "price": {"includingVat": 129.0, "excludingVat": 103.2},
    "total": {"includingVat": 258.0, "excludingVat": 206.4},
    "vatRate": 0.25,
}
_UPSOLD = {
    "reference": "2",
    "name": "Mössa",
    "sku": "CAP-12",
    "quantity": 1,
    "total": {"includingVat": 249.0, "excludingVat": 199.2},
    "vatRate": 0.25,
    "upsell": True,
}
_ORDER = {
    "culture": "sv-SE",
    "currency": "SEK",
    "country": "SE",
    "cart": {"reference": "56393", "items": [_LINE]},
    "customer": {"type": "person", "billing": _PERSON, "shipping": _PERSON},
    "consents": [{"id": "terms", "checked": True, "text": "Jag godkänner köpvillkoren", "required": True}],
}

# Members of a sample that a new order takes; the rest is Norce's, or follows.
_GIVEN = ("culture", "currency", "country", "cart", "customer", "consents", "attributes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceUnderTest:
    """The parts of a service that a scenario uses."""

    channels: tuple[Channel, ...]
    registrations: Callable[[Channel, str], Iterable[tuple[str, dict[str, Any]]]]
    """For a channel and an order id: the operations that register its callbacks, with their bodies."""
    deliveries: Callable[[str | None], list[dict[str, Any]]]
    """The deliveries of one state or of all: `order_id`, `route`, `state`, `reason`, `merchant`, `channel`."""


class _Connection(httpx.AsyncHTTPTransport):
    """The connection from Norce to the service. While `is_cut`, every request fails."""

    is_cut = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_cut:
            raise httpx.ConnectError("the connection is cut", request=request)
        return await super().handle_async_request(request)


class Shop(Caller):
    """A shop with a Norce Checkout of its own, which the service must be able to reach.

    Its orders are copies of `sample`, with the payments and shippings that the sample has, of any adapter. A sample of
    a channel of the service is bought there.
    """

    def __init__(
        self, token: str, service: ServiceUnderTest, *, sample: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Create a shop. The options are those of `Simulator`."""
        self.service = service
        self.sample: Mapping[str, Any] = _ORDER if sample is None else sample
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        self.connection = _Connection(limits=limits, trust_env=False)
        own = Channel(str(self.sample.get("merchant")), str(self.sample.get("channel")))
        channel = own if own in service.channels else service.channels[0]
        super().__init__(Simulator(token=token, transport=self.connection, **options), token, channel)

    async def __aenter__(self) -> Self:
        await self.simulator.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await super().__aexit__(*failure)
        await self.simulator.__aexit__(*failure)

    async def order(self, *, channel: Channel | None = None, **members: Any) -> str:
        """Create an order with the service's callbacks on it, and return its id."""
        given = {name: copy.deepcopy(self.sample[name]) for name in _GIVEN if self.sample.get(name) is not None}
        order_id = await self.create(given | {"reference": self.simulator.new_id("")} | members, channel=channel)
        for part, name in (("shippings", "add_shipping"), ("payments", "add_payment")):
            for each in self.sample.get(part) or ():
                if each.get("state") != REMOVED:
                    await self.ask(name, each, order_id=order_id)
        for name, registration in self.service.registrations(self.channels[order_id], order_id):
            await self.ask(name, registration, order_id=order_id)
        return order_id

    async def pay(self, order_id: str) -> str:
        """Return the id of the order's own payment if it covers the total, or start one."""
        order = await self.read(order_id)
        own = [each for each in order["payments"] if each["state"] != REMOVED]
        return str(own[-1]["id"]) if own and _uncovered(order) == 0 else await super().pay(order_id)

    async def reserve(self, order_id: str, payment_id: str) -> None:
        """Reserve what other payments do not cover, as a payment adapter does on acceptance."""
        its: dict[str, Any] = {"order_id": order_id, "payment_id": payment_id}
        payment = await self.ask("read_payment", **its)
        amount = round(payment["amount"] + _uncovered(await self.read(order_id)), 2)
        await self.ask("put_payment", {**payment, "amount": amount, "state": "reserved"}, **its)

    async def buy(self, order_id: str) -> None:
        """Pay the order and complete it. The payment adapter calls the validations."""
        await self.ask("complete_payment", order_id=order_id, payment_id=await self.pay(order_id))

    async def accept(self, order_id: str) -> str:
        """Pay and validate the order, move it to `accepted`, and return the id of its payment."""
        payment_id = await self.pay(order_id)
        await self.ask("validate", order_id=order_id)
        await self.move(order_id, PROCESSING, ACCEPTED)
        return payment_id

    async def retry(self, order_id: str) -> None:
        """Let Norce retry its last event of an order, as a person can."""
        events = self.simulator.events(order_id)
        expect("an event", bool(events), True)
        await self.ask("retry_event", event_id=events[-1]["id"], channel=self.channels[order_id])
        await self.simulator.wait_until_idle()

    def notified(self, order_id: str) -> list[tuple[str, list[int | None]]]:
        """Return the order's status in each event, with the answers to its attempts."""
        return [
            (event["payload"]["order"]["state"]["currentStatus"], [each["status"] for each in event["attempts"]])
            for event in self.simulator.events(order_id)
        ]

    def deliveries(self) -> dict[str, list[dict[str, Any]]]:
        """Return the deliveries of every order of this shop."""
        deliveries: dict[str, list[dict[str, Any]]] = {order_id: [] for order_id in self.channels}
        for each in self.service.deliveries(None):
            deliveries.get(each["order_id"], []).append(each)
        return deliveries

    async def finished_deliveries(self) -> dict[str, list[dict[str, Any]]]:
        """Wait until every delivery has ended and return them all, or raise `Unexpected`."""
        await self.simulator.wait_until_idle()
        ends = time.monotonic() + PATIENCE_SECONDS
        while waiting := [each for each in self.service.deliveries("waiting") if each["order_id"] in self.channels]:
            if time.monotonic() > ends:
                raise Unexpected(f"{len(waiting)} deliveries are still waiting after {PATIENCE_SECONDS:g} s")
            await asyncio.sleep(0.05)
        return self.deliveries()

    async def expect_status(self, order_id: str, status: str) -> None:
        expect("status", (await self.read(order_id))["state"]["currentStatus"], status)

    async def expect_delivered(self, order_id: str, *reasons: str) -> None:
        """Expect the order's deliveries to end with these reasons."""
        deliveries = (await self.finished_deliveries())[order_id]
        expect("deliveries", sorted(str(each["reason"]) for each in deliveries), sorted(reasons))


def _uncovered(order: dict[str, Any]) -> float:
    """Return the part of the total that no payment covers."""
    paid = sum(money(each["amount"]) for each in order["payments"] if each["state"] != REMOVED)
    return round(money((order["total"] or {}).get("includingVat")) - paid, 2)


def expect(what: str, found: Any, expected: Any) -> None:
    """Raise `Unexpected` if the values differ."""
    if found != expected:
        raise Unexpected(f"{what}: {found!r}, not {expected!r}")


# --- the scenarios; the documentation shows the first line of each ----------------------------------------------------


async def happy_purchase(shop: Shop) -> None:
    """Ship, pay, validate and complete an order; deliver once."""
    order_id = await shop.order()
    shipping = await shop.ask("start_shipping", order_id=order_id)
    await shop.ask("complete_shipping", order_id=order_id, shipping_id=shipping["shippingId"])
    await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.buy(order_id)
    await shop.expect_status(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")
    expect("events", shop.notified(order_id), [(ACCEPTED, [200]), (COMPLETED, [200])])


async def validation_denied_and_mended(shop: Shop) -> None:
    """Deny an order without an email address; with an address it is bought."""
    customer = {"type": "person", "billing": {**_PERSON, "email": None}, "shipping": _PERSON}
    order_id = await shop.order(customer=customer)
    payment_id = await shop.pay(order_id)
    expect("validation", codes(await shop.ask("validate", order_id=order_id, status=400)), ["email-missing"])
    await shop.ask("complete_payment", order_id=order_id, payment_id=payment_id, status=400)
    await shop.expect_status(order_id, CHECKOUT)
    expect("events", shop.notified(order_id), [])
    await shop.ask("put_billing", _PERSON, order_id=order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.buy(order_id)
    await shop.expect_status(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def declined_after_acceptance(shop: Shop) -> None:
    """Decline an accepted order; it is not delivered and can no longer be completed."""
    order_id = await shop.order()
    await shop.accept(order_id)
    await shop.move(order_id, DECLINED)
    refusal = await shop.ask("put_state", {"currentStatus": COMPLETED}, order_id=order_id, status=400)
    expect("refusal", codes(refusal), ["order-error"])
    await shop.expect_status(order_id, DECLINED)
    await shop.expect_delivered(order_id)
    expect("events", shop.notified(order_id), [(ACCEPTED, [200]), (DECLINED, [200])])


async def voucher(shop: Shop) -> None:
    """Pay with a gift card, which covers a part only, and a second payment; deliver once."""
    order_id = await shop.order()
    card = {"adapterId": "awardit_adapter", "name": "Presentkort", "type": "voucher", "amount": 200.0}
    await shop.ask("add_payment", card | {"state": "confirmed", "reference": "GC-1"}, order_id=order_id)
    refusal = await shop.ask("validate", order_id=order_id, status=400)
    expect("validation", codes(refusal), ["payment-amount-mismatch"])
    await shop.buy(order_id)
    order = await shop.read(order_id)
    expect("payments", [each["amount"] for each in order["payments"]], [200.0, 58.0])
    expect("status", order["state"]["currentStatus"], COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def upsell_window(shop: Shop) -> None:
    """Add lines to an accepted order: only upsold ones to which the hook agrees pass."""
    order_id = await shop.order()
    payment_id = await shop.accept(order_id)
    cart = (await shop.read(order_id))["cart"]
    del cart["total"]

    async def add(line: dict[str, Any], status: int) -> list[str]:
        lines = [*cart["items"], line]
        return codes(await shop.ask("put_cart", {**cart, "items": lines}, order_id=order_id, status=status))

    expect("not upsold", await add({**_UPSOLD, "upsell": False}, 400), ["order-error"])
    expect("twelve upsold", await add({**_UPSOLD, "quantity": 12}, 400), ["too-many-of-a-kind"])
    await add(_UPSOLD, 200)
    expect("lines", len((await shop.read(order_id))["cart"]["items"]), 2)
    await shop.reserve(order_id, payment_id)
    await shop.move(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def address_change(shop: Shop) -> None:
    """Move the address to the far north; the address hook patches the shipping."""
    order_id = await shop.order()
    await shop.ask("start_shipping", order_id=order_id)
    north = {**_PERSON, "postalCode": "981 37", "city": "Kiruna"}
    await shop.ask("put_shipping_address", north, order_id=order_id)
    order = await shop.read(order_id)
    expect("city", order["customer"]["shipping"]["city"], "Kiruna")
    expect("shipping", order["shippings"][0]["attributes"], {"zone": "far-north"})
    await shop.buy(order_id)
    await shop.expect_status(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def back_to_checkout(shop: Shop) -> None:
    """Cancel a payment, change the cart, pay again and complete; deliver once."""
    order_id = await shop.order()
    payment_id = await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING)
    cart = {"reference": "56393", "items": [{**_UPSOLD, "upsell": False}]}
    await shop.ask("put_cart", cart, order_id=order_id, status=400)
    await shop.ask("cancel_payment", order_id=order_id, payment_id=payment_id)
    await shop.expect_status(order_id, CHECKOUT)
    await shop.ask("put_cart", cart, order_id=order_id)
    await shop.buy(order_id)
    order = await shop.read(order_id)
    statuses = [each["status"] for each in order["state"]["transitions"]]
    expect("transitions", statuses, [CHECKOUT, PROCESSING, CHECKOUT, PROCESSING, ACCEPTED, COMPLETED])
    payments = [(each["state"], each["amount"]) for each in order["payments"]]
    expect("payments", payments, [(REMOVED, 258.0), ("reserved", 249.0)])
    await shop.expect_delivered(order_id, "delivered")


async def captured_after_completion(shop: Shop) -> None:
    """Capture the payment of a completed order; nothing more is delivered."""
    order_id = await shop.order()
    await shop.buy(order_id)
    await shop.finished_deliveries()
    its = {"order_id": order_id, "payment_id": (await shop.read(order_id))["payments"][-1]["id"]}
    captured = {**(await shop.ask("read_payment", **its)), "state": "captured"}
    await shop.ask("put_payment", captured, **its)
    await shop.ask("add_transaction", {"type": "capture", "amount": captured["amount"], "success": True}, **its)
    expect("payment", (await shop.ask("read_payment", **its))["state"], "captured")
    await shop.expect_delivered(order_id, "delivered")
    expect("events", shop.notified(order_id), [(ACCEPTED, [200]), (COMPLETED, [200])])


async def two_merchants(shop: Shop) -> None:
    """Buy from two merchants at the same time; each delivery belongs to its own merchant."""
    channels = shop.service.channels[:2]
    if len(channels) < 2:
        raise Unexpected("the service's configuration has only one channel")
    order_ids = [await shop.order(channel=each) for each in channels]
    for order_id, other in zip(order_ids, reversed(channels), strict=True):
        await shop.ask("read_order", order_id=order_id, channel=other, status=404)
    await asyncio.gather(*map(shop.buy, order_ids))
    deliveries = await shop.finished_deliveries()
    for order_id, channel in zip(order_ids, channels, strict=True):
        its = [(each["merchant"], each["channel"], each["reason"]) for each in deliveries[order_id]]
        expect("deliveries", its, [(*channel, "delivered")])


async def burst(shop: Shop, orders: int = 100) -> None:
    """Create, validate and complete many orders in parallel; deliver each once."""
    at_once = asyncio.Semaphore(AT_ONCE)

    async def purchase() -> str:
        async with at_once:
            order_id = await shop.order()
            await shop.buy(order_id)
            return order_id

    order_ids = await asyncio.gather(*(purchase() for _ in range(orders)))
    deliveries = await shop.finished_deliveries()
    expect("deliveries", Counter(len(deliveries[each]) for each in order_ids), {1: orders})
    reasons = Counter(each["reason"] for order_id in order_ids for each in deliveries[order_id])
    expect("reasons", reasons, {"delivered": orders})
    statuses = Counter(shop.simulator.order(each)["state"]["currentStatus"] for each in order_ids)
    expect("statuses", statuses, {COMPLETED: orders})


async def outage(shop: Shop) -> None:
    """Cut the connection: nothing is bought unvalidated, and a retried event is delivered."""
    order_id = await shop.order()
    payment_id = await shop.pay(order_id)
    shop.connection.is_cut = True
    refusal = await shop.ask("complete_payment", order_id=order_id, payment_id=payment_id, status=400)
    expect("validation", codes(refusal), ["validation-failed"])
    await shop.expect_status(order_id, CHECKOUT)
    shop.connection.is_cut = False
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING, ACCEPTED)
    await shop.reserve(order_id, payment_id)
    await shop.simulator.wait_until_idle()
    shop.connection.is_cut = True
    await shop.move(order_id, COMPLETED)
    await shop.expect_delivered(order_id)
    expect("events", shop.notified(order_id), [(ACCEPTED, [200]), (COMPLETED, [None])])
    shop.connection.is_cut = False
    for _ in range(2):
        await shop.retry(order_id)
    expect("events", shop.notified(order_id)[-1], (COMPLETED, [None, 200, 200]))
    await shop.expect_delivered(order_id, "delivered")


async def removed_order(shop: Shop) -> None:
    """Remove an order: no delivery. Delete one before its event arrives: a dead letter."""
    removed = await shop.order()
    await shop.move(removed, PROCESSING, REMOVED)
    deleted = await shop.order()
    shop.connection.is_cut = True
    await shop.move(deleted, PROCESSING, ACCEPTED, COMPLETED)
    await shop.simulator.wait_until_idle()
    shop.connection.is_cut = False
    await shop.ask("delete_order", order_id=deleted)
    await shop.ask("read_order", order_id=deleted, status=404)
    await shop.retry(deleted)
    await shop.expect_delivered(deleted, "rejected")
    await shop.expect_delivered(removed)
    await shop.expect_status(removed, REMOVED)


Scenario = Callable[..., Awaitable[None]]
SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        each.__name__.replace("_", "-"): each
        for each in (
            happy_purchase,
            validation_denied_and_mended,
            declined_after_acceptance,
            voucher,
            upsell_window,
            address_change,
            back_to_checkout,
            captured_after_completion,
            two_merchants,
            burst,
            outage,
            removed_order,
        )
    }
)

# Scenarios that expect nothing of the sample's lines, addresses and amounts.
WITH_ANY_ORDER = ("happy-purchase", "declined-after-acceptance", "captured-after-completion", "two-merchants", "burst",
                  "outage", "removed-order")  # fmt: skip


def description(name: str) -> str:
    """Return the sentence that describes a scenario."""
    return inspect.getdoc(SCENARIOS[name]) or ""


async def play(name: str, shop: Shop, **settings: Any) -> dict[str, Any]:
    """Play a scenario and return the result in counts.

    Returns:
        `unmet` is the expectation that failed, or None. `lost` counts completed orders without a delivery, `doubled`
        orders with two deliveries on one route.
    """
    began = time.monotonic()
    unmet = None
    try:
        await SCENARIOS[name](shop, **settings)
        deliveries = await shop.finished_deliveries()
    except Unexpected as error:
        unmet = str(error)
        deliveries = shop.deliveries()
    # Only this shop's: the simulator may have served others before.
    statuses = {
        each["id"]: each["state"]["currentStatus"] for each in shop.simulator.orders() if each["id"] in deliveries
    }
    events = [each for each in shop.simulator.events() if each["orderId"] in deliveries]
    completed = {order_id for order_id, status in statuses.items() if status == COMPLETED}
    completed |= {each["orderId"] for each in events if each["payload"]["order"]["state"]["currentStatus"] == COMPLETED}
    lost = sum(not deliveries[order_id] for order_id in completed)
    doubled = sum(len({each["route"] for each in its}) < len(its) for its in deliveries.values())
    if unmet is None and (lost or doubled):
        unmet = f"{lost} lost, {doubled} doubled"
    return {
        "scenario": name,
        "unmet": unmet,
        "orders": dict(Counter(statuses.values())),
        "events": len(events),
        "deliveries": dict(Counter(each["reason"] or each["state"] for its in deliveries.values() for each in its)),
        "lost": lost,
        "doubled": doubled,
        "seconds": round(time.monotonic() - began, 1),
    }
