"""The facts about an order: from the ledger, from Norce and from the configuration.

`find_in_ledger` and `read_orders` find the orders, and `facts_of` gathers the facts about one of them. Facts have
names, places, states and moments. Of the order's values they have only its id, its references and its status.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from adapter.callbacks.senders import Senders
from adapter.config import Config
from adapter.identifiers import Channel
from adapter.ledger.claims import QueueKey
from adapter.ledger.queries import DeliveryFilter, Queries
from adapter.ledger.settlement import State
from adapter.moments import to_milliseconds, to_text
from adapter.norce.client import Norce, NorceError, NorceRefused, OrderNotFound
from adapter.orders import NotAnOrder, decode, instant, order_in
from adapter.registrations.on_orders import callback_name, registrations, stored_on
from adapter.routing.explanations import explained
from adapter.routing.routes import STATUS_SCOPE, Route, Routes

MAX_ORDERS = 20  # of one reference
MAX_DELIVERIES = 50  # of one order, the newest
MAX_ACTIONS = 1000  # among which the pause of a queue is looked for
REQUESTS_AT_ONCE = 8
STATUSES = ("checkout", "processing", "accepted", "completed", "declined", "removed")  # checkout protocol, section 3
FAILED_STATUSES = ("declined", "removed")
LAST_STATUSES = ("completed", *FAILED_STATUSES)


class AtNorce(Enum):
    """The answers of Norce about an order."""

    FOUND = "found"
    MISSING = "missing"
    UNREADABLE = "unreadable"  # no answer, a refused token, or a merchant that is not configured


class OnOrder(Enum):
    """The states of one of our callbacks on an order."""

    REGISTERED = "registered"
    OUTDATED = "outdated"  # with another address or condition than configured
    MISSING = "missing"
    UNREAD = "unread"  # Norce could not be read


@dataclass(frozen=True, slots=True, kw_only=True)
class NorceProblem:
    """The reason why Norce could not be read."""

    words: str  # for the merchant
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An order as Norce has it."""

    channel: Channel
    order_id: str
    order: dict[str, Any] | None = field(default=None, repr=False)  # as plain JSON
    problem: NorceProblem | None = None  # None if Norce answered


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """The facts about an order on one route. Rows are those of `Queries`, newest first."""

    route: str
    callback: str | None = None  # None if the route is no longer configured
    is_configured: bool = True  # for the merchant and channel of the order
    is_shadow: bool = False
    on_order: OnOrder = OnOrder.UNREAD
    arrivals: Sequence[Mapping[str, Any]] = ()  # notifications of its callback
    decision: str | None = None  # of the configured conditions: matched, not_matched or error; None without an order
    conditions: Sequence[Mapping[str, Any]] = ()  # explained, that of the callback first
    wanted_statuses: Sequence[str] = ()  # as far as the conditions name them
    deliveries: Sequence[Mapping[str, Any]] = ()  # with their attempts
    lane: Mapping[str, Any] | None = None
    queue: Mapping[str, Any] | None = None
    pause: Mapping[str, Any] | None = None  # the command of a person that paused the queue

    @property
    def current(self) -> Mapping[str, Any] | None:
        """The delivery that decides: the one in work, else the next that waits, else the newest."""
        attempted = self.lane and self.lane["current_delivery_id"]
        waiting = [each for each in self.deliveries if each["state"] == State.WAITING.value]
        in_work = [each for each in self.deliveries if each["id"] == attempted]
        lasting = [each for each in self.deliveries if each["reason"] != "superseded"]
        return next(iter((*in_work, *waiting[::-1], *lasting, *self.deliveries)), None)

    @property
    def delivered(self) -> Mapping[str, Any] | None:
        """The newest delivery that the destination has."""
        return next((each for each in self.deliveries if each["reason"] == "delivered"), None)

    @property
    def failing(self) -> list[Mapping[str, Any]]:
        """The conditions that do not hold."""
        return [each for each in self.conditions if each["result"] != "matched"]

    @property
    def awaits_status(self) -> bool:
        """True if nothing but the status of the purchase keeps the conditions from holding."""
        return self.decision == "not_matched" and all(each["scope"] == STATUS_SCOPE for each in self.failing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about one order. Moments are texts in UTC."""

    asked: str
    now: str  # by the ledger's clock
    channel: Channel | None = None  # None if neither the ledger nor Norce has the order
    order_id: str | None = None
    reference: str | None = None
    cart_reference: str | None = None
    at_norce: AtNorce = AtNorce.UNREADABLE
    problem: NorceProblem | None = None
    status: str | None = None
    created_at: str | None = None  # by Norce's clock
    changed_at: str | None = None
    callbacks: Mapping[str, OnOrder] = field(default_factory=dict)  # ours, by name
    is_channel_configured: bool = True
    is_switched_off: bool = False  # in Norce's configuration
    is_held: bool = False  # by `serve --hold`
    is_served: bool = True  # a service uses the ledger
    notifications: Sequence[Mapping[str, Any]] = ()  # newest first
    under_gone_names: Sequence[Mapping[str, Any]] = ()  # notifications of callbacks that are not configured
    verdicts: Sequence[Mapping[str, Any]] = ()
    routes: Sequence[RouteFacts] = ()

    @property
    def refusal(self) -> Mapping[str, Any] | None:
        """The newest verdict, or `no_answer`, that refused the purchase or a change of the order."""
        answered = (each for each in self.verdicts if each["kind"] == "answer")
        return next((each for each in answered if each["decided"] != "patch"), None)


# --- the orders -------------------------------------------------------------------------------------------------------


def find_in_ledger(queries: Queries, asked: str) -> list[Reading]:
    """Return the orders that the ledger knows by this id or reference.

    They are not yet read from Norce.
    """
    return [
        Reading(channel=Channel(found["merchant"], found["channel"]), order_id=found["order_id"])
        for found in queries.orders(asked)[:MAX_ORDERS]
    ]


async def read_orders(
    norce: Norce, asked: str, known: Sequence[Reading], channels: Iterable[Channel]
) -> tuple[list[Reading], NorceProblem | None]:
    """Read the known orders from Norce, or find them there by id or reference.

    Args:
        norce: The client.
        asked: An id or a reference.
        known: The orders that the ledger knows.
        channels: The configured channels to search.

    Returns:
        The orders, and the first problem of the search.
    """
    search = _NorceSearch(norce)
    if all(each.order_id != asked for each in known):
        channels = list(channels)
        by_id = await asyncio.gather(*(search.read(channel, asked) for channel in channels))
        if found := [each for each in by_id if each.order is not None]:
            return found, search.problem
        listed = await asyncio.gather(*(search.ids(channel, asked) for channel in channels))
        keys = {(channel, each) for channel, ids in zip(channels, listed, strict=True) for each in ids}
        keys |= {(each.channel, each.order_id) for each in known}
        known = [Reading(channel=channel, order_id=order_id) for channel, order_id in sorted(keys)][:MAX_ORDERS]
    readings = await asyncio.gather(*(search.read(each.channel, each.order_id) for each in known))
    return readings, search.problem


class _NorceSearch:
    """A search at Norce that makes few requests at once, and goes on after an error."""

    def __init__(self, norce: Norce) -> None:
        self.problem: NorceProblem | None = None
        self._norce = norce
        self._turns = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def read(self, channel: Channel, order_id: str) -> Reading:
        async with self._turns:
            try:
                order = await self._norce.order(channel, order_id)
            except OrderNotFound:
                return Reading(channel=channel, order_id=order_id)
            except NorceError as error:
                problem = self._noted(error)
            except KeyError:  # no token is configured
                problem = NorceProblem(
                    words="its merchant is not set up in our service", detail="no token is configured"
                )
            else:
                return Reading(channel=channel, order_id=order_id, order=order.data)
        return Reading(channel=channel, order_id=order_id, problem=problem)

    async def ids(self, channel: Channel, reference: str) -> list[str]:
        """Return the ids of the channel's orders with this reference or this cart."""
        ids = set()
        for filters in ({"reference": reference}, {"cart_reference": reference}):
            async with self._turns:
                try:
                    async for page in self._norce.order_pages(channel, limit=MAX_ORDERS, **filters):
                        # Compared here as well: a version without the filter lists all orders.
                        ids |= {str(each.get("id")) for each in page.items if _has_reference(each, reference)}
                        break
                except NorceError as error:
                    self._noted(error)
        return sorted(ids)

    def _noted(self, error: NorceError) -> NorceProblem:
        words = "Norce refuses our token" if isinstance(error, NorceRefused) else "Norce does not answer"
        problem = NorceProblem(words=words, detail=str(error))
        self.problem = self.problem or problem
        return problem


def _has_reference(order: Mapping[str, Any], reference: str) -> bool:
    return reference.casefold() in [each.casefold() for each in references_of(order) if each is not None]


def references_of(order: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the references of an order and of its cart."""
    cart = order.get("cart")
    given = (order.get("reference"), cart.get("reference") if isinstance(cart, dict) else None)
    reference, cart_reference = (each if isinstance(each, str) and each else None for each in given)
    return reference, cart_reference


# --- one order --------------------------------------------------------------------------------------------------------


def facts_of(
    reading: Reading, asked: str, queries: Queries, config: Config, routes: Routes, *, now: int, is_held: bool
) -> Facts:
    """Gather the facts about an order.

    Args:
        reading: The order as Norce has it.
        asked: The id or reference that was asked for.
        queries: Queries on the ledger.
        config: The configuration.
        routes: Its routes.
        now: The ledger's clock.
        is_held: True if the service was started with `serve --hold`.
    """
    channel, order_id, order = reading.channel, reading.order_id, reading.order
    of_channel = {"merchant": channel.merchant, "channel": channel.name}
    of_order = DeliveryFilter(order_id=order_id, merchant=channel.merchant, channel=channel.name)

    def of_this(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out other orders. The ledger takes an unknown id as the beginning of others."""
        return [each for each in rows if each["order_id"] == order_id and each.items() >= of_channel.items()]

    rows = of_this(queries.deliveries(of_order, limit=MAX_DELIVERIES))
    deliveries = [queries.delivery(row["id"]) or row for row in rows]
    notifications = of_this(queries.notifications(order_id=order_id, merchant=channel.merchant, channel=channel.name))
    tree = _kept_order(queries, notifications) if order is None else order
    reference, cart_reference = references_of(tree or {})
    on_order = _callbacks_on(config, routes, reading)
    known = {route for route, of in config.queue_keys if of == channel}
    names = [*(each.name for each in routes.all if each.name in known), *(each["route"] for each in deliveries)]
    queues = {
        each["route"]: each for each in queries.queues(now, config.queue_keys) if each.items() >= of_channel.items()
    }
    lanes = {each["route"]: each for each in queries.lanes(order_id) if each.items() >= of_channel.items()}
    configured = {each.name: each for each in routes.all}
    gathered = [
        _route_facts(
            configured.get(name),
            QueueKey(name, channel),
            is_configured=name in known,
            routes=routes,
            tree=tree,
            on_order=on_order,
            notifications=notifications,
            deliveries=[each for each in deliveries if each["route"] == name],
            lane=lanes.get(name),
            queue=queues.get(name),
            pause=_pause(queries, queues.get(name)),
        )
        for name in dict.fromkeys(names)
    ]
    state = (tree or {}).get("state")
    status = str(state.get("currentStatus")).lower() if isinstance(state, dict) else ""
    return Facts(
        asked=asked,
        now=to_text(now),
        channel=channel,
        order_id=order_id,
        reference=reference or next((each["reference"] for each in notifications), None),
        cart_reference=cart_reference,
        at_norce=AtNorce.FOUND if order else AtNorce.UNREADABLE if reading.problem else AtNorce.MISSING,
        problem=reading.problem,
        status=status if status in STATUSES else None,
        created_at=_moment_of(order, "created"),
        changed_at=_moment_of(order, "lastModified"),
        callbacks=on_order,
        is_channel_configured=channel in config.channels,
        is_switched_off=queries.is_switched_off(**of_channel),
        is_held=is_held,
        is_served=any(each["alive"] for each in queries.processes(now)),
        notifications=notifications,
        under_gone_names=[each for each in notifications if each["callback"] not in routes.callbacks],
        verdicts=of_this(queries.verdicts(order_id=order_id)),
        routes=gathered,
    )


def _moment_of(order: Mapping[str, Any] | None, name: str) -> str | None:
    moment = instant((order or {}).get(name))
    return None if moment is None else to_text(to_milliseconds(moment))


def facts_without_order(asked: str, problem: NorceProblem | None, now: int) -> Facts:
    """Return the facts if neither the ledger nor Norce has an order of this id or reference."""
    at_norce = AtNorce.UNREADABLE if problem else AtNorce.MISSING
    return Facts(asked=asked, now=to_text(now), at_norce=at_norce, problem=problem)


def _route_facts(
    route: Route | None,
    key: QueueKey,
    *,
    is_configured: bool,
    routes: Routes,
    tree: dict[str, Any] | None,
    on_order: Mapping[str, OnOrder],
    notifications: Sequence[Mapping[str, Any]],
    **rows: Any,
) -> RouteFacts:
    if route is None or not is_configured:
        return RouteFacts(route=key.route, is_configured=False, **rows)
    callback, decision, conditions = route.callback, None, []
    if tree is not None:
        explanation = explained(routes, callback, tree, key.channel)
        (of_route,) = (each for each in explanation["routes"] if each["route"] == route.name)
        decision, own = of_route["result"], explanation["condition"]
        conditions = [*([own] if own else ()), *of_route["when"]]
    return RouteFacts(
        route=route.name,
        callback=callback.name,
        is_shadow=route.shadow,
        on_order=on_order.get(callback.name, OnOrder.UNREAD),
        arrivals=[each for each in notifications if each["callback"] == callback.name],
        decision=decision,
        conditions=conditions,
        wanted_statuses=_wanted_statuses(route),
        **rows,
    )


def _kept_order(queries: Queries, notifications: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the newest order that the ledger keeps."""
    for each in notifications:
        body = queries.body(each["id"])
        if body is not None:
            try:
                return order_in(decode(body))
            except NotAnOrder:
                continue
    return None


def _callbacks_on(config: Config, routes: Routes, reading: Reading) -> dict[str, OnOrder]:
    """Return the states of our callbacks on an order, by name; nothing if it was not read."""
    if reading.order is None:
        return {}
    stored = stored_on(reading.order, config.adapter.id)
    states = dict.fromkeys(routes.callbacks, OnOrder.MISSING)
    states |= {callback_name(each.entry): OnOrder.OUTDATED for each in stored}
    try:
        wanted = list(registrations(config, Senders(config.senders), reading.channel, reading.order_id))
    except LookupError:  # no key signs URLs, so no address can be compared
        wanted = []
        states |= {callback_name(each.entry): OnOrder.REGISTERED for each in stored}
    for each in wanted:
        if any(one.kind == each.kind and each.is_met_by(one.entry) for one in stored):
            states[each.callback] = OnOrder.REGISTERED
    return states


def _wanted_statuses(route: Route) -> list[str]:
    wanted = list(STATUSES)
    conditions = [condition for condition in (route.callback.condition, *route.when) if condition is not None]
    for condition in conditions:
        schema = condition.schema
        if condition.condition.scope == STATUS_SCOPE and isinstance(schema, dict):
            enum = schema.get("enum")
            named = [schema["const"]] if "const" in schema else enum if isinstance(enum, list) else wanted
            wanted = [each for each in wanted if each in named]
    return [] if len(wanted) == len(STATUSES) else wanted


def _pause(queries: Queries, queue: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the newest command of a person that paused a queue."""
    if queue is None or queue["paused_by"] != "person":
        return None
    of_queue = {name: queue[name] for name in ("route", "merchant", "channel")}
    for each in queries.actions(MAX_ACTIONS):
        matching = decode(each["matching"].encode())
        if each["command"] == "pause" and matching.items() <= of_queue.items():
            return each
    return None
