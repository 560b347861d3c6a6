"""The intake: the one way of notifications into the ledger, whatever their source."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from adapter.conditions import Result
from adapter.ledger.claims import QueueKey
from adapter.ledger.inbox import Inbox, Received, ReceivedNotification, Wanted
from adapter.metrics import Metrics
from adapter.routing.routes import Route, Routes


class Intake:
    """Selects the queues of a notification, and stores it.

    Args:
        wake: Called when a notification brings work for the dispatcher.
    """

    def __init__(
        self,
        routes: Routes,
        inbox: Inbox,
        *,
        queue_ids: Mapping[QueueKey, int],
        metrics: Metrics,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.routes = routes
        self.inbox = inbox
        self._queue_ids = queue_ids
        self._metrics = metrics
        self._wake = wake

    def routed(self, notification: ReceivedNotification, order: dict[str, Any]) -> ReceivedNotification:
        """Return the notification with the queues that want its order. Never raises."""
        self._metrics.notifications_received.labels(*notification.channel, notification.source).inc()
        wanting = self.routes.wanting(self.routes.callbacks[notification.callback], notification.channel, order)
        self._metrics.conditions_evaluated.labels("callback", wanting.callback.value).inc()
        if wanting.callback is not Result.MATCHED:
            # The condition held at Norce, or it would not have sent the notification. Operators watch this metric.
            self._metrics.notifications_not_matched.labels(notification.callback).inc()
        for _, held in wanting.routes:
            self._metrics.conditions_evaluated.labels("route", held.value).inc()
        # A route whose condition ends in an error is included. The attempt evaluates it again and makes a dead letter.
        wanted = self._queues(notification, [route for route, _ in wanting.routes])
        serving = self.routes.serving(notification.callback, notification.channel)
        refetching = [route for route in serving if route.refetch]
        return replace(notification, wanted=wanted, wanted_in_conflict=self._queues(notification, refetching))

    def routed_unread(self, notification: ReceivedNotification) -> ReceivedNotification | None:
        """Return a notification that has no body with every queue of its callback.

        Returns None if a route does not read the order again, so that it needs the body.
        """
        serving = self.routes.serving(notification.callback, notification.channel)
        if not all(route.refetch for route in serving):
            return None
        self._metrics.notifications_received.labels(*notification.channel, notification.source).inc()
        return replace(notification, wanted=self._queues(notification, serving))

    def _queues(self, notification: ReceivedNotification, routes: Sequence[Route]) -> tuple[Wanted, ...]:
        keys = [(QueueKey(route.name, notification.channel), route.refetch) for route in routes]
        return tuple(Wanted(queue_id=self._queue_ids[key], refetch=refetch) for key, refetch in keys)

    async def store(self, notification: ReceivedNotification) -> Received:
        """Store the notification once, durably. Raises `StoreUnavailable` if nothing was stored."""
        received = await self.inbox.receive(notification)
        self._metrics.notifications_stored.labels(received.value).inc()
        if received is Received.CONFLICT or (received is not Received.REPEAT and notification.wanted):
            self._wake()
        return received
