"""The handler `erp-export`: two writes for each order, which can be resumed between them.

The ERP knows no idempotency key. So the handler asks for the order before it creates it: a draft of an earlier attempt
is found and released, and never created a second time.
"""

from typing import Any
from urllib.parse import quote

from adapter.plugin import Context, Done, Notification, NotificationHandler, Order, Reject
from norce_adapter_erp.settings import ExportSettings


class ErpExport(NotificationHandler[ExportSettings]):
    """Creates each order in the ERP and releases it to the warehouse."""

    async def deliver(self, notification: Notification, context: Context[ExportSettings]) -> Done:
        erp = context.settings.erp
        document = erp_order(notification.order, context.settings)
        found = await _find(notification.order, context)
        if found is None:
            answer = await context.http.post(f"{erp.url}/orders", json=document, headers=erp.headers)
            found = answer.raise_for_status().json()
        if found["status"] == "draft":
            answer = await context.http.post(f"{erp.url}/orders/{found['number']}/release", headers=erp.headers)
            answer.raise_for_status().json()  # a proxy's page is no release
        return Done(found["number"])

    async def lookup(self, notification: Notification, context: Context[ExportSettings]) -> Done | None:
        found = await _find(notification.order, context)
        # A draft is half the work: `deliver` is called again, and releases it.
        return Done(found["number"]) if found is not None and found["status"] == "released" else None


async def _find(order: Order, context: Context[ExportSettings]) -> dict[str, Any] | None:
    erp = context.settings.erp
    answer = await context.http.get(f"{erp.url}/orders/{quote(order.id, safe='')}", headers=erp.headers)
    if answer.status_code == 404:
        return None
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def erp_order(order: Order, settings: ExportSettings) -> dict[str, Any]:
    """Return the order as the ERP takes it. Raises `Reject` if it cannot be taken."""
    if order.set_aside:
        raise Reject("erp-order", f"members of a wrong type: {', '.join(order.set_aside)}")
    payments = [each for each in order.payments if each.state != "removed" and each.type != "voucher"]
    terms = [settings.terms.get(each.adapter_id or "") for each in payments]
    if not terms or None in terms:
        raise Reject("erp-terms", "the order has no payment, or one whose adapterId is not in the setting terms")
    if order.total.including_vat is None:
        raise Reject("erp-total", "the order has no /total/includingVat")
    return {
        "externalId": order.id,
        "company": settings.company,
        "terms": terms[0],
        "currency": order.currency,
        "total": str(order.total.including_vat),
        "lines": [
            {"sku": item.sku, "quantity": item.quantity, "amount": str(item.total.including_vat)}
            for item in order.cart.items
        ],
        "freight": [
            {"name": each.name, "amount": str(each.total.including_vat)}
            for each in order.shippings
            if each.state != "removed"
        ],
    }
