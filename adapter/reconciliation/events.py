"""
Finds the notifications that never came: reads Norce's event log, and brings what we have not received.

Norce documents no retry policy, so a notification may have been tried once. What is missing goes through the same
intake as a callback, where its identity makes it once, whoever is first. Nothing is retried that way.

What one would get wrong: the log cannot be asked for a time, its order is documented nowhere, and its clock is not
ours. So it is read from its newest end, whichever that turns out to be, until a whole page is older than what was seen
the last time and some more; and where it is in no order, all of it is read. How far it was read is a moment of Norce's
clock, and never later than ours: a clock of theirs that runs ahead and is set back hides nothing. And what is older
than the ledger's memory is nobody's to bring: whether it came cannot be known any more.

Facts: checkout protocol, sections 8.3 and 8.4.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
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
from adapter.moments import in_milliseconds, to_datetime, to_milliseconds
from adapter.norce.client import Event, Norce, NorceError, NorceTooLarge, NorceUnavailable, Page
from adapter.routing.routes import Callback

log = structlog.get_logger(__name__)

TURN_SECONDS = 30.0
A_PAGE = 100
MOST_PAGES = 100_000
ENOUGH_TO_TELL = 3
TURN = "reconciliation"
WATERMARK, FLOOR = "reconciled", "reconciled since"
STILL_ON_ITS_WAY = timedelta(minutes=1)
LONG_AGO = -(10**15)
CLOCKS_APART = timedelta(hours=1)  # at most, where an event is as old as what the ledger forgets


class Reconciled(msgspec.Struct, kw_only=True):
    """
    What one merchant's log showed so far. Of the `events`, `received` are those that we have; `missed` are those that
    we had not, brought now unless it was a dry run; `others` nobody wants any more: their callback or channel is not
    configured, or no order is in them; and `young` ones may be on their way yet, and are left for the next time.
    `total` is how many events there are, where Norce says so; `error` is why the log was not read to its end.
    """

    merchant: str
    events: int = 0
    received: int = 0
    missed: int = 0
    others: int = 0
    young: int = 0
    total: int | None = None
    done: bool = False
    error: str | None = None


class Reconciliation:
    """
    `clock` is the ledger's, in milliseconds. `overlap` is how far before the newest event of the last time it begins;
    `remembered` is how long the ledger knows what it has had.
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
        self._channels = channels
        self._merchants = list(dict.fromkeys(channel.merchant for channel in channels))
        self._adapter_id = adapter_id
        self._overlap = overlap
        self._remembered = remembered - CLOCKS_APART
        self._metrics = metrics
        self._clock = clock
        self._has_begun = False

    async def run(
        self, *, since: datetime | None = None, dry_run: bool = False, spared: timedelta = timedelta(0)
    ) -> AsyncIterator[Reconciled]:
        """
        Reads every merchant's log, and tells after each page what it showed.

        `since` is in place of how far it was read the last time; what is younger than `spared` is left for the next. A
        merchant whose log cannot be read to its end is read again from where this time began; the others go on, and
        then all the errors are raised as one. Raises `NorceError`, and `StoreUnavailable` at once.
        """
        failed = []
        for merchant in self._merchants:
            found = Reconciled(merchant=merchant)
            try:
                async for found in self._of(merchant, since, dry_run=dry_run, spared=spared):
                    yield found
                self._metrics.reconciliations.labels(merchant, "done").inc()
            except NorceError as error:
                self._metrics.reconciliations.labels(merchant, "failed").inc()
                log.warning("reconciliation_failed", merchant=merchant, error_type=type(error).__name__)
                failed.append(f"{merchant}: {error}")
                found.error = str(error)
                yield found
        if failed:
            raise NorceError("; ".join(failed))

    async def in_turn(self, every: timedelta) -> None:
        """
        A run, where it is due and no other node has it.

        A merchant's log begins when it is first asked, due or not: what was there before this ledger is left to a
        person who gives a time, for some other ledger may have it. Raises `StoreUnavailable`.
        """
        if not self._has_begun:
            for merchant in self._merchants:
                if await self._watermarks.value(f"{FLOOR} {merchant}") is None:
                    await self._watermarks.put(f"{FLOOR} {merchant}", self._clock())
            self._has_begun = True
        if not await self._watermarks.has_turn(TURN, in_milliseconds(every)):
            return
        with contextlib.suppress(NorceError):  # it has been told
            async for _ in self.run(spared=STILL_ON_ITS_WAY):
                await self._watermarks.put(TURN, self._clock())  # still at it

    async def _of(
        self, merchant: str, since: datetime | None, *, dry_run: bool, spared: timedelta
    ) -> AsyncIterator[Reconciled]:
        found = Reconciled(merchant=merchant)
        read_to = await self._watermarks.value(f"{WATERMARK} {merchant}")
        floor = await self._watermarks.value(f"{FLOOR} {merchant}")
        oldest = to_datetime(self._clock()) - self._remembered
        if since is not None:
            begins = max(since, oldest + self._overlap) - self._overlap
        else:
            known = [to_datetime(read_to) - self._overlap] if read_to is not None else []
            begins = max([*known, to_datetime(floor or 0), oldest])
        reached = floor if read_to is None else read_to
        before = to_datetime(self._clock()) - spared
        newest = read_to or 0
        async for page in self._newest_first(merchant, begins):
            events = [event for event in page.items if event.created_at >= begins]
            old = [event for event in events if not spared or event.created_at < before]
            await self._bring(old, found, dry_run=dry_run)
            spoiled = page.count - len(page.items)  # nobody can say when, so they are told each time
            if spoiled:
                log.warning("events_unreadable", merchant=merchant, count=spoiled)
            found.events, found.total = found.events + len(events) + spoiled, page.total
            found.others += spoiled
            found.young += len(events) - len(old)
            newest = max([newest, *(to_milliseconds(event.created_at) for event in events)])
            yield found
        if newest and not dry_run and (reached is None or begins <= max(to_datetime(reached), oldest)):
            # Not past a gap that a late `since` leaves, nor past what is left for the next time, nor our own clock.
            await self._watermarks.put(f"{WATERMARK} {merchant}", min(newest, to_milliseconds(before)))
        found.done = True
        log.info("reconciled", merchant=merchant, events=found.events, missed=found.missed, others=found.others)
        yield found

    async def _newest_first(self, merchant: str, begins: datetime) -> AsyncIterator[Page[Event]]:
        """The pages, until one is older than that."""
        events = _Log(self._norce, merchant)
        first = last = await events.after(0)
        if first.total is not None and first.total > first.count > 0:
            last = await events.before(first.total)
        # Where new ones come at the end, it is read from there. What falls out at the front meanwhile moves the rest
        # towards what is read next, and what comes in at the front is seen twice: nothing is passed by.
        backwards = _newest(last) > _newest(first)
        page = last if backwards else first
        for _ in range(MOST_PAGES):
            if not page.count:
                if page.total is not None and page.offset < page.total:
                    raise NorceUnavailable("Norce's log has more events than it gives")
                return
            yield page
            if page.items and _newest(page) < begins and self._gets_older(page, backwards=backwards):
                return
            if backwards:
                if page.offset == 0:
                    return
                page = await events.before(page.offset)
            else:
                offset = page.offset + page.count
                if page.total is not None and offset >= page.total:
                    return
                page = await events.after(offset)
        raise NorceUnavailable("the log has no end")

    def _gets_older(self, page: Page[Event], *, backwards: bool) -> bool:
        """
        Whether a page is in order, but for what was written late; in no order at all, older is no reason to stop. Nor
        where nobody can say which way the order is: too few events, or a crowd whose moments are all alike.
        """
        moments = [event.created_at for event in page.items]
        if backwards:
            moments.reverse()
        third = len(moments) // 3
        if third < ENOUGH_TO_TELL or min(moments[:third]) <= max(moments[-third:]):
            return False
        oldest = datetime.max.replace(tzinfo=UTC) - self._overlap
        for moment in moments:
            if moment > oldest + self._overlap:
                return False
            oldest = min(oldest, moment)
        return True

    async def _bring(self, events: Sequence[Event], found: Reconciled, *, dry_run: bool) -> None:
        # Nobody's log speaks for another merchant, nor for another adapter where the filter was not heeded.
        ours = [e for e in events if e.merchant == found.merchant and e.adapter_id in (None, self._adapter_id)]
        ours.sort(key=lambda event: event.created_at)  # an order's own, in the order in which they happened
        identities = []
        for event in ours:
            if (both := self._identities(event)) is not None:
                identities.append((event, both))
            await asyncio.sleep(0)  # a page may be megabytes of orders: others are answered meanwhile
        found.others += len(events) - len(identities)
        known = await self._intake.inbox.known([identity for _, both in identities for identity in both])
        for event, both in identities:
            if not known.isdisjoint(both):
                found.received += 1
                continue
            if not dry_run:
                # Taken apart again: a page of parsed orders is ten times as large as its text.
                if (parsed := self._parsed(event, self._clock())) is None:
                    raise AssertionError("an event that was read is not any more")
                notification = self._intake.routed(*parsed)
                del parsed
                if await self._intake.store(notification) is not Received.NEW:  # it has come meanwhile
                    found.received += 1
                    continue
                self._tell(notification)
            known.update(both)
            found.missed += 1

    def _tell(self, notification: ReceivedNotification) -> None:
        merchant, name = notification.channel
        self._metrics.missed.labels(notification.callback, merchant).inc()
        log.warning("notification_missed", callback=notification.callback, merchant=merchant, channel=name,
                    order_id=notification.order_id)  # fmt: skip

    def _identities(self, event: Event) -> tuple[bytes, bytes] | None:
        """
        Under which a callback may have been remembered: whether lastModified was too far ahead to count was seen by the
        clock of the moment when it came. None where there is no such callback.
        """
        now = self._parsed(event, self._clock())
        ahead = None if now is None else self._parsed(event, LONG_AGO)
        return None if now is None or ahead is None else (now[0].identity, ahead[0].identity)

    def _parsed(self, event: Event, now: int) -> tuple[ReceivedNotification, dict[str, Any]] | None:
        """The notification that a callback would have brought; None where there is none."""
        callback, channel = self._callback(event), Channel(event.merchant, event.channel)
        if callback is None or channel not in self._channels:
            return None
        raw = RawCallback(
            method="POST",
            order_id=event.order_id,
            callback=callback.name,
            query={},
            headers={"content-type": "application/json"},
            body=bytes(event.payload),
        )
        sender = reconciled(channel)
        try:
            return parse_notification(raw, sender, callback, self._channels, now)
        except (CallbackInvalid, Unauthenticated) as error:
            log.warning("event_unreadable", order_id=event.order_id, callback=callback.name, merchant=event.merchant,
                        error_type=type(error).__name__)  # fmt: skip
            return None

    def _callback(self, event: Event) -> Callback | None:
        """By the reference that we register with, or else by the address."""
        for name in (event.reference, *_named_in(event.payload)):
            callback = self._intake.routes.callbacks.get(name or "")
            if callback is not None and callback.kind == "notification":
                return callback
        return None


