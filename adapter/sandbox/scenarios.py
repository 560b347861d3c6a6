"""
Purchases as they go in a shop, played against a running adapter: orders are created here, the adapter's callbacks are
registered on them, and the order service and its neighbours do the rest.

A scenario says what it promises by `expect`. What one would get wrong: that Norce had its 200 shows nothing of what
became of the order. `play` looks into the adapter's ledger as well, where nothing may be lost and nothing doubled.
"""

import asyncio
import copy
import inspect
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import httpx

from adapter.sandbox.caller import Caller, Unmet, codes
from adapter.sandbox.norce import Simulator
from adapter.sandbox.norce.orders import ACCEPTED, CHECKOUT, COMPLETED, DECLINED, PROCESSING, REMOVED

PATIENCE_SECONDS = 60.0
AT_ONCE = 32  # orders of a burst that are under way: each waits for our callbacks, which Norce gives three seconds
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What has to be known of the adapter that is tried."""

    shops: tuple[tuple[str, str], ...]
    """Merchant and channel of each that it serves."""
    registrations: Callable[[str, str, str], Iterable[tuple[str, dict[str, Any]]]]
    """For merchant, channel and order id: the operations that register its callbacks, with their bodies."""
    deliveries: Callable[[str | None], list[dict[str, Any]]]
    """What its ledger holds, of one state or of all: `order_id`, `route`, `state` and `reason` of each."""


class _Line(httpx.AsyncHTTPTransport):
    """The way from Norce to the adapter. Where it is cut, nobody is reached."""

    is_cut = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_cut:
            raise httpx.ConnectError("the line is cut", request=request)
        return await super().handle_async_request(request)


class Shop(Caller):
    """
    A Norce Checkout of its own (`simulator`, which the adapter has to be able to reach) and who buys there. `given` is
    for the `Simulator`.
    """

    def __init__(self, token: str, adapter: Adapter, **given: Any) -> None:
        self.adapter = adapter
        self.line = _Line(limits=httpx.Limits(max_connections=200, max_keepalive_connections=50), trust_env=False)
        super().__init__(Simulator(token=token, transport=self.line, **given), token, adapter.shops[0])

    async def __aenter__(self) -> Self:
        await self.simulator.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await super().__aexit__(*failure)
        await self.simulator.__aexit__(*failure)

    async def order(self, *, shop: tuple[str, str] | None = None, **members: Any) -> str:
        """A new order with the adapter's callbacks on it; its id."""
        reference = self.simulator.new_id("")
        order_id = await self.create(copy.deepcopy(_ORDER) | {"reference": reference} | members, shop=shop)
        for name, registration in self.adapter.registrations(*self.whose[order_id], order_id):
            await self.ask(name, registration, order_id=order_id)
        return order_id

    async def reserve(self, order_id: str, payment_id: str) -> None:
        """The payment covers all of the order, as a payment adapter has it when the order is accepted."""
        order = await self.read(order_id)
        amount = order["total"]["includingVat"]
        [payment] = [each for each in order["payments"] if each["id"] == payment_id]
        changed = {**payment, "amount": amount, "state": "reserved"}
        await self.ask("put_payment", changed, order_id=order_id, payment_id=payment_id)

    async def buy(self, order_id: str) -> None:
        """The purchase, from the payment to `completed`. It asks the validations by itself."""
        await self.ask("complete_payment", order_id=order_id, payment_id=await self.pay(order_id))

    async def retry(self, order_id: str) -> None:
        """Norce sends its last event of an order once more, as a person asks for it."""
        events = self.simulator.events(order_id)
        expect("an event", bool(events), True)
        await self.ask("retry_event", event_id=events[-1]["id"], shop=self.whose[order_id])
        await self.simulator.settled()

    async def expect_state(self, order_id: str, status: str) -> None:
        expect("state", (await self.read(order_id))["state"]["currentStatus"], status)

    def told(self, order_id: str) -> list[tuple[str, list[int | None]]]:
        """What the adapter was told of an order: its state in each event, and what each attempt was answered."""
        return [
            (event["payload"]["order"]["state"]["currentStatus"], [each["status"] for each in event["attempts"]])
            for event in self.simulator.events(order_id)
        ]

    async def ended(self) -> dict[str, list[dict[str, Any]]]:
        """The deliveries of every order, once none of them waits. Raises `Unmet` where one still does, after a time."""
        await self.simulator.settled()
        ends = time.monotonic() + PATIENCE_SECONDS
        while waiting := [each for each in self.adapter.deliveries("waiting") if each["order_id"] in self.whose]:
            if time.monotonic() > ends:
                raise Unmet(f"{len(waiting)} deliveries still wait after {PATIENCE_SECONDS:g} s")
            await asyncio.sleep(0.05)
        deliveries: dict[str, list[dict[str, Any]]] = {order_id: [] for order_id in self.whose}
        for each in self.adapter.deliveries(None):
            if each["order_id"] in deliveries:
                deliveries[each["order_id"]].append(each)
        return deliveries

    async def expect_delivered(self, order_id: str, *outcomes: str) -> None:
        """How its deliveries ended, each by the reason."""
        expect("deliveries", sorted(str(each["reason"]) for each in (await self.ended())[order_id]), sorted(outcomes))


