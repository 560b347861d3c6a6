"""The handler `log`, for trying a route before anything is sent.

It logs one line with the order's id and state. Everything else in an order may be personal data.
"""

from adapter.plugin import Context, Done, NoSettings, Notification, NotificationHandler

# Norce's order states (https://docs.norce.io/api-reference/nco/openapi/order/schemas/state). No other text is logged,
# because it could contain anything.
STATES = frozenset({"checkout", "processing", "accepted", "completed", "declined", "removed"})


class LogHandler(NotificationHandler[NoSettings]):
    """The handler `log`. It logs one line `order_seen` for each notification."""

    repeatable = True

    async def deliver(self, notification: Notification, context: Context[NoSettings]) -> Done:
        """Log the line."""
        status = (notification.order.state.current_status or "").lower()
        context.log.info(
            "order_seen",
            callback=notification.callback,
            status=status if status in STATES else "other",
        )
        return Done()
