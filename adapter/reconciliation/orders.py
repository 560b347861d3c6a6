"""Reconciliation with Norce's orders: finds orders that never arrived.

An order without our registration leaves no event, and Norce may have lost an event. So a run lists the orders of each
channel, and looks for those that a callback's condition wants and of which the ledger has no notification of that
callback. An order that changed a short time ago is left for the next run: its notification may be on its way.

A run reports, and only a person brings: that an order is not registered may be on purpose.

Facts: checkout protocol, sections 2 and 4. The list is sorted by the time of creation, so `since` limits that time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Container, Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import msgspec
import structlog

from adapter.callbacks.intake import Intake
from adapter.callbacks.parsing import CallbackInvalid, parse_notification
from adapter.callbacks.senders import Unauthenticated, reconciled
from adapter.conditions import Result
from adapter.identifiers import Channel
from adapter.ledger.commands import record_action
from adapter.ledger.inbox import Received
from adapter.ledger.key_values import Watermarks
from adapter.ledger.known_orders import KnownOrders, known_orders
from adapter.ledger.queries import Author
from adapter.ledger.store import Store
from adapter.metrics import Metrics
from adapter.moments import in_milliseconds, to_datetime, to_milliseconds
from adapter.norce.client import ListedOrder, Norce, NorceError, OrderNotFound, parse_order
from adapter.offload import offload
from adapter.orders import instant
from adapter.reconciliation.events import MAX_CLOCK_DIFFERENCE, missing_call, run_when_due, start_of
from adapter.reconciliation.listing import Listing
from adapter.routing.routes import Callback

log = structlog.get_logger(__name__)

WINDOW = timedelta(hours=48)  # of a periodic run; twice its interval, so that each order is listed when it has settled
MIN_AGE = timedelta(minutes=10)  # since the last change of an order
AFTER_START_SECONDS = 120.0
RETRY_AFTER = timedelta(hours=1)  # a run that failed
LATE = timedelta(hours=1)  # by which an order of the list may be newer than one before it
BROUGHT_AT_ONCE = 8
LONGEST_IDS = 200  # characters of the ids in a log line
NAMES = ("merchant", "channel")
TURN = "orders reconciled"  # a name in the ledger
FIRST_STATUS = "checkout"


class OrdersProgress(msgspec.Struct, kw_only=True):
    """The findings among the orders of one channel so far."""

    merchant: str
    channel: str
    orders: int = 0  # created since the beginning
    missing: int = 0  # orders that a callback wants and of which the ledger has no notification
    brought: int = 0  # of those, stored now
    young: int = 0  # orders left for the next run
    others: int = 0  # orders of another channel, or that could not be read
    ids: list[str] = []  # of missing orders; each is in one report
    done: bool = False
    error: str | None = None  # the reason why not all orders were compared or brought


class OrderReconciliation:
    """Compares the orders of every channel with the ledger.

    Args:
        channels: The configured channels.
        switched_off: Channels that Norce's configuration switches off. A periodic run leaves them out: nothing is
            registered there.
        remembered: How long the ledger keeps a notification.
    """

    def __init__(
        self,
        norce: Norce,
        intake: Intake,
        store: Store,
        *,
        channels: Collection[Channel],
        switched_off: Container[Channel],
        remembered: timedelta,
        metrics: Metrics,
    ) -> None:
        self._norce = norce
        self._intake = intake
        self._store = store
        self._watermarks = Watermarks(store)
        self._clock: Callable[[], int] = store.clock
        self._channels = list(channels)
        self._switched_off = switched_off
        self._remembered = remembered - MAX_CLOCK_DIFFERENCE
        self._metrics = metrics

    async def run_regularly(self, every: timedelta) -> None:
        """Run when due, until cancelled. The ledger decides which node has the turn.

        The first run waits for the reconciliation with the event log, which stores what came during an outage.
        """
        await asyncio.sleep(AFTER_START_SECONDS)
        await run_when_due(self.run_if_due, every)

    async def run_if_due(self, every: timedelta) -> None:
        """Compare the orders of the last 48 hours, if a run is due.

        It is due if the last one began at least `every` ago, and no other node is running. Orders from before this
        ledger, or a merchant in it, are left out. Raises `StoreUnavailable`.
        """
        if not await self._watermarks.has_turn(TURN, in_milliseconds(every)):
            return
        since = to_datetime(self._clock()) - max(WINDOW, 2 * every)
        begins: dict[Channel, datetime] = {}
        for channel in self._channels:
            if channel not in self._switched_off:
                start = await start_of(channel.merchant, self._watermarks, self._clock())
                begins[channel] = max(since, to_datetime(start))
        try:
            async for _ in self._compare(begins):
                await self._watermarks.put(TURN, self._clock())  # extend the turn
        except NorceError:  # logged already
            retry = max(every - RETRY_AFTER, timedelta(0))
            await self._watermarks.put(TURN, self._clock() - in_milliseconds(retry))

    async def run(self, *, since: datetime | None = None, by: Author | None = None) -> AsyncIterator[OrdersProgress]:
        """Compare the orders created since a moment, and yield the progress after each page.

        If the orders of a channel cannot be listed to their end, those of the others are compared all the same; then
        one error names all that failed.

        Args:
            since: By default 48 hours ago. Never before the memory of the ledger.
            by: The person who has missing orders received, as Norce has them now. With None they are only reported.

        Raises:
            NorceError: At the end, if orders could not be read.
            StoreUnavailable: At once.
        """
        now = to_datetime(self._clock())
        begins = max(since or now - WINDOW, now - self._remembered)
        async for progress in self._compare(dict.fromkeys(self._channels, begins), by):
            yield progress

    async def _compare(
        self, begins: dict[Channel, datetime], by: Author | None = None
    ) -> AsyncIterator[OrdersProgress]:
        failed = []
        action = None
        for channel, since in begins.items():
            progress = OrdersProgress(merchant=channel.merchant, channel=channel.name)
            missing: dict[str, None] = {}  # ids, in the order of the list
            try:
                read = partial(self._norce.orders, channel, order_by="created", order_by_direction="desc")
                async for page in Listing[ListedOrder](read, overlap=LATE).newest_pages(since):
                    progress.others += page.count - len(page.items)
                    found = await self._missing(
                        channel, [each for each in page.items if each.created_at >= since], progress
                    )
                    found = [order_id for order_id in found if order_id not in missing]
                    missing.update(dict.fromkeys(found))
                    progress.missing, progress.ids = len(missing), found
                    yield progress
                progress.ids = []
                for start in range(0, len(missing) if by else 0, BROUGHT_AT_ONCE):
                    ids = list(missing)[start : start + BROUGHT_AT_ONCE]
                    brought = sum(await asyncio.gather(*(self._bring(channel, order_id) for order_id in ids)))
                    action = await self._record(by, min(begins.values()), brought, action)
                    progress.brought += brought
                    yield progress
                progress.done = True
            except NorceError as error:
                log.warning("reconciliation_failed", merchant=channel.merchant, channel=channel.name,
                            error_type=type(error).__name__)  # fmt: skip
                failed.append(f"{channel.merchant}, channel {channel.name}: {error}")
                progress.error = str(error)
            self._log_missing(channel, progress, list(missing))
            progress.ids = []
            yield progress
        if failed:
            raise NorceError("; ".join(failed))

    async def _record(self, by: Author | None, since: datetime, brought: int, action: int | None) -> int | None:
        if by is None:
            return None
        given = {"since": to_milliseconds(since)}
        now = self._clock()
        return await self._store.run(record_action, "reconcile-orders", by, given, brought, now, action)

    def _log_missing(self, channel: Channel, progress: OrdersProgress, missing: Sequence[str]) -> None:
        result = "failed" if progress.error is not None else "done"
        self._metrics.order_reconciliations.labels(channel.merchant, result).inc()
        if missing:
            self._metrics.orders_missing.labels(*channel).inc(len(missing))
            log.warning("orders_missing", merchant=channel.merchant, channel=channel.name, count=len(missing),
                        order_ids=_in_short(missing))  # fmt: skip

    async def _missing(self, channel: Channel, listed: Sequence[ListedOrder], progress: OrdersProgress) -> list[str]:
        """Return the ids of the orders that a callback wants and that never came."""
        progress.orders += len(listed)
        wanted: dict[str, dict[str, list[str]]] = {}  # by order and callback: the routes that want it
        for each in listed:
            if self._is_young(each.changed_at):
                progress.young += 1
                continue
            try:
                callbacks = await offload(len(each.raw), self._examined, channel, each.id, each.raw)
            except NorceError:
                callbacks = None
            if callbacks is None:
                progress.others += 1
                log.warning("order_unreadable", merchant=channel.merchant, channel=channel.name, order_id=each.id)
            elif callbacks:
                wanted[each.id] = callbacks
            await asyncio.sleep(0)  # let other tasks run
        if not wanted:
            return []
        known = await asyncio.to_thread(known_orders, self._store, channel, list(wanted))
        return [
            order_id
            for order_id, callbacks in wanted.items()
            if not all(_is_known(known, order_id, callback, routes) for callback, routes in callbacks.items())
        ]

    def _examined(self, channel: Channel, order_id: str, raw: bytes) -> dict[str, list[str]] | None:
        """Return the callbacks whose condition the order fulfils, with their routes that want it.

        None stands for an order of another channel. Raises `NorceError` if it cannot be read.
        """
        order = parse_order(raw, order_id).data
        if any(order.get(name) not in (None, "", value) for name, value in zip(NAMES, channel, strict=True)):
            return None
        wanting = {}
        for callback in self._intake.routes.callbacks.values():
            if callback.kind == "notification" and _may_have_changed(callback, order):
                selection = self._intake.routes.wanting(callback, channel, order)
                if selection.callback is not Result.NOT_MATCHED:
                    wanting[callback.name] = [route.name for route, _ in selection.routes]
        return wanting

    def _is_young(self, changed_at: datetime | None) -> bool:
        # A moment far in the future counts as none, as in a callback: otherwise the order would stay young.
        now = to_datetime(self._clock())
        return changed_at is not None and now - MIN_AGE < changed_at <= now + MIN_AGE

    async def _bring(self, channel: Channel, order_id: str) -> bool:
        """Put an order through the intake. Returns whether it was stored.

        It is read again, because it may have changed since it was listed.
        """
        try:
            order = await self._norce.order(channel, order_id)
        except OrderNotFound:  # deleted meanwhile
            return False
        callbacks = await offload(len(order.raw), self._examined, channel, order_id, order.raw)
        if self._is_young(instant(order.data.get("lastModified"))) or not callbacks:
            return False
        known = await asyncio.to_thread(known_orders, self._store, channel, [order_id])
        stored = False
        for name, routes in callbacks.items():
            if not _is_known(known, order_id, name, routes):
                stored |= await self._store_order(channel, order_id, self._intake.routes.callbacks[name], order.raw)
        return stored

    async def _store_order(self, channel: Channel, order_id: str, callback: Callback, body: bytes) -> bool:
        raw = missing_call(order_id, callback, body)
        try:
            parsed = await parse_notification(
                raw, reconciled(channel, "orders"), callback, frozenset(self._channels), self._clock()
            )
        except (CallbackInvalid, Unauthenticated) as error:
            log.warning("order_unreadable", order_id=order_id, callback=callback.name, merchant=channel.merchant,
                        error_type=type(error).__name__)  # fmt: skip
            return False
        notification = await offload(len(body), self._intake.routed, *parsed)
        return await self._intake.store(notification) in (Received.NEW, Received.CONFLICT)


def _is_known(known: KnownOrders, order_id: str, callback: str, routes: Iterable[str]) -> bool:
    """Return whether an order has come for a callback, or was delivered by all routes.

    The deliveries may be of a callback with another name. They are not to be repeated.
    """
    of_routes = [(order_id, route) in known.routes for route in routes]
    return (order_id, callback) in known.callbacks or bool(of_routes and all(of_routes))


def _may_have_changed(callback: Callback, order: dict[str, Any]) -> bool:
    """Return whether the scope of a callback may have changed since the creation of the order.

    Norce notifies of changes, so an order in its first state that nobody has touched leaves no event.
    """
    state = order.get("state")
    state = state if isinstance(state, dict) else {}
    transitions = state.get("transitions")
    if str(state.get("currentStatus")).lower() != FIRST_STATUS or (
        isinstance(transitions, list) and len(transitions) > 1
    ):
        return True
    scope = "" if callback.condition is None else callback.condition.condition.scope or ""
    is_of_state = scope == "/state" or scope.startswith("/state/")
    return not is_of_state and order.get("lastModified") != order.get("created")


def _in_short(ids: Sequence[str]) -> str:
    """Return as many of the ids as fit into a log line."""
    text = ""
    for order_id in ids:
        if len(text) + len(order_id) >= LONGEST_IDS:
            return text
        text = f"{text} {order_id}".strip()
    return text
