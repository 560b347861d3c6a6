"""Other adapters that an order needs: for the platform (baskets), payments and shippings.

Each changes the order as Norce's own adapters do: through the order service, under its own adapter id. The systems
behind them are invented: a basket always holds the same lines, and every payment succeeds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adapter.norce.api import V0
from adapter.sandbox.norce.checkout import Checkout
from adapter.sandbox.norce.orders import (
    ACCEPTED,
    CHECKOUT,
    COMPLETED,
    PROCESSING,
    REMOVED,
    ApiRequest,
    Refused,
    find,
    money,
    part,
)
from adapter.sandbox.norce.versions import Order, as_version

PLATFORM, PAYMENT, SHIPPING = "norce_adapter", "nonpsp_adapter", "ingrid_adapter"
FREIGHT = {"includingVat": 59.0, "excludingVat": 47.2}
_PRODUCTS = (("Vinterjacka", "JKT-1001", 1499.0), ("Ullstrumpor", "SOCK-3P", 129.0), ("Mössa", "CAP-12", 249.0))
_AMOUNTS = ("includingVat", "excludingVat")


def handlers(checkout: Checkout) -> dict[str, Callable[[ApiRequest], Any]]:
    """Return the handlers of all three adapters, by the names of the operations."""

    async def change(name: str, request: ApiRequest, adapter_id: str, body: Any = None, **path: str) -> Any:
        path = {**request.path, **path}
        own = replace(request, body=body, path=path, adapter_id=adapter_id, now=checkout.timestamp())
        return await checkout.change(name, own)

    def create_from_basket(request: ApiRequest) -> Any:
        reference = request.body["cartReference"]
        if reference < 1:
            raise Refused("order-bad-request", "There is no such basket.")
        orders = checkout.records.orders.values()
        if any((each["merchant"], each["cart"]["reference"]) == (request.merchant, str(reference)) for each in orders):
            raise Refused("order-conflict", "There is an order for this basket already.")
        given = {name: request.body[name] for name in ("culture", "currency", "country") if request.body.get(name)}
        body = {"currency": "SEK", "country": "SE", **given, "cart": _basket(reference)}
        return {"id": checkout.create(replace(request, body=body))["id"]}

    async def refresh_from_basket(request: ApiRequest) -> Any:
        reference = str(checkout.stored(request)["cart"]["reference"])
        if not reference.isdigit():
            raise Refused("order-bad-request", "The order is not from a basket.")
        await change("put_cart", request, PLATFORM, _basket(int(reference)))
        return as_version(checkout.stored(request), V0)

    async def patch_item(request: ApiRequest) -> None:
        cart = checkout.stored(request)["cart"]
        items = list(cart["items"])
        position = find(items, request.path["item_id"])
        items[position] = _line(items[position], request.body["quantity"])
        await change("put_cart", request, PLATFORM, {**cart, "items": items, "total": None})

    def payment(request: ApiRequest) -> dict[str, Any]:
        return part(checkout.stored(request)["payments"], request.path["payment_id"], "payment-not-found")

    async def start_payment(request: ApiRequest) -> Any:
        order = checkout.stored(request)
        for each in order["payments"]:
            if each.get("adapterId") == PAYMENT and each["state"] == "intent":
                return {"paymentId": each["id"]}
        amount = round(money((order["total"] or {}).get("includingVat")) - _paid(order), 2)
        new = {"adapterId": PAYMENT, "name": "Non-PSP", "amount": amount, "reference": request.new_id("")}
        return {"paymentId": (await change("add_payment", request, PAYMENT, new))["id"]}

    async def complete_payment(request: ApiRequest) -> None:
        payment(request)
        status = checkout.stored(request)["state"]["currentStatus"]
        if status not in (CHECKOUT, PROCESSING):
            raise Refused("payment-error", f"The order is {status} already.")
        if status == CHECKOUT:
            await checkout.validate(request)
            await change("put_state", request, PAYMENT, {"currentStatus": PROCESSING})
        await change("put_payment", request, PAYMENT, {**payment(request), "state": "reserved"})
        for status in (ACCEPTED, COMPLETED):
            await change("put_state", request, PAYMENT, {"currentStatus": status})

    async def cancel_payment(request: ApiRequest) -> None:
        payment(request)
        if checkout.stored(request)["state"]["currentStatus"] == PROCESSING:
            await change("put_state", request, PAYMENT, {"currentStatus": CHECKOUT})
        await change("put_payment", request, PAYMENT, {**payment(request), "state": REMOVED})

    async def start_shipping(request: ApiRequest) -> Any:
        for each in checkout.stored(request)["shippings"]:
            if each.get("adapterId") == SHIPPING and each["state"] == "intent":
                return {"shippingId": each["id"]}
        shipping = {"adapterId": SHIPPING, "name": "Ombud", "total": FREIGHT, "vatRate": 0.25}
        return {"shippingId": (await change("add_shipping", request, SHIPPING, shipping))["id"]}

    async def complete_shipping(request: ApiRequest) -> None:
        shippings, shipping_id = checkout.stored(request)["shippings"], request.path["shipping_id"]
        shipping = part(shippings, shipping_id, "shipping-not-found")
        confirmed = {**shipping, "state": "confirmed", "tmsReference": request.new_id("tms")}
        await change("put_shipping", request, SHIPPING, confirmed)

    return {
        "create_from_basket": create_from_basket,
        "refresh_from_basket": refresh_from_basket,
        "patch_item": patch_item,
        "validate_basket": lambda request: checkout.stored(request) and None,
        "start_payment": start_payment,
        "complete_payment": complete_payment,
        "cancel_payment": cancel_payment,
        "start_shipping": start_shipping,
        "complete_shipping": complete_shipping,
    }


def _basket(reference: int) -> dict[str, Any]:
    items = []
    for number in (1, 2):
        name, sku, price = _PRODUCTS[(reference + number) % 3]
        item = {
            "id": f"ci{reference}n{number}",
            "reference": str(number),
            "name": name,
            "sku": sku,
            "productType": "physical",
            "unit": "st",
            "price": {"includingVat": price, "excludingVat": round(price / 1.25, 2)},
            "vatRate": 0.25,
        }
        items.append(_line(item, 1 + reference % 2))
    return {"reference": str(reference), "items": items}


def _line(item: dict[str, Any], quantity: int) -> dict[str, Any]:
    price, discounts = item.get("price") or {}, item.get("discounts") or []
    full = {name: round(money(price.get(name)) * quantity, 2) for name in _AMOUNTS}
    off = {name: sum(money((each.get("value") or {}).get(name)) for each in discounts) for name in _AMOUNTS}
    total = {name: round(full[name] - off[name], 2) for name in _AMOUNTS}
    return {**item, "quantity": quantity, "originalTotal": full, "total": total, "discounts": discounts}


def _paid(order: Order) -> float:
    return round(sum(money(each.get("amount")) for each in order["payments"] if each["state"] != REMOVED), 2)
