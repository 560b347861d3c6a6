"""Reconciliation with Norce's event log: finds notifications that never came.

Norce documents no retry policy, so it may attempt a notification only once. A missing notification is stored through
the same intake as a callback, where its identity ensures that it is stored once. Reconciliation retries no dead letter.

A run reads the log back to the watermark minus `overlap`. The watermark is a time of Norce's clock, but never later
than ours: otherwise events would be lost when Norce's clock runs ahead and is set back. Events older than the ledger's
memory are left alone, because it is no longer known whether they came.

Facts: checkout protocol, sections 8.3 and 8.4.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import structlog

from adapter.callbacks.intake import Intake
from adapter.callbacks.parsing import CallbackInvalid, parse_notification
from adapter.callbacks.senders import RawCallback, Unauthenticated, reconciled
from adapter.identifiers import Channel
from adapter.ledger.inbox import Received, ReceivedNotification
from adapter.ledger.key_values import Watermarks
from adapter.ledger.store import StoreUnavailable
from adapter.metrics import Metrics
from adapter.moments import in_milliseconds, to_datetime, to_milliseconds, to_text
from adapter.norce.client import Event, Norce, NorceError
from adapter.offload import offload
from adapter.orders import NotAnOrder, decode
from adapter.reconciliation.listing import Listing
from adapter.routing.routes import Callback

log = structlog.get_logger(__name__)

CHECK_EVERY_SECONDS = 30.0
MIN_AGE = timedelta(minutes=1)  # a younger event's notification may still be on its way
MAX_CLOCK_DIFFERENCE = timedelta(hours=1)  # between Norce and us, for an event at the end of the ledger's memory
EVENTS_AT_ONCE = 50  # compared with the ledger in one transaction
TURN, WATERMARK, START = "reconciliation", "reconciled", "reconciled since"  # names in the ledger
LONG_AGO = -(10**15)


class LogProgress(msgspec.Struct, kw_only=True):
    """The findings in one merchant's event log so far."""

    merchant: str
    events: int = 0
    received: int = 0  # events that the ledger has
    missed: int = 0  # events that the ledger did not have; stored now unless it is a dry run
    others: int = 0  # events without a configured callback and channel, or without a readable order
    young: int = 0  # events left for the next run
    total: int | None = None  # events in the log, if Norce says so
    done: bool = False
    error: str | None = None  # the reason why the log was not read to its end


async def run_when_due(
    run: Callable[[timedelta], Awaitable[Any]],
    every: timedelta,
    *,
    first: Callable[[timedelta], Awaitable[Any]] | None = None,
) -> None:
    """Call `run` again and again until cancelled; it decides whether it is due.

    Args:
        run: Gets `every`.
        every: The interval of the runs; 0 is never.
        first: Called in place of `run` until it has succeeded once.
    """
    due = first or run
    while every:
        try:
            await due(every)
            due = run
        except StoreUnavailable:  # logged by the store
            pass
        except Exception as error:  # a bug must not end all later runs
            log.error("reconciliation_broke", exc_info=error)
        await asyncio.sleep(min(every.total_seconds(), CHECK_EVERY_SECONDS))
    await asyncio.Event().wait()


