"""The handler `erp-stock`: asks the ERP for its stock while the shopper waits."""

from collections import Counter

from adapter.plugin import Context, Order, Problem, ValidationHandler
from norce_adapter_erp.settings import StockSettings


class StockCheck(ValidationHandler[StockSettings]):
    """Refuses a purchase of articles that the ERP does not have."""

    async def validate(self, order: Order, context: Context[StockSettings]) -> list[Problem]:
        erp = context.settings.erp
        wanted: Counter[str] = Counter()
        for item in order.cart.items:
            if item.sku and item.product_type in (None, "physical"):
                wanted[item.sku] += item.quantity or 0
        answer = await context.http.post(
            f"{erp.url}/stock",
            json={"skus": sorted(wanted)},
            headers=erp.headers,
            extensions={"write": False},  # a question, although it is a POST
        )
        stock = answer.raise_for_status().json()
        return [
            Problem("item-out-of-stock", f"Article {sku} is sold out.")
            for sku, quantity in sorted(wanted.items())
            if stock.get(sku, 0) < quantity
        ]
