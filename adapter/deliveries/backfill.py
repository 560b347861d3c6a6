"""Backfill: deliveries of a route for the orders of stored notifications.

A new route may be for orders that are stored already. The configured conditions decide which of them it wants. An order
whose body is no longer stored is read from Norce.

Each step is one transaction, and an order that has a delivery is passed over, so an interrupted command can be started
again.
"""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from adapter.conditions import Result
from adapter.identifiers import Channel
from adapter.ledger.backfill import BackfillLedger, BackfillStep, Following, StoredNotification
from adapter.ledger.claims import QueueKey
from adapter.ledger.store import Store
from adapter.norce.client import Norce, NorceError
from adapter.offload import offload
from adapter.orders import NotAnOrder, decode, order_in
from adapter.routing.routes import Route, Routes, wants

STEP_SECONDS = 2.0  # after which a step that found nothing ends
MAX_BYTES_AT_ONCE = 4 * 1024 * 1024  # of bodies; a larger one is read by itself
MAX_READS_AT_ONCE = 16  # of orders at Norce


class UnreadOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order that could not be evaluated or delivered, and the reason."""

    merchant: str
    channel: str
    order_id: str
    reason: str


class FoundOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order that the route wants."""

    merchant: str
    channel: str
    order_id: str


class BackfillResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a step."""

    changed: int
    read: int  # notifications
    after: str | None  # where the next step begins; None after the last one
    action: int | None  # None in a dry run
    found: list[FoundOrder] = []  # in a dry run; an order may be found in several steps
    unread: list[UnreadOrder] = []
    paused: list[Channel] = []  # of paused queues, whose deliveries wait; given by the last step


class Backfill:
    """The backfill of each notification route, in a running service."""

    def __init__(self, routes: Routes, norce: Norce, store: Store, *, queue_ids: Mapping[QueueKey, int]) -> None:
        self._routes = routes
        self._norce = norce
        self._store = store
        self._queue_ids = queue_ids

    async def step(self, step: BackfillStep) -> BackfillResult:
        """Read the next notifications, and add deliveries for the orders that the route wants.

        Reads on until it has found an order, for at most `STEP_SECONDS`.

        Raises:
            ValueError: There is no such queue, or it delivers nothing.
            StoreUnavailable: The ledger cannot be read or written.
        """
        route, queue_ids = self._queues(step)
        ledger = BackfillLedger(self._store, callback=route.callback.name, queue_ids=queue_ids, refetch=route.refetch)
        clock = asyncio.get_running_loop().time
        ends, after, read = clock() + STEP_SECONDS, step.after, 0
        wanted: list[StoredNotification] = []
        unread: dict[tuple[int, str], UnreadOrder] = {}
        while not wanted and not unread:
            page = await asyncio.to_thread(ledger.following, after, step.most, step.since)
            found, after = _cut(page)
            read += page.read
            wanted = await self._wanted(route, ledger, found, unread)
            if after is None or clock() > ends:
                break
        action, added = step.action, 0
        if not step.dry_run and (wanted or action is None):
            added, action = await ledger.add(wanted, step)
        return BackfillResult(
            changed=added,
            read=read,
            after=after,
            action=action,
            found=[FoundOrder(**_names(each)) for each in wanted] if step.dry_run else [],
            unread=list(unread.values()),
            paused=await asyncio.to_thread(ledger.paused) if after is None else [],
        )

    def _queues(self, step: BackfillStep) -> tuple[Route, dict[Channel, int]]:
        names = [route.name for route in self._routes.all if route.callback.kind == "notification"]
        route = next((route for route in self._routes.all if route.name == step.route), None)
        if route is None or route.name not in names:
            raise ValueError(f"there is no notification route {step.route}; there are: {', '.join(names) or 'none'}")
        if route.shadow:
            raise ValueError(f"route {route.name} is in shadow mode, so it would deliver nothing; remove mode: shadow")
        queue_ids = {
            key.channel: queue_id
            for key, queue_id in self._queue_ids.items()
            if key.route == route.name
            and step.merchant in (None, key.channel.merchant)
            and step.channel in (None, key.channel.name)
        }
        if not queue_ids:
            raise ValueError(f"route {route.name} has no such queue: it is not for this merchant or channel")
        return route, queue_ids

    async def _wanted(
        self,
        route: Route,
        ledger: BackfillLedger,
        found: Sequence[StoredNotification],
        unread: dict[tuple[int, str], UnreadOrder],
    ) -> list[StoredNotification]:
        """Return the newest notification of each order that the route wants.

        Args:
            route: The route.
            ledger: Its ledger.
            found: Notifications, newest first.
            unread: Gets the orders that could not be evaluated.
        """
        wanted: dict[tuple[int, str], StoredNotification] = {}
        remaining = list(found)
        while remaining:
            batch, remaining = _batch(remaining)
            batch = [each for each in batch if _lane(each) not in wanted]
            bodies = await asyncio.to_thread(ledger.bodies, [each.id for each in batch if each.body_bytes is not None])
            missing = {_lane(each): each for each in batch if each.id not in bodies}
            answers = await asyncio.gather(*(self._wants_at_norce(route, each) for each in missing.values()))
            at_norce = dict(zip(missing, answers, strict=True))
            for each in batch:
                if _lane(each) in wanted:
                    continue
                if (body := bodies.pop(each.id, None)) is None:
                    is_wanted = at_norce[_lane(each)]
                else:
                    is_wanted = await offload(len(body), _wants, route, body)
                    await asyncio.sleep(0)  # let other tasks run
                if isinstance(is_wanted, str):
                    names = _names(each)
                    unread.setdefault(_lane(each), UnreadOrder(**names, reason=is_wanted))
                elif is_wanted:
                    wanted[_lane(each)] = each
        return list(wanted.values())

    async def _wants_at_norce(self, route: Route, notification: StoredNotification) -> bool | str:
        """Return whether the route wants the order as Norce has it now, or why that does not help."""
        try:
            order = await self._norce.order(notification.channel, notification.order_id)
        except NorceError as error:
            return f"its body is not stored, and Norce did not give it: {error}"
        result = await offload(len(order.raw), wants, route, order.data)
        if result is Result.NOT_MATCHED:
            return False
        return True if route.refetch else "its body is not stored, and the route does not read the order again"


def _wants(route: Route, body: bytes) -> bool | str:
    # An error of a condition counts, as on receipt: the attempt meets it again and makes a dead letter.
    try:
        return wants(route, order_in(decode(body))) is not Result.NOT_MATCHED
    except NotAnOrder:
        return "its stored body holds no order"


def _cut(page: Following) -> tuple[list[StoredNotification], str | None]:
    """Return the notifications of a step, and where the next one begins.

    Each order that has to be read from Norce may take seconds, so a step reads few of them.
    """
    without = [index for index, each in enumerate(page.found) if each.body_bytes is None]
    if len(without) <= MAX_READS_AT_ONCE:
        return page.found, page.after
    found = page.found[: without[MAX_READS_AT_ONCE]]
    return found, found[-1].cursor


def _batch(found: Sequence[StoredNotification]) -> tuple[list[StoredNotification], list[StoredNotification]]:
    """Split off the first notifications whose bodies fit into memory."""
    total, number = 0, 0
    for number, each in enumerate(found):
        total += each.body_bytes or 0
        if number and total > MAX_BYTES_AT_ONCE:
            break
    else:
        number += 1
    return list(found[:number]), list(found[number:])


def _lane(notification: StoredNotification) -> tuple[int, str]:
    return notification.queue_id, notification.order_id


def _names(notification: StoredNotification) -> dict[str, str]:
    merchant, channel = notification.channel
    return {"merchant": merchant, "channel": channel, "order_id": notification.order_id}