class _Log:
    """One merchant's events, in pages that are as large as Norce and memory allow."""

    def __init__(self, norce: Norce, merchant: str) -> None:
        self._norce = norce
        self._merchant = merchant
        self._size = A_PAGE

    async def after(self, offset: int) -> Page[Event]:
        """The page that begins there."""
        while True:
            page = await self._read(offset, self._size)
            if page is not None:
                return page

    async def before(self, end: int) -> Page[Event]:
        """The page that ends there. Norce may give fewer than it is asked for, and those from the wrong end."""
        while True:
            offset = max(end - self._size, 0)
            page = await self._read(offset, end - offset)
            if page is None:
                continue
            missing = min(end, end if page.total is None else page.total) - offset - page.count
            if not page.count or missing <= 0:
                return page
            self._size = page.count

    async def _read(self, offset: int, limit: int) -> Page[Event] | None:
        """None where it is to be tried again with a smaller size."""
        try:
            return await self._norce.events(self._merchant, offset=offset, limit=limit)
        except NorceTooLarge:
            if limit == 1:
                raise
            self._size = max(limit // 2, 1)
            return None


class _Registered(msgspec.Struct):
    reference: str | None = None
    invoke: str | None = None


class _Payload(msgspec.Struct):
    notification: _Registered


def _named_in(payload: bytes | msgspec.Raw) -> tuple[str | None, ...]:
    """What may be the name of a callback in an event's payload."""
    try:
        registered = msgspec.json.decode(payload, type=_Payload).notification
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    return registered.reference, _last_step(registered.invoke or "")


def _last_step(address: str) -> str:
    try:
        return unquote(urlsplit(address).path.rpartition("/")[2])
    except ValueError:
        return ""


def _newest(page: Page[Event]) -> datetime:
    return max((event.created_at for event in page.items), default=datetime.min.replace(tzinfo=UTC))


async def keep_reconciled(reconciliation: Reconciliation, every: timedelta) -> None:
    """Asks often whether it is due: which node has the turn is for the ledger to say."""
    while every:
        try:
            await reconciliation.in_turn(every)
        except StoreUnavailable:  # the store has said so itself
            pass
        except Exception as error:  # a mistake of ours, or of Norce's, must not end all that come after
            log.error("reconciliation_broke", exc_info=error)
        await asyncio.sleep(min(every.total_seconds(), TURN_SECONDS))
    await asyncio.Event().wait()
