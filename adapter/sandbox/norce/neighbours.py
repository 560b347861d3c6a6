"""
Other adapters, as far as an order needs them: a platform's, which makes an order of a basket, a payment's and a
shipping's. Each changes the order as Norce's own adapters do, through the order service and under its own adapter id.

Their outside systems are made up: basket 7 always holds the same lines, and every payment succeeds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adapter.sandbox.norce.callbacks import as_text
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.orders import (
    ACCEPTED,
    CHECKOUT,
    COMPLETED,
    PROCESSING,
    REMOVED,
    Call,
    Refused,
    find,
    money,
    part,
)
from adapter.sandbox.norce.versions import Order, as_version

PLATFORM, PAYMENT, SHIPPING = "norce_adapter", "nonpsp_adapter", "ingrid_adapter"
FREIGHT = {"includingVat": 59.0, "excludingVat": 47.2}
DISCOUNT = {"includingVat": 50.0, "excludingVat": 40.0}
_SHELF = (("Vinterjacka", "JKT-1001", 1499.0), ("Ullstrumpor", "SOCK-3P", 129.0), ("Mössa", "CAP-12", 249.0))


def handlers(checkout: Checkout) -> dict[str, Callable[[Call], Any]]:
    """By the names of the operations."""

    async def does(name: str, call: Call, adapter_id: str, body: Any = None, **path: str) -> Any:
        given = replace(call, body=body, path={**call.path, **path}, adapter_id=adapter_id, now=as_text(checkout.now()))
        return await checkout.change(name, given)

    def create_from_basket(call: Call) -> Any:
        reference = call.body["cartReference"]
        if reference < 1:
            raise Refused("order-bad-request", "There is no such basket.")
        context = {name: call.body.get(name) for name in ("culture", "currency", "country")}
        body: dict[str, Any] = {"currency": "SEK", "country": "SE"} | {
            name: value for name, value in context.items() if value
        }
        body |= {"cart": _basket(reference)}
        one_each = replace(call.switches, cart_reference_unique=True)  # a basket backs one order
        return {"id": checkout.create(replace(call, body=body, switches=one_each))["id"]}

    async def refresh_from_basket(call: Call) -> Any:
        reference = str(checkout.stored(call)["cart"]["reference"])
        if not reference.isdigit():
            raise Refused("order-bad-request", "The order is not from a basket.")
        await does("put_cart", call, PLATFORM, _basket(int(reference)))
        return as_version(checkout.stored(call), "v0", call.switches)

    async def change_items(call: Call, quantity: int) -> None:
        cart = checkout.stored(call)["cart"]
        position = find(cart["items"], call.path["item_id"])
        items = [each for each in cart["items"] if each["id"] != call.path["item_id"]]
        if quantity:
            items.insert(position, _line(cart["items"][position], quantity))
        await does("put_cart", call, PLATFORM, {**cart, "items": items, "total": None})

    async def add_discount(call: Call) -> None:
        cart = checkout.stored(call)["cart"]
        if not cart["items"]:
            raise Refused("order-error", "There is nothing to discount.")
        discount = {"type": "item", "name": call.body["code"], "code": call.body["code"], "value": DISCOUNT}
        if all(each.get("code") != call.body["code"] for each in cart["discounts"]):
            await discounted(call, cart, [*cart["discounts"], discount])

    async def remove_discount(call: Call) -> None:
        cart, code = checkout.stored(call)["cart"], call.query.get("discountCode", [""])[0]
        await discounted(call, cart, [each for each in cart["discounts"] if each.get("code") != code])

    async def discounted(call: Call, cart: dict[str, Any], discounts: list[dict[str, Any]]) -> None:
        # On the first line, and again on the cart as a summary.
        first, rest = cart["items"][:1], cart["items"][1:]
        items = [*(_line({**each, "discounts": discounts}, each.get("quantity") or 1) for each in first), *rest]
        await does("put_cart", call, PLATFORM, {**cart, "items": items, "discounts": discounts, "total": None})

    def payment(call: Call) -> dict[str, Any]:
        return part(checkout.stored(call)["payments"], call.path["payment_id"], "payment-not-found")

    async def start_payment(call: Call) -> Any:
        order = checkout.stored(call)
        for each in order["payments"]:
            if each.get("adapterId") == PAYMENT and each["state"] == "intent":
                return {"paymentId": each["id"]}
        amount = round(money((order["total"] or {}).get("includingVat")) - _covered(order), 2)
        new = {"adapterId": PAYMENT, "name": "Non-PSP", "amount": amount, "reference": call.new_id("")}
        return {"paymentId": (await does("add_payment", call, PAYMENT, new))["id"]}

    async def complete_payment(call: Call) -> None:
        payment(call)
        status = checkout.stored(call)["state"]["currentStatus"]
        if status not in (CHECKOUT, PROCESSING):
            raise Refused("payment-error", f"The order is {status} already.")
        if status == CHECKOUT:
            await checkout.validate(call)
            await does("put_state", call, PAYMENT, {"currentStatus": PROCESSING})
        await does("put_payment", call, PAYMENT, {**payment(call), "state": "reserved"})
        for status in (ACCEPTED, COMPLETED):
            await does("put_state", call, PAYMENT, {"currentStatus": status})

    async def cancel_payment(call: Call) -> None:
        payment(call)
        if checkout.stored(call)["state"]["currentStatus"] == PROCESSING:
            await does("put_state", call, PAYMENT, {"currentStatus": CHECKOUT})
        await does("put_payment", call, PAYMENT, {**payment(call), "state": REMOVED})

    async def start_shipping(call: Call) -> Any:
        for each in checkout.stored(call)["shippings"]:
            if each.get("adapterId") == SHIPPING and each["state"] == "intent":
                return {"shippingId": each["id"]}
        shipping = {"adapterId": SHIPPING, "name": "Ombud", "total": FREIGHT, "vatRate": 0.25}
        return {"shippingId": (await does("add_shipping", call, SHIPPING, shipping))["id"]}

    async def complete_shipping(call: Call) -> None:
        shipping = part(checkout.stored(call)["shippings"], call.path["shipping_id"], "shipping-not-found")
        confirmed = {**shipping, "state": "confirmed", "tmsReference": call.new_id("tms")}
        await does("put_shipping", call, SHIPPING, confirmed)

    return {
        "create_from_basket": create_from_basket,
        "refresh_from_basket": refresh_from_basket,
        "patch_item": lambda call: change_items(call, call.body["quantity"]),
        "remove_item": lambda call: change_items(call, 0),
        "add_discount": add_discount,
        "remove_discount": remove_discount,
        "validate_basket": lambda call: checkout.stored(call) and None,
        "start_payment": start_payment,
        "complete_payment": complete_payment,
        "cancel_payment": cancel_payment,
        "start_shipping": start_shipping,
        "complete_shipping": complete_shipping,
    }


def _basket(reference: int) -> dict[str, Any]:
    """What the platform holds under this number: always the same."""
    lines = (_SHELF[reference % 3], _SHELF[(reference + 1) % 3])
    items = [
        _line(
            {
                "id": f"ci{reference}n{number}",
                "reference": str(number),
                "name": name,
                "sku": sku,
                "productType": "physical",
                "unit": "st",
                "price": {"includingVat": price, "excludingVat": round(price / 1.25, 2)},
                "vatRate": 0.25,
            },
            1 + reference % 2,
        )
        for number, (name, sku, price) in enumerate(lines, 1)
    ]
    return {"reference": str(reference), "items": items}


def _line(item: dict[str, Any], quantity: int) -> dict[str, Any]:
    """The line with another quantity, and what follows from it."""
    price, discounts = item.get("price") or {}, item.get("discounts") or []
    names = ("includingVat", "excludingVat")
    before = {name: round(money(price.get(name)) * quantity, 2) for name in names}
    off = {name: round(sum(money((each.get("value") or {}).get(name)) for each in discounts), 2) for name in names}
    after = {name: round(before[name] - off[name], 2) for name in names}
    return {**item, "quantity": quantity, "originalTotal": before, "total": after, "discounts": discounts}


def _covered(order: Order) -> float:
    return round(sum(money(each.get("amount")) for each in order["payments"] if each["state"] != REMOVED), 2)