def expect(what: str, found: Any, promised: Any) -> None:
    """Raises `Unmet`."""
    if found != promised:
        raise Unmet(f"{what}: {found!r}, not {promised!r}")


# --- the scenarios; the first line of each is what the documentation says of it ---------------------------------------


async def happy_purchase(shop: Shop) -> None:
    """An order is shipped, paid, validated and completed; it is delivered once."""
    order_id = await shop.order()
    shipping = await shop.ask("start_shipping", order_id=order_id)
    await shop.ask("complete_shipping", order_id=order_id, shipping_id=shipping["shippingId"])
    await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.buy(order_id)
    await shop.expect_state(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")
    expect("events", shop.told(order_id), [(ACCEPTED, [200]), (COMPLETED, [200])])


async def validation_denied_and_mended(shop: Shop) -> None:
    """An order without an email address is denied and stays where it is; with one it is bought."""
    nameless = {"type": "person", "billing": {**_PERSON, "email": None}, "shipping": _PERSON}
    order_id = await shop.order(customer=nameless)
    payment_id = await shop.pay(order_id)
    expect("validation", codes(await shop.ask("validate", order_id=order_id, status=400)), ["email-missing"])
    await shop.ask("complete_payment", order_id=order_id, payment_id=payment_id, status=400)
    await shop.expect_state(order_id, CHECKOUT)
    expect("events", shop.told(order_id), [])
    await shop.ask("put_billing", _PERSON, order_id=order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.buy(order_id)
    await shop.expect_state(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def declined_after_acceptance(shop: Shop) -> None:
    """A platform declines an order that was accepted; nothing is delivered, and it is completed no more."""
    order_id = await shop.order()
    await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING, ACCEPTED, DECLINED)
    refusal = await shop.ask("put_state", {"currentStatus": COMPLETED}, order_id=order_id, status=400)
    expect("refusal", codes(refusal), ["order-error"])
    await shop.expect_state(order_id, DECLINED)
    await shop.expect_delivered(order_id)
    expect("events", shop.told(order_id), [(ACCEPTED, [200]), (DECLINED, [200])])


async def voucher(shop: Shop) -> None:
    """A gift card covers a part, which is not enough, and a second payment the rest; both are on the one delivery."""
    order_id = await shop.order()
    card = {"adapterId": "awardit_adapter", "name": "Presentkort", "type": "voucher", "amount": 200.0}
    await shop.ask("add_payment", card | {"state": "confirmed", "reference": "GC-1"}, order_id=order_id)
    refusal = await shop.ask("validate", order_id=order_id, status=400)
    expect("validation", codes(refusal), ["payment-amount-mismatch"])
    await shop.buy(order_id)
    order = await shop.read(order_id)
    expect("payments", [each["amount"] for each in order["payments"]], [200.0, 58.0])
    expect("state", order["state"]["currentStatus"], COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def upsell_window(shop: Shop) -> None:
    """An accepted order takes an upsold line and nothing else, unless the cart's hook refuses; then it is completed."""
    order_id = await shop.order()
    payment_id = await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING, ACCEPTED)
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
    """A new address in the far north: the address hook patches the shipping in the same change."""
    order_id = await shop.order()
    await shop.ask("start_shipping", order_id=order_id)
    north = {**_PERSON, "postalCode": "981 37", "city": "Kiruna"}
    await shop.ask("put_shipping_address", north, order_id=order_id)
    order = await shop.read(order_id)
    expect("city", order["customer"]["shipping"]["city"], "Kiruna")
    expect("shipping", order["shippings"][0]["attributes"], {"zone": "far-north"})
    await shop.buy(order_id)
    await shop.expect_state(order_id, COMPLETED)
    await shop.expect_delivered(order_id, "delivered")


async def back_to_checkout(shop: Shop) -> None:
    """A payment is broken off, which unlocks the cart; the cart changes, is paid for, and is delivered once."""
    order_id = await shop.order()
    payment_id = await shop.pay(order_id)
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING)
    cart = {"reference": "56393", "items": [{**_UPSOLD, "upsell": False}]}
    await shop.ask("put_cart", cart, order_id=order_id, status=400)
    await shop.ask("cancel_payment", order_id=order_id, payment_id=payment_id)
    await shop.expect_state(order_id, CHECKOUT)
    await shop.ask("put_cart", cart, order_id=order_id)
    await shop.buy(order_id)
    order = await shop.read(order_id)
    way = [each["status"] for each in order["state"]["transitions"]]
    expect("transitions", way, [CHECKOUT, PROCESSING, CHECKOUT, PROCESSING, ACCEPTED, COMPLETED])
    expect(
        "payments",
        [(each["state"], each["amount"]) for each in order["payments"]],
        [(REMOVED, 258.0), ("reserved", 249.0)],
    )
    await shop.expect_delivered(order_id, "delivered")


async def captured_after_completion(shop: Shop) -> None:
    """A completed order's payment is captured: the order changes, its state does not, and nothing more is delivered."""
    order_id = await shop.order()
    await shop.buy(order_id)
    await shop.ended()
    its = {"order_id": order_id, "payment_id": (await shop.read(order_id))["payments"][0]["id"]}
    captured = {**(await shop.ask("read_payment", **its)), "state": "captured"}
    await shop.ask("put_payment", captured, **its)
    await shop.ask("add_transaction", {"type": "capture", "amount": captured["amount"], "success": True}, **its)
    expect("payment", (await shop.ask("read_payment", **its))["state"], "captured")
    await shop.expect_delivered(order_id, "delivered")
    expect("events", shop.told(order_id), [(ACCEPTED, [200]), (COMPLETED, [200])])


async def two_merchants(shop: Shop) -> None:
    """Two merchants buy at the same time; neither sees the other's order, and each delivery is its own merchant's."""
    if len(shop.adapter.shops) < 2:
        raise Unmet("the adapter's configuration has only one merchant")
    shops = shop.adapter.shops[:2]
    order_ids = [await shop.order(shop=each) for each in shops]
    for order_id, other in zip(order_ids, reversed(shops), strict=True):
        await shop.ask("read_order", order_id=order_id, shop=other, status=404)
    await asyncio.gather(*map(shop.buy, order_ids))
    deliveries = await shop.ended()
    for order_id, (merchant, channel) in zip(order_ids, shops, strict=True):
        its = [(each["merchant"], each["channel"], each["reason"]) for each in deliveries[order_id]]
        expect("deliveries", its, [(merchant, channel, "delivered")])


async def burst(shop: Shop, orders: int = 100) -> None:
    """Many orders at the same time, each created, validated and completed, and delivered once."""
    at_once = asyncio.Semaphore(AT_ONCE)

    async def purchase() -> str:
        async with at_once:
            order_id = await shop.order()
            await shop.buy(order_id)
            return order_id

    order_ids = await asyncio.gather(*(purchase() for _ in range(orders)))
    deliveries = await shop.ended()
    expect("deliveries", Counter(len(deliveries[each]) for each in order_ids), {1: orders})
    outcomes = Counter(each["reason"] for order_id in order_ids for each in deliveries[order_id])
    expect("outcomes", outcomes, {"delivered": orders})
    asked = Counter(shop.simulator.order(each)["state"]["currentStatus"] for each in order_ids)
    expect("states", asked, {COMPLETED: orders})


async def outage(shop: Shop) -> None:
    """Nobody reaches the adapter: nothing is bought unasked; an event that was not taken is sent again, twice."""
    order_id = await shop.order()
    payment_id = await shop.pay(order_id)
    shop.line.is_cut = True
    refusal = await shop.ask("complete_payment", order_id=order_id, payment_id=payment_id, status=400)
    expect("validation", codes(refusal), ["validation-failed"])
    await shop.expect_state(order_id, CHECKOUT)
    shop.line.is_cut = False
    await shop.ask("validate", order_id=order_id)
    await shop.move(order_id, PROCESSING, ACCEPTED)
    await shop.reserve(order_id, payment_id)
    await shop.simulator.settled()
    shop.line.is_cut = True
    await shop.move(order_id, COMPLETED)
    await shop.expect_delivered(order_id)
    expect("events", shop.told(order_id), [(ACCEPTED, [200]), (COMPLETED, [None])])
    shop.line.is_cut = False
    for _ in range(2):
        await shop.retry(order_id)
    expect("events", shop.told(order_id)[-1], (COMPLETED, [None, 200, 200]))
    await shop.expect_delivered(order_id, "delivered")


async def removed_order(shop: Shop) -> None:
    """An order is removed, and nothing is delivered; another is gone when its event comes, and is a dead letter."""
    removed = await shop.order()
    await shop.move(removed, PROCESSING, REMOVED)
    gone = await shop.order()
    shop.line.is_cut = True
    await shop.move(gone, PROCESSING, ACCEPTED, COMPLETED)
    await shop.simulator.settled()
    shop.line.is_cut = False
    await shop.ask("delete_order", order_id=gone)
    await shop.ask("read_order", order_id=gone, status=404)
    await shop.retry(gone)
    await shop.expect_delivered(gone, "rejected")
    await shop.expect_delivered(removed)
    await shop.expect_state(removed, REMOVED)


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


def promise(name: str) -> str:
    """What a scenario promises, in a sentence."""
    return inspect.getdoc(SCENARIOS[name]) or ""


async def play(name: str, shop: Shop, **settings: Any) -> dict[str, Any]:
    """
    Plays a scenario and tells what came of it, in counts. `unmet` is what was not as promised, or None.

    `lost` are orders that were completed, of which the ledger knows nothing; `doubled` are those with two deliveries on
    one route.
    """
    began = time.monotonic()
    unmet = None
    try:
        await SCENARIOS[name](shop, **settings)
        deliveries = await shop.ended()
    except Unmet as error:
        unmet = str(error)
        deliveries = {order_id: [] for order_id in shop.whose}
        for each in shop.adapter.deliveries(None):
            deliveries.get(each["order_id"], []).append(each)
    orders = {
        each["id"]: each["state"]["currentStatus"] for each in shop.simulator.orders() if each["id"] in shop.whose
    }
    events = [each for each in shop.simulator.events() if each["orderId"] in shop.whose]
    completed = {order_id for order_id, status in orders.items() if status == COMPLETED}
    completed |= {each["orderId"] for each in events if each["payload"]["order"]["state"]["currentStatus"] == COMPLETED}
    lost = sum(not deliveries[order_id] for order_id in completed)
    doubled = sum(len({each["route"] for each in its}) < len(its) for its in deliveries.values())
    if unmet is None and (lost or doubled):
        unmet = f"{lost} lost, {doubled} doubled"
    return {
        "scenario": name,
        "unmet": unmet,
        "orders": dict(Counter(orders.values())),
        "events": len(events),
        "deliveries": dict(Counter(each["reason"] or each["state"] for its in deliveries.values() for each in its)),
        "lost": lost,
        "doubled": doubled,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_mib": _peak_memory() >> 20,
    }


def _peak_memory() -> int:
    """Bytes, of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
