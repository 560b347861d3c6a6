"""Registration on many orders: open ones, those of a list, or all of a merchant.

Norce's list shows the callbacks of every order, so an order that needs no change costs no request of its own. An
interrupted run can therefore be started again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from adapter.identifiers import Channel
from adapter.norce.client import Norce, NorceError, NorceUnavailable
from adapter.registrations.on_orders import PLACES, CallbacksRejected, Registered, Registrar

AT_ONCE = 16
PAGE_SIZE = 100
TRIES = 3  # of a request for which Norce asks us to wait (429 or 503 with Retry-After)
LONGEST_WAIT = timedelta(minutes=1)
# In these states an order never changes again, except for its payments (checkout protocol, section 3). Every other one,
# also one that is not documented, is open.
FINAL_STATES = frozenset({"completed", "declined", "removed"})


class Candidate(NamedTuple):
    """An order to compare with the configuration."""

    order_id: str
    order: Mapping[str, Any] | None = None  # as Norce lists it; None: it must be read


@dataclass(frozen=True, slots=True, kw_only=True)
class HandledOrder:
    """The callbacks on an order, by what was done with them or, in a dry run, would be."""

    channel: Channel
    order_id: str
    done: Registered
    error: NorceError | None = None


def is_open(order: Mapping[str, Any]) -> bool:
    """Tell whether an order may still change."""
    state = order.get("state")
    status = state.get("currentStatus") if isinstance(state, Mapping) else None
    return str(status).lower() not in FINAL_STATES


class OrderBatch:
    """The orders of a channel, of which some are handled at the same time.

    Args:
        channel: The channel of the orders.
        removes: Remove our callbacks instead of registering them.
        dry_run: Compare the orders and change nothing.
        stop: No further order is begun once it is set.
    """

    def __init__(
        self, registrar: Registrar, norce: Norce, channel: Channel, *, removes: bool, dry_run: bool, stop: asyncio.Event
    ) -> None:
        self._registrar = registrar
        self._norce = norce
        self._channel = channel
        self._removes = removes
        self._dry_run = dry_run
        self._stop = stop

    async def listed(self, *, only_open: bool, progress: Callable[[int, int | None], None]) -> AsyncIterator[Candidate]:
        """Yield the orders that Norce lists, oldest first: new ones are added at the end.

        Args:
            only_open: Leave out the orders in a final state.
            progress: Takes the number of orders that were read, and that of all if Norce says so.

        Raises:
            NorceError: The list, or an order in it, cannot be read. All that could be read were yielded.
        """
        query = {"order_by": "created", "order_by_direction": "asc"}
        offset, unreadable, number = 0, 0, 1
        while True:
            try:
                async for page in self._norce.order_pages(self._channel, offset, limit=PAGE_SIZE, **query):
                    for order in page.items:
                        if isinstance(order_id := order.get("id"), str) and (is_open(order) or not only_open):
                            yield Candidate(order_id, order)
                    unreadable += page.count - len(page.items)
                    offset, number = page.offset + page.count, 1
                    progress(offset, page.total)
                break
            except NorceError as error:
                if not await self._may_try_again(error, number):
                    raise
                number += 1
        if unreadable:
            raise NorceUnavailable(f"{unreadable} orders of Norce's list cannot be read")

    async def handle(self, candidates: AsyncIterator[Candidate]) -> AsyncIterator[HandledOrder]:
        """Register or remove callbacks on the orders, and yield each when it is handled.

        An error stops no other order.

        Raises:
            NorceError: `candidates` raised it. The orders before it were handled.
            LookupError: No key to sign with is configured.
        """
        running: set[asyncio.Task[HandledOrder]] = set()
        failure: NorceError | None = None
        seen = set[str]()
        try:
            try:
                async for each in candidates:
                    if self._stop.is_set():
                        break
                    if each.order_id in seen:
                        continue
                    seen.add(each.order_id)
                    if (done := self._done_already(each)) is not None:
                        yield done
                        continue
                    running.add(asyncio.create_task(self._handle(each.order_id)))
                    while len(running) >= AT_ONCE:
                        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                        for task in ended:
                            yield task.result()
            except NorceError as error:
                failure = error
            for handled in asyncio.as_completed(running):
                yield await handled
        finally:
            for left in running:
                left.cancel()
        if failure is not None:
            raise failure

    def _done_already(self, candidate: Candidate) -> HandledOrder | None:
        if candidate.order is None or not any(place in candidate.order for place, *_ in PLACES.values()):
            return None
        found = self._registrar.compare(self._channel, candidate.order_id, candidate.order, removes=self._removes)
        if not (found.is_equal or self._dry_run):
            return None
        done = self._registrar.names(found)
        return HandledOrder(channel=self._channel, order_id=candidate.order_id, done=done)

    async def _handle(self, order_id: str) -> HandledOrder:
        done = Registered()
        failure: NorceError | None = None
        for number in range(1, TRIES + 1):
            try:
                done, failure = await self._act(order_id), None
                break
            except NorceError as error:
                done = error.done if isinstance(error, CallbacksRejected) else done
                failure = error
                if not await self._may_try_again(error, number):
                    break
        return HandledOrder(channel=self._channel, order_id=order_id, done=done, error=failure)

    async def _may_try_again(self, error: NorceError, number: int) -> bool:
        """Wait as long as Norce asks for.

        Returns:
            False if it asks for no time, or has asked too often.
        """
        after = error.after if isinstance(error, NorceUnavailable) else None
        if after is None or number >= TRIES or self._stop.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(after, LONGEST_WAIT).total_seconds()):
                await self._stop.wait()
        return True

    async def _act(self, order_id: str) -> Registered:
        if self._dry_run:
            order = await self._norce.order(self._channel, order_id)
            found = self._registrar.compare(self._channel, order_id, order.data, removes=self._removes)
            return self._registrar.names(found)
        act = self._registrar.deregister if self._removes else self._registrar.register
        return await act(self._channel, order_id)


async def candidates(order_ids: Iterable[str], progress: Callable[[int, int | None], None]) -> AsyncIterator[Candidate]:
    """Yield the orders with these ids."""
    order_ids = list(order_ids)
    for number, order_id in enumerate(order_ids, 1):
        yield Candidate(order_id)
        progress(number, len(order_ids))