class Reconciliation:
    """Reads the event log of every merchant and stores what is missing.

    Args:
        channels: The configured channels. Events of others are counted and left alone.
        overlap: How far before the watermark a run begins.
        remembered: How long the ledger keeps the identity of a notification.
        clock: The ledger's clock, in milliseconds.
    """

    def __init__(
        self,
        norce: Norce,
        intake: Intake,
        watermarks: Watermarks,
        *,
        channels: Collection[Channel],
        adapter_id: str,
        overlap: timedelta,
        remembered: timedelta,
        metrics: Metrics,
        clock: Callable[[], int],
    ) -> None:
        self._norce = norce
        self._intake = intake
        self._watermarks = watermarks
        self._channels = frozenset(channels)
        self._merchants = list(dict.fromkeys(channel.merchant for channel in channels))
        self._adapter_id = adapter_id
        self._overlap = overlap
        self._remembered = remembered - MAX_CLOCK_DIFFERENCE
        self._metrics = metrics
        self._clock = clock
        self._has_begun = False

    async def run_regularly(self, every: timedelta) -> None:
        """Run at the start and whenever due, until cancelled.

        The ledger decides which node has the turn.
        """
        await run_when_due(self.run_if_due, every, first=self.run_at_start)

    async def run_if_due(self, every: timedelta) -> None:
        """Run once if the last run began at least `every` ago and no other node is running.

        The first call, due or not, sets the start of a merchant's log to now: events from before this ledger may be in
        another ledger. A person can include them with `since`. Raises `StoreUnavailable`.
        """
        await self._begin()
        if await self._watermarks.has_turn(TURN, in_milliseconds(every)):
            await self._run_in_turn()

    async def run_at_start(self, every: timedelta) -> None:
        """Run although it is not due, and log the gap since the last run.

        A node that starts within a minute of another run, such as that of another node, leaves the log alone: younger
        events are left for the next run. Raises `StoreUnavailable`.
        """
        await self._begin()
        last = await self._watermarks.value(TURN)
        if not await self._watermarks.has_turn(TURN, min(in_milliseconds(every), in_milliseconds(MIN_AGE))):
            return
        found = await self._run_in_turn()
        if last is not None:
            missed = sum(each.missed for each in found.values())
            log.info("reconciled_at_start", since=to_text(last), missed=missed)

    async def _begin(self) -> None:
        if not self._has_begun:
            for merchant in self._merchants:
                await start_of(merchant, self._watermarks, self._clock())
            self._has_begun = True

    async def _run_in_turn(self) -> dict[str, LogProgress]:
        found: dict[str, LogProgress] = {}
        with contextlib.suppress(NorceError):  # logged already
            async for progress in self.run(min_age=MIN_AGE):
                found[progress.merchant] = progress
                await self._watermarks.put(TURN, self._clock())  # extend the turn
        return found

    async def run(
        self, *, since: datetime | None = None, dry_run: bool = False, min_age: timedelta = timedelta(0)
    ) -> AsyncIterator[LogProgress]:
        """Read every merchant's log, and yield the progress after each page.

        If a merchant's log cannot be read to its end, the next run begins where this one began. The other merchants are
        read all the same; then one error names all that failed.

        Args:
            since: Where to begin, instead of the watermark.
            dry_run: Count what is missing, and store nothing.
            min_age: Leave younger events for the next run.

        Raises:
            NorceError: At the end, if a log could not be read.
            StoreUnavailable: At once.
        """
        failed = []
        for merchant in self._merchants:
            progress = LogProgress(merchant=merchant)
            try:
                async for _ in self._read_log(progress, since, dry_run=dry_run, min_age=min_age):
                    yield progress
                self._metrics.reconciliations.labels(merchant, "done").inc()
            except NorceError as error:
                self._metrics.reconciliations.labels(merchant, "failed").inc()
                log.warning("reconciliation_failed", merchant=merchant, error_type=type(error).__name__)
                failed.append(f"{merchant}: {error}")
                progress.error = str(error)
                yield progress
        if failed:
            raise NorceError("; ".join(failed))

    async def _read_log(
        self, progress: LogProgress, since: datetime | None, *, dry_run: bool, min_age: timedelta
    ) -> AsyncIterator[None]:
        merchant = progress.merchant
        watermark = await self._watermarks.value(f"{WATERMARK} {merchant}")
        start = await self._watermarks.value(f"{START} {merchant}")
        now = to_datetime(self._clock())
        oldest = now - self._remembered
        if since is not None:
            begins = max(since, oldest + self._overlap) - self._overlap
        elif watermark is not None:
            begins = max(to_datetime(watermark) - self._overlap, to_datetime(start or 0), oldest)
        else:
            begins = max(to_datetime(start or 0), oldest)
        newest = watermark or 0
        read = partial(self._norce.events, merchant)
        async for page in Listing[Event](read, overlap=self._overlap).newest_pages(begins):
            events = [event for event in page.items if event.created_at >= begins]
            old = [event for event in events if not min_age or event.created_at < now - min_age]
            await self._store_missing(old, progress, dry_run=dry_run)
            unreadable = page.count - len(page.items)  # of unknown time, so they are counted in every run
            if unreadable:
                log.warning("events_unreadable", merchant=merchant, count=unreadable)
            progress.events += len(events) + unreadable
            progress.others += unreadable
            progress.young += len(events) - len(old)
            progress.total = page.total
            newest = max([newest, *(to_milliseconds(event.created_at) for event in events)])
            yield
        # A `since` later than the watermark leaves a gap, which the next run has to read.
        reached = start if watermark is None else watermark
        leaves_gap = reached is not None and begins > max(to_datetime(reached), oldest)
        if newest and not dry_run and not leaves_gap:
            await self._watermarks.put(f"{WATERMARK} {merchant}", min(newest, to_milliseconds(now - min_age)))
        progress.done = True
        log.info("reconciled", merchant=merchant, events=progress.events, missed=progress.missed,
                 others=progress.others)  # fmt: skip
        yield

    async def _store_missing(self, events: Sequence[Event], progress: LogProgress, *, dry_run: bool) -> None:
        # A log does not speak for another merchant, nor for another adapter if Norce ignored the filter.
        ours = [e for e in events if e.merchant == progress.merchant and e.adapter_id in (None, self._adapter_id)]
        ours.sort(key=lambda event: event.created_at)  # the events of an order in the order in which they happened
        progress.others += len(events) - len(ours)
        counted: set[bytes] = set()  # in a dry run, which stores nothing
        for start in range(0, len(ours), EVENTS_AT_ONCE):
            identified = []
            for event in ours[start : start + EVENTS_AT_ONCE]:
                if (identities := await self._identities(event)) is not None:
                    identified.append((event, identities))
                await asyncio.sleep(0)  # orders may be large; let other tasks run
            progress.others += len(ours[start : start + EVENTS_AT_ONCE]) - len(identified)
            # Another order under the same identity may come from anybody who knows the address; this one is Norce's.
            has = self._intake.inbox.has
            known = await asyncio.gather(*(has(each, bytes(event.payload)) for event, each in identified))
            for (event, identities), is_known in zip(identified, known, strict=True):
                if is_known or not counted.isdisjoint(identities):
                    progress.received += 1
                elif dry_run:
                    counted.update(identities)
                    progress.missed += 1
                else:
                    await self._store_event(event, progress)

    async def _store_event(self, event: Event, progress: LogProgress) -> None:
        # Parsed again: keeping parsed orders while others are stored would take ten times the memory of their text.
        parsed = await self._parse(event, self._clock())
        assert parsed is not None
        notification = await offload(len(parsed[0].body or b""), self._intake.routed, *parsed)
        del parsed
        if await self._intake.store(notification) in (Received.NEW, Received.CONFLICT):
            self._report_missed(notification)
            progress.missed += 1
        else:  # it has come meanwhile
            progress.received += 1

    def _report_missed(self, notification: ReceivedNotification) -> None:
        merchant, channel = notification.channel
        self._metrics.notifications_missed.labels(notification.callback, merchant).inc()
        log.warning("notification_missed", callback=notification.callback, merchant=merchant, channel=channel,
                    order_id=notification.order_id)  # fmt: skip

    async def _identities(self, event: Event) -> tuple[bytes, bytes] | None:
        """Return the two identities under which a callback may have stored the event.

        None stands for an event that is not ours. The two differ if `lastModified` was too far in the future to count
        when the callback came.
        """
        now = await self._parse(event, self._clock())
        ahead = None if now is None else await self._parse(event, LONG_AGO)
        return None if now is None or ahead is None else (now[0].identity, ahead[0].identity)

    async def _parse(self, event: Event, now: int) -> tuple[ReceivedNotification, dict[str, Any]] | None:
        """Return the notification that a callback would have brought, and its order."""
        callback, channel = self._callback(event), Channel(event.merchant, event.channel)
        if callback is None or channel not in self._channels:
            return None
        raw = missing_call(event.order_id, callback, bytes(event.payload))
        try:
            return await parse_notification(raw, reconciled(channel), callback, self._channels, now)
        except (CallbackInvalid, Unauthenticated) as error:
            log.warning("event_unreadable", order_id=event.order_id, callback=callback.name, merchant=event.merchant,
                        error_type=type(error).__name__)  # fmt: skip
            return None

    def _callback(self, event: Event) -> Callback | None:
        """Find the callback by the reference that we register with, or by the name in its address."""
        for name in (event.reference, *_names_in(event.payload)):
            callback = self._intake.routes.callbacks.get(name or "")
            if callback is not None and callback.kind == "notification":
                return callback
        return None


async def start_of(merchant: str, watermarks: Watermarks, now: int) -> int:
    """Return the time of the first start with this merchant. It is now if there was none."""
    start = await watermarks.value(f"{START} {merchant}")
    if start is None:
        await watermarks.put(f"{START} {merchant}", now)
    return now if start is None else start


def missing_call(order_id: str, callback: Callback, body: bytes) -> RawCallback:
    """Return a call as Norce would have made it."""
    headers = {"content-type": "application/json"}
    return RawCallback(method="POST", order_id=order_id, callback=callback.name, query={}, headers=headers, body=body)


class _Registered(msgspec.Struct):
    reference: str | None = None
    invoke: str | None = None


class _Payload(msgspec.Struct):
    notification: _Registered


def _names_in(payload: msgspec.Raw) -> tuple[str | None, ...]:
    try:
        registered: _Registered = decode(bytes(payload), _Payload).notification
    except NotAnOrder:
        return ()
    try:
        path = urlsplit(registered.invoke or "").path
    except ValueError:
        path = ""
    return registered.reference, unquote(path.rpartition("/")[2])
