"""The handler `erp-freight`: sets the freight by the total of the cart."""

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from adapter.plugin import Context, HookHandler, Order, Patch, Shipping
from norce_adapter_erp.settings import FreightSettings

CENT = Decimal("0.01")


class Freight(HookHandler[FreightSettings]):
    """Sets the freight by the total of the cart.

    The hook watches /cart, and its target is /shippings.
    """

    computes = True

    async def change(self, order: Order, context: Context[FreightSettings]) -> list[Patch]:
        cart = order.cart.total.including_vat or Decimal(0)
        freight = max(
            (band for band in context.settings.bands if band.cart <= cart), key=lambda band: band.cart
        ).freight
        shippings = [
            tree if shipping.state == "removed" else {**tree, "total": _price(freight, shipping)}
            for tree, shipping in zip(order.data["shippings"], order.shippings, strict=True)
        ]
        # The whole array, because Norce is less reliable with places in it. An equal value is not sent.
        return [Patch.replace("/shippings", shippings)] if shippings else []


def _price(including_vat: Decimal, shipping: Shipping) -> dict[str, Any]:
    excluding_vat = (including_vat / (1 + (shipping.vat_rate or 0))).quantize(CENT, ROUND_HALF_UP)
    return {"includingVat": including_vat, "excludingVat": excluding_vat}
