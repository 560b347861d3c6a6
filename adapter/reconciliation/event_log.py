"""The reader of Norce's event log, from its newest end.

The log cannot be filtered by time, and its order is not documented. So the reader finds out which end is the newest. A
log that is in no order is read completely, and so is an oldest-first log that does not tell its length.

Facts: checkout protocol, section 8.4.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from adapter.norce.client import Event, Norce, NorceTooLarge, NorceUnavailable, Page

PAGE_SIZE = 100
MAX_PAGES = 100_000
MIN_THIRD = 3  # events in a third of a page, to tell the order of the log from it


class EventLog:
    """The event log of one merchant. It is read once.

    `overlap` is how late Norce may write an event.
    """

    def __init__(self, norce: Norce, merchant: str, *, overlap: timedelta) -> None:
        self._norce = norce
        self._merchant = merchant
        self._overlap = overlap
        self._size = PAGE_SIZE

    async def newest_pages(self, begins: datetime) -> AsyncIterator[Page[Event]]:
        """Yield pages from the newest end, up to one that is wholly older than `begins`.

        The reading direction makes changes of the log harmless. When old events fall out at the front of an
        oldest-first log, the rest moves towards what is read next. When new events come in at the front of a
        newest-first log, some are seen twice.
        """
        first = last = await self._read_page(0, self._size)
        if first.total is not None and first.total > first.count > 0:
            last = await self._page_until(first.total)
        backwards = _newest(last) > _newest(first)
        page = last if backwards else first
        for _ in range(MAX_PAGES):
            if not page.count:
                if page.total is not None and page.offset < page.total:
                    raise NorceUnavailable("Norce's log has more events than it gives")
                return
            yield page
            moments = [event.created_at for event in page.items]
            if moments and _newest(page) < begins and self._gets_older(moments[::-1] if backwards else moments):
                return
            if backwards:
                if page.offset == 0:
                    return
                page = await self._page_until(page.offset)
            else:
                offset = page.offset + page.count
                if page.total is not None and offset >= page.total:
                    return
                page = await self._read_page(offset, self._size)
        raise NorceUnavailable("the log has no end")

    def _gets_older(self, moments: Sequence[datetime]) -> bool:
        """Tell whether a page shows that the log gets older in reading order.

        Too few events or equal times do not show it. Every event may be up to `overlap` newer than one before it, since
        Norce may write it late.
        """
        third = len(moments) // 3
        if third < MIN_THIRD or min(moments[:third]) <= max(moments[-third:]):
            return False
        return all(at - oldest <= self._overlap for at, oldest in zip(moments, accumulate(moments, min), strict=True))

    async def _page_until(self, end: int) -> Page[Event]:
        """Read the page that ends at `end`, or at the end of the log if it has become shorter."""
        while True:
            offset = max(end - self._size, 0)
            page = await self._read_page(offset, end - offset)
            if page.total is not None and 0 < page.total <= offset:
                end = page.total
            elif not page.count or offset + page.count >= min(end, page.total or end):
                return page
            else:
                self._size = page.count  # shorter than asked for: the events before `end` are missing

    async def _read_page(self, offset: int, limit: int) -> Page[Event]:
        while True:
            try:
                return await self._norce.events(self._merchant, offset=offset, limit=limit)
            except NorceTooLarge:
                if limit == 1:
                    raise
                self._size = limit = limit // 2


def _newest(page: Page[Event]) -> datetime:
    return max((event.created_at for event in page.items), default=datetime.min.replace(tzinfo=UTC))
