"""
Where every notification comes in, whoever brought it: who wants it is asked, and it is remembered with what is owed.
"""

from collections.abc import Callable, Mapping

from adapter.callbacks.parsing import ReceivedNotification
from adapter.conditions import Result
from adapter.ledger.inbox import Inbox, Receipt, Received, Wanted
from adapter.metrics import Metrics
from adapter.routing.routes import Callback, Routes, Wanting


class Intake:
    """`queue_ids` are the ledger's, by route, merchant and channel; `wake` tells of work."""

    def __init__(
        self,
        routes: Routes,
        inbox: Inbox,
        *,
        queue_ids: Mapping[tuple[str, str, str], int],
        metrics: Metrics,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.routes = routes
        self.inbox = inbox
        self._queue_ids = queue_ids
        self._metrics = metrics
        self._wake = wake

    async def remember(self, receipt: Receipt) -> Received:
        """What became of it; on disk, once, when this returns. Raises `StoreUnavailable` where nothing was stored."""
        received = await self.inbox.receive(receipt)
        self._metrics.stored.labels(received.value).inc()
        if received in (Received.NEW, Received.RETRIED) and receipt.wanted:
            self._wake()
        return received

    def receipt(self, notification: ReceivedNotification, source: str) -> Receipt:
        """
        What to remember of a notification; `source` is callback or reconciliation. Made apart from remembering it, so
        that its tree, hundreds of objects, is not kept for the disk.
        """
        callback, merchant, channel = notification.callback, notification.merchant, notification.channel
        self._metrics.received.labels(merchant, channel, source).inc()
        wanting = self.routes.wanting(callback, notification.order)
        self._count(callback, wanting)
        # A condition in error is owed, too: it is decided again when the delivery's turn comes, and ends as a dead
        # letter that a person sees.
        wanted = [
            Wanted(queue_id=self._queue_ids[route.name, merchant, channel], refetch=route.refetch)
            for route, _ in wanting.routes
        ]
        return Receipt(
            identity=notification.identity,
            merchant=merchant,
            channel=channel,
            callback=callback.name,
            order_id=notification.order_id,
            snapshot_at=notification.snapshot_at,
            source=source,
            body=notification.raw,
            wanted=tuple(wanted),
        )

    def _count(self, callback: Callback, wanting: Wanting) -> None:
        self._metrics.conditions.labels("callback", wanting.callback.value).inc()
        if wanting.callback is not Result.MATCHED:
            # Norce sent it, so the condition held there; where it does not hold here, somebody should know.
            self._metrics.disagreements.labels(callback.name).inc()
        for _, held in wanting.routes:
            self._metrics.conditions.labels("route", held.value).inc()
