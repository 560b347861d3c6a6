"""The reader of Norce's lists, from their newest end: the event log and the orders.

They cannot be filtered by time. The order of the event log is not documented, and that of v0's orders cannot be relied
on. So the reader finds out which end is the newest. A list that is in no order is read completely, and so is an
oldest-first list that does not tell its length.

Facts: checkout protocol, sections 4 and 8.4.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from adapter.norce.client import NorceTooLarge, NorceUnavailable, Page

PAGE_SIZE = 100
MAX_PAGES = 100_000
MIN_THIRD = 3  # entries in a third of a page, to tell the order of the list from it


class Dated(Protocol):
    """An event or an order, with its id and its time."""

    @property
    def id(self) -> str: ...

    @property
    def created_at(self) -> datetime: ...


E = TypeVar("E", bound=Dated)
ReadPage = Callable[..., Awaitable[Page[E]]]  # its arguments are `offset` and `limit`


class Listing(Generic[E]):
    """A list at Norce. It is read once.

    `overlap` is how late Norce may write an entry.
    """

    def __init__(self, read: ReadPage[E], *, overlap: timedelta) -> None:
        self._read = read
        self._overlap = overlap
        self._size = PAGE_SIZE

    async def newest_pages(self, begins: datetime) -> AsyncIterator[Page[E]]:
        """Yield pages from the newest end, up to one that is wholly older than `begins`.

        The reading direction makes changes of the list harmless. When old entries fall out at the front of an
        oldest-first list, the rest moves towards what is read next. When new entries come in at the front of a
        newest-first list, some are seen twice.

        In a short list, in which the first and the last page overlap, entries that come in between the two requests can
        make either page look like the newest. Such a list is read in both directions.
        """
        first = last = await self._read_page(0, self._size)
        if first.total is not None and first.total > first.count > 0:
            last = await self._page_until(first.total)
        if last is first or last.offset >= first.count:
            backwards = _newest(last) > _newest(first)
            async for page in self._pages(last if backwards else first, begins, backwards=backwards):
                yield page
            return
        seen: set[str] = set()
        async for page in self._pages(first, begins, backwards=False):
            seen.update(entry.id for entry in page.items)
            yield page
        async for page in self._pages(last, begins, backwards=True):
            items = [entry for entry in page.items if entry.id not in seen]
            yield replace(page, items=items, count=len(items))  # unreadable entries are counted already

    async def _pages(self, page: Page[E], begins: datetime, *, backwards: bool) -> AsyncIterator[Page[E]]:
        for _ in range(MAX_PAGES):
            if not page.count:
                if page.total is not None and page.offset < page.total:
                    raise NorceUnavailable("Norce's list has more entries than it gives")
                return
            yield page
            moments = [entry.created_at for entry in page.items]
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
        raise NorceUnavailable("the list has no end")

    def _gets_older(self, moments: Sequence[datetime]) -> bool:
        """Tell whether a page shows that the list gets older in reading order.

        Too few entries or equal times do not show it. Every entry may be up to `overlap` newer than one before it,
        since Norce may write it late.
        """
        third = len(moments) // 3
        if third < MIN_THIRD or min(moments[:third]) <= max(moments[-third:]):
            return False
        return all(at - oldest <= self._overlap for at, oldest in zip(moments, accumulate(moments, min), strict=True))

    async def _page_until(self, end: int) -> Page[E]:
        """Read the page that ends at `end`, or at the end of the list if it has become shorter."""
        while True:
            offset = max(end - self._size, 0)
            page = await self._read_page(offset, end - offset)
            if page.total is not None and 0 < page.total <= offset:
                end = page.total
            elif not page.count or offset + page.count >= min(end, page.total or end):
                return page
            else:
                self._size = page.count  # shorter than asked for: the entries before `end` are missing

    async def _read_page(self, offset: int, limit: int) -> Page[E]:
        while True:
            try:
                return await self._read(offset=offset, limit=limit)
            except NorceTooLarge:
                if limit == 1:
                    raise
                self._size = limit = limit // 2


def _newest(page: Page[E]) -> datetime:
    return max((entry.created_at for entry in page.items), default=datetime.min.replace(tzinfo=UTC))
