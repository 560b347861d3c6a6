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
        self._routes_of = {queue_id: key.route for key, queue_id in queue_ids.items()}
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
        wanted = [route for route, _ in wanting.routes]
        serving = self.routes.serving(notification.callback, notification.channel)
        # In a conflict, a delivery waits on every route that reads the order again. On a shadow nothing may wait.
        in_conflict = [route for route in serving if (route in wanted if route.shadow else route.refetch)]
        return replace(
            notification,
            wanted=self._queues(notification, wanted),
            wanted_in_conflict=self._queues(notification, in_conflict),
        )

    def routed_unread(self, notification: ReceivedNotification) -> ReceivedNotification | None:
        """Return a notification that has no body with every queue of its callback.

        Returns None if a route does not read the order again, or if all routes are shadows, so that the body is needed.
        Beside other routes, a shadow records nothing: reconciliation brings the body.
        """
        serving = self.routes.serving(notification.callback, notification.channel)
        acting = [route for route in serving if not route.shadow]
        if not all(route.refetch for route in acting) or (serving and not acting):
            return None
        self._metrics.notifications_received.labels(*notification.channel, notification.source).inc()
        return replace(notification, wanted=self._queues(notification, acting))

    def _queues(self, notification: ReceivedNotification, routes: Sequence[Route]) -> tuple[Wanted, ...]:
        return tuple(
            Wanted(
                queue_id=self._queue_ids[QueueKey(route.name, notification.channel)],
                refetch=route.refetch,
                shadow=route.shadow,
            )
            for route in routes
        )

    async def store(self, notification: ReceivedNotification) -> Received:
        """Store the notification once, durably. Raises `StoreUnavailable` if nothing was stored."""
        received = await self.inbox.receive(notification)
        self._metrics.notifications_stored.labels(received.value).inc()
        if received in (Received.NEW, Received.CONFLICT):
            added = notification.wanted if received is Received.NEW else notification.wanted_in_conflict
            for each in added:
                if each.shadow:
                    self._metrics.deliveries_shadow.labels(self._routes_of[each.queue_id]).inc()
        if received is Received.CONFLICT or (received is not Received.REPEAT and notification.wanted):
            self._wake()
        return received
