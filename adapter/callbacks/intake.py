"""
Where every notification comes in, whoever brought it: who wants it is asked, and it is remembered with what is owed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from adapter.conditions import Result
from adapter.ledger.claims import QueueKey
from adapter.ledger.inbox import Inbox, Received, ReceivedNotification, Wanted
from adapter.metrics import Metrics
from adapter.routing.routes import Routes


class Intake:
    """`queue_ids` are the ledger's, `wake` tells of work."""

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
        """The notification with the queues that want it, by the conditions on its order."""
        self._metrics.notifications_received.labels(*notification.channel, notification.source).inc()
        wanting = self.routes.wanting(self.routes.callbacks[notification.callback], order)
        self._metrics.conditions_evaluated.labels("callback", wanting.callback.value).inc()
        if wanting.callback is not Result.MATCHED:
            # Norce sent it, so the condition held there; where it does not hold here, somebody should know.
            self._metrics.notifications_not_matched.labels(notification.callback).inc()
        for _, held in wanting.routes:
            self._metrics.conditions_evaluated.labels("route", held.value).inc()
        # A condition in error is owed, too: it is decided again when the delivery's turn comes, and ends as a dead
        # letter that a person sees.
        wanted = tuple(
            Wanted(queue_id=self._queue_ids[QueueKey(route.name, notification.channel)], refetch=route.refetch)
            for route, _ in wanting.routes
        )
        return replace(notification, wanted=wanted)

    async def store(self, notification: ReceivedNotification) -> Received:
        """What became of it; on disk, once, when this returns. Raises `StoreUnavailable` where nothing was stored."""
        received = await self.inbox.receive(notification)
        self._metrics.notifications_stored.labels(received.value).inc()
        if received in (Received.NEW, Received.RETRIED) and notification.wanted:
            self._wake()
        return received
