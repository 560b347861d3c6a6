"""
`log`: the smallest handler there is, for trying a route before anything is sent anywhere.

It does not log the order. One line says that an order was seen and in which state; whatever else stands in the order
is personal data, or may be.
"""

from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler

# Norce's order states (https://docs.norce.io/api-reference/nco/openapi/order/schemas/state); any other text is not
# repeated, since it could say anything.
STATES = frozenset({"checkout", "processing", "accepted", "completed", "declined", "removed"})


class LogHandler(NotificationHandler[NoSettings]):
    """Logs one line `order_seen` for each notification. Repeating it does no harm."""

    repeatable = True

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        status = (notification.order.state.current_status or "").lower()
        context.log.info(
            "order_seen",
            order_id=notification.order.id,
            merchant=notification.merchant,
            channel=notification.channel,
            callback=notification.callback,
            status=status if status in STATES else "other",
        )
        return Done()
