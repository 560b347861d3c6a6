"""Queries for people: what the ledger contains, as plain values.

They read beside the writer and change nothing. Of an order they show its id and its references, and no body.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import Column, ColumnElement, Connection, Select, case, func, literal_column, select, union

from adapter.identifiers import Channel, kept_reference
from adapter.ledger.schema import (
    actions,
    attempts,
    deliveries,
    documents,
    lanes,
    notifications,
    processes,
    queues,
    verdicts,
)
from adapter.ledger.settlement import FOR_EVER, State
from adapter.moments import to_text

MAX_IDS = 10_000
ORPHANED = "orphaned"  # a queue whose route, merchant or channel is no longer configured
SHORTEST_BEGINNING = 6  # characters of an order id
MOST_COUNTED = 10_000
MOST_ORDERS = 100  # that one name stands for
BETWEEN_CLOCKS_MS = 60_000  # ids of notifications are in the order of their receipt, but for nodes with slow commits
_LAST = "\U0010ffff"  # no id holds it
IS_UNWANTED: ColumnElement[bool] = literal_column("NOT notifications.is_wanted")  # as the partial indexes have it

Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions on deliveries, all of which must hold.

    Moments are in milliseconds. `since` and `until` limit the time at which the notification was received.
    """

    ids: Annotated[tuple[Id, ...], Meta(max_length=MAX_IDS)] = ()
    state: Text | None = None
    reason: Text | None = None
    route: Text | None = None
    merchant: Text | None = None
    channel: Text | None = None
    order_id: Text | None = None  # or its beginning
    reference: Text | None = None  # of the order, or the destination's for one of its deliveries
    notification_id: Id | None = None
    code: Text | None = None  # of the last attempt
    since: Moment | None = None
    until: Moment | None = None
    ended_before: Moment | None = None

    def given(self) -> dict[str, Any]:
        """Return the conditions that are set."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value not in (None, ())}

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return them for a statement over the tables of `joined`."""
        d = deliveries.c
        given: list[tuple[Any, Any]] = [
            (d.state, self.state),
            (d.reason, self.reason),
            (queues.c.route, self.route),
            (queues.c.merchant, self.merchant),
            (queues.c.channel, self.channel),
            (d.notification_id, self.notification_id),
            (attempts.c.code, self.code),
        ]
        conditions = [column == value for column, value in given if value is not None]
        # Naming every queue lets the database use the index on queue and order.
        in_queues = select(lanes.c.id).where(lanes.c.queue_id.in_(select(queues.c.id)))
        if self.order_id is not None:
            conditions.append(d.lane_id.in_(in_queues.where(is_order(lanes.c.order_id, self.order_id))))
        if self.reference is not None:
            conditions.append(d.lane_id.in_(in_queues.where(lanes.c.order_id.in_(orders_named(self.reference)))))
        if self.ids:
            conditions.append(d.id.in_(self.ids))
        if self.since is not None:
            conditions.append(notifications.c.received_at >= self.since)
        if self.until is not None:
            conditions.append(notifications.c.received_at < self.until)
        if self.ended_before is not None:
            conditions.append(d.ended_at < self.ended_before)
        return conditions


class Author(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The person who gives a command, and the reason. Both are stored with it."""

    who: Text
    why: Text

    def __post_init__(self) -> None:
        if not self.who.strip() or not self.why.strip():
            raise ValueError("`who` and `why` must not be blank: they are stored with the command")


def is_order(column: Column[str], name: str, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that an order has this id, or an id that begins with it.

    The beginning counts only if no order has the whole id, and only from six characters on. The condition is a range,
    because an index in the order of bytes serves it, and no character in it is a wildcard.

    Args:
        column: The column of the id.
        name: The id or its beginning.
        conditions: What an index on the column needs to find the id in its table, which is called `same` there.
    """
    if len(name) < SHORTEST_BEGINNING:
        return column == name
    same = column.table.alias("same").c[column.name]
    is_whole = select(same).where(same == name, *conditions).exists()
    return (column >= name) & (column < name + _LAST) & ((column == name) | ~is_whole)


def check_one_order(connection: Connection, matching: DeliveryFilter) -> None:
    """Raise `ValueError` if the order of a change is given by the beginning of several ids."""
    if matching.order_id is not None:
        in_queues = lanes.c.queue_id.in_(select(queues.c.id))
        ids = select(lanes.c.order_id).where(in_queues, is_order(lanes.c.order_id, matching.order_id))
        if len(connection.execute(ids.distinct().limit(2)).all()) > 1:
            raise ValueError("the ids of several orders begin like this; give more of the id")


def orders_named(reference: str) -> Any:
    """Select the ids of the orders with this reference.

    It is their own, or the one that a destination gave for one of their deliveries.
    """
    n, d = notifications.alias("named").c, deliveries.alias("exported").c
    kept = kept_reference(reference) or ""  # none is empty
    of_delivery = lanes.alias("exporting").c
    return union(
        select(n.order_id).where(n.reference == kept),
        select(of_delivery.order_id).where(of_delivery.id == d.lane_id, d.reference == kept),
    )


def joined(*columns: Any) -> Select[Any]:
    """Select from deliveries with their notification, lane, queue and last attempt."""
    others = attempts.alias("others")
    last = select(func.max(others.c.id)).where(others.c.delivery_id == deliveries.c.id).scalar_subquery()
    return select(*columns).select_from(
        deliveries.join(notifications, deliveries.c.notification_id == notifications.c.id)
        .join(lanes, deliveries.c.lane_id == lanes.c.id)
        .join(queues, lanes.c.queue_id == queues.c.id)
        .outerjoin(attempts, attempts.c.id == last)
    )


def notification_columns() -> list[Any]:
    """Return the columns of a notification without its body, which is personal data."""
    return [column for column in notifications.c if column.name not in ("body", "identity", "digest")]


MAX_PER_ORDER = 10_000


class Rows(list[dict[str, Any]]):
    """Rows of a list.

    `matching` says how many match in all, if these are not all: `2 802` or `more than 10 000`.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], matching: str | None = None) -> None:
        super().__init__(rows)
        self.matching = matching


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A summary of the ledger for metrics."""

    by_route: Mapping[tuple[str, str], int]  # numbers of waiting and dead deliveries, by route and state
    oldest_waiting_seconds: Mapping[str, float]  # by route
    paused: Mapping[tuple[str, str, str], str]  # reasons, by route, merchant and channel


class Queries:
    """Queries on a connection that only reads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def deliveries(self, matching: DeliveryFilter = DeliveryFilter(), *, limit: int = 100) -> Rows:  # noqa: B008 - frozen
        """Return deliveries, newest first: by their receipt if that is limited."""
        d = deliveries.c
        newest = [d.id.desc()] if matching.since is matching.until is None else [d.notification_id.desc(), d.id.desc()]
        return self._rows(_deliveries().where(*self._conditions(matching)), newest, limit)

    def delivery(self, delivery_id: int) -> dict[str, Any] | None:
        """Return a delivery with its attempts, oldest first, or None."""
        row = self.connection.execute(_deliveries().where(deliveries.c.id == delivery_id)).one_or_none()
        if row is None:
            return None
        names = ("started_at", "ended_at", "kind", "outcome", "code", "message", "reference")
        of_delivery = select(*(attempts.c[name] for name in names)).where(attempts.c.delivery_id == delivery_id)
        rows = self.connection.execute(of_delivery.order_by(attempts.c.id))
        again = select(deliveries.c.id).where(deliveries.c.again_of == delivery_id).order_by(deliveries.c.id)
        resent_as = list(self.connection.execute(again).scalars())
        return _plain(row) | {"resent_as": resent_as, "attempts": [_plain(attempt) for attempt in rows]}

    def count(self, matching: DeliveryFilter) -> list[dict[str, Any]]:
        """Count the deliveries that match, by route, merchant, channel, state and reason."""
        by = (queues.c.route, queues.c.merchant, queues.c.channel, deliveries.c.state, deliveries.c.reason)
        matched = joined(*by, func.count().label("count")).where(*self._conditions(matching))
        return [dict(row._mapping) for row in self.connection.execute(matched.group_by(*by).order_by(*by))]

    def notifications(
        self,
        *,
        order_id: str | None = None,
        reference: str | None = None,
        callback: str | None = None,
        merchant: str | None = None,
        channel: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = 100,
    ) -> Rows:
        """Return notifications, newest first."""
        n = notifications.c
        given = ((n.callback, callback), (n.merchant, merchant), (n.channel, channel))
        statement = select(*notification_columns()).where(
            *(column == value for column, value in given if value is not None)
        )
        statement = statement.where(*self._received(since, until, n.id))
        if since is not None:
            statement = statement.where(n.received_at >= since)
        if until is not None:
            statement = statement.where(n.received_at < until)
        if order_id is not None or reference is not None:
            of_order = DeliveryFilter(order_id=order_id, reference=reference).conditions()
            wanted = joined(deliveries.c.notification_id).where(*of_order)
            unwanted = select(n.id).where(IS_UNWANTED)
            if order_id is not None:
                unwanted = unwanted.where(is_order(n.order_id, order_id, literal_column("NOT same.is_wanted")))
            if reference is not None:
                unwanted = unwanted.where(n.order_id.in_(orders_named(reference)))
            ids = {*self.connection.execute(wanted).scalars(), *self.connection.execute(unwanted).scalars()}
            statement = statement.where(n.id.in_(sorted(ids)[-MAX_PER_ORDER:]))
        return self._rows(statement, [n.id.desc()], limit)

    def notification(self, notification_id: int) -> dict[str, Any] | None:
        """Return a notification with its deliveries and its conflicts, or None."""
        n = notifications.c
        columns = [*notification_columns(), func.length(n.body).label("body_bytes")]
        row = self.connection.execute(select(*columns).where(n.id == notification_id)).one_or_none()
        if row is None:
            return None
        conflicts = self.connection.execute(select(n.id).where(n.conflicts_with == notification_id)).scalars()
        return _plain(row) | {
            "conflicts": list(conflicts),
            "deliveries": self.deliveries(DeliveryFilter(notification_id=notification_id)),
        }

    def body(self, notification_id: int) -> bytes | None:
        """Return the stored body of a notification, which is personal data, or None."""
        return self.connection.execute(
            select(notifications.c.body).where(notifications.c.id == notification_id)
        ).scalar_one_or_none()

    def lanes(self, order_id: str) -> list[dict[str, Any]]:
        """Return the lanes of an order with their queues."""
        lane = lanes.c
        statement = (
            select(
                lane.id, queues.c.route, queues.c.merchant, queues.c.channel, lane.current_delivery_id,
                lane.holder.is_not(None).label("is_held"), (lane.claim > lane.settled).label("in_doubt"),
                lane.next_at,
            )
            .select_from(lanes.join(queues, lane.queue_id == queues.c.id))
            # Naming every queue lets the database use the index on queue and order.
            .where(lane.order_id == order_id, lane.queue_id.in_(select(queues.c.id)))
            .order_by(lane.id)
        )  # fmt: skip
        return [_plain(row) for row in self.connection.execute(statement)]

    def is_switched_off(self, *, merchant: str, channel: str) -> bool:
        """Return whether Norce's configuration switches a channel off."""
        d = documents.c
        stored = select(d.content).where(d.merchant == merchant, d.channel == channel)
        content = self.connection.execute(stored).scalar_one_or_none()
        return content is not None and not json.loads(content).get("active", True)

    def documents(self) -> dict[Channel, dict[str, Any]]:
        """Return the last valid configuration document of each channel."""
        rows = self.connection.execute(select(documents.c.merchant, documents.c.channel, documents.c.content))
        return {Channel(merchant, channel): json.loads(content) for merchant, channel, content in rows}

    def queues(self, now: int, configured: Collection[tuple[str, Channel]]) -> list[dict[str, Any]]:
        """Return every queue with its state and the numbers of its deliveries.

        Args:
            now: The ledger's clock.
            configured: The route and the channel of each configured queue. Any other queue is orphaned.
        """
        waiting, dead = (
            {row.queue_id: row.number for row in self._by_queue(state)} for state in (State.WAITING, State.DEAD)
        )
        held = select(lanes.c.queue_id).where(lanes.c.holder.is_not(None))
        running = Counter(self.connection.execute(held).scalars())
        order = (queues.c.route, queues.c.merchant, queues.c.channel)
        return [
            {
                "id": row.id,
                "route": row.route,
                "merchant": row.merchant,
                "channel": row.channel,
                "state": _queue_state(row, now, configured),
                "paused_by": row.paused_by,
                "reason": row.pause_reason,
                "paused_until": _until(row.paused_until),
                "failures_in_row": len(json.loads(row.failed_lanes or "[]")),
                "waiting": waiting.get(row.id, 0),
                "running": running[row.id],
                "dead": dead.get(row.id, 0),
            }
            for row in self.connection.execute(select(queues).order_by(*order))
        ]

    def verdicts(
        self,
        *,
        kind: str | None = None,
        route: str | None = None,
        merchant: str | None = None,
        channel: str | None = None,
        order_id: str | None = None,
        reference: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = 100,
    ) -> Rows:
        """Return recorded verdicts, newest first.

        These are refusals and patches that were answered, late verdicts, and those of shadow routes.
        """
        v = verdicts.c
        given = ((v.kind, kind), (v.route, route), (v.merchant, merchant), (v.channel, channel))
        statement = select(verdicts).where(*(column == value for column, value in given if value is not None))
        if order_id is not None:
            statement = statement.where(is_order(v.order_id, order_id))
        if reference is not None:
            statement = statement.where(v.order_id.in_(orders_named(reference)))
        if since is not None:
            statement = statement.where(v.at >= since)
        if until is not None:
            statement = statement.where(v.at < until)
        rows = self._rows(statement, [v.at.desc(), v.id.desc()], limit)
        for row in rows:
            row["codes"] = json.loads(row["codes"])
        return rows

    def count_verdicts(self, *, since: int | None = None, until: int | None = None) -> list[dict[str, Any]]:
        """Count the late and shadow verdicts by route.

        `differs` counts those that would have changed the answer.
        """
        v = verdicts.c
        rejects, patches = v.decided.in_(("reject", "refuse")), v.decided == "patch"
        approves = v.decided.in_(("approve", "accept"))
        differs = patches | rejects & (v.answered == "approve") | approves & (v.answered == "reject")
        counted = {"late": v.kind == "late", "shadow": v.kind == "shadow"}
        is_instead = v.answered.in_(("approve", "reject"))
        counted |= {"rejects": rejects, "failed": v.decided == "failed", "differs": differs & is_instead}
        counts = [func.count().filter(condition).label(name) for name, condition in counted.items()]
        unused = select(v.route, *counts).where(v.kind.in_(("late", "shadow")))
        statement = unused.group_by(v.route).order_by(v.route)
        if since is not None:
            statement = statement.where(v.at >= since)
        if until is not None:
            statement = statement.where(v.at < until)
        return [dict(row._mapping) for row in self.connection.execute(statement)]

    def actions(self, limit: int = 100) -> Rows:
        """Return the commands of people, newest first."""
        return self._rows(select(actions), [actions.c.id.desc()], limit)

    def processes(self, now: int) -> list[dict[str, Any]]:
        """Return the processes that have a lease, and whether it still lasts."""
        p = processes.c
        statement = select(p.id, p.version, p.started_at, (p.lease_until > now).label("alive")).order_by(p.id)
        return [_plain(row) for row in self.connection.execute(statement)]

    def overview(self, now: int) -> Overview:
        """Return the summary for metrics. `now` is the ledger's clock."""
        by_route: Counter[tuple[str, str]] = Counter()
        oldest: dict[str, float] = {}
        rows_of = {state: self._by_queue(state) for state in (State.WAITING, State.DEAD)}
        route_of = {row.id: row.route for row in self.connection.execute(select(queues.c.id, queues.c.route))}
        for state, rows in rows_of.items():
            for row in rows:
                route = route_of[row.queue_id]
                by_route[route, state.value] += row.number
                if state is State.WAITING:
                    age = (now - self._received_at(row.earliest)) / 1000
                    oldest[route] = max(0.0, age, oldest.get(route, 0.0))
        paused = {
            (row.route, row.merchant, row.channel): row.pause_reason or ""
            for row in self.connection.execute(select(queues).where(queues.c.paused_until > now))
        }
        return Overview(by_route=by_route, oldest_waiting_seconds=oldest, paused=paused)

    def orders(self, name: str) -> list[dict[str, str]]:
        """Return the orders with this id, beginning of an id, or reference: at most `MOST_ORDERS`.

        Each has `merchant`, `channel` and `order_id`. An order is known by a notification or a recorded verdict.
        """
        n, v, q = notifications.c, verdicts.c, queues.c
        named = orders_named(name)
        of_lane = select(q.merchant, q.channel, lanes.c.order_id).join_from(lanes, queues)
        unwanted = select(n.merchant, n.channel, n.order_id).where(IS_UNWANTED)
        of_verdict = select(v.merchant, v.channel, v.order_id)
        found: set[tuple[str, str, str]] = set()
        for statement in (
            of_lane.where(is_order(lanes.c.order_id, name)),
            of_lane.where(lanes.c.order_id.in_(named)),
            unwanted.where(is_order(n.order_id, name, literal_column("NOT same.is_wanted"))),
            unwanted.where(n.order_id.in_(named)),
            of_verdict.where(is_order(v.order_id, name)),
        ):
            rows = self.connection.execute(statement.distinct().limit(MOST_ORDERS))
            found.update((row.merchant, row.channel, row.order_id) for row in rows)
        return [
            {"merchant": merchant, "channel": channel, "order_id": order_id}
            for merchant, channel, order_id in sorted(found)[:MOST_ORDERS]
        ]

    def _rows(self, statement: Select[Any], newest: Sequence[Any], limit: int) -> Rows:
        """Return the first rows.

        If there are more, they are counted up to `MOST_COUNTED` or ten times the limit.
        """
        statement = statement.order_by(*newest)
        rows = [_plain(row) for row in self.connection.execute(statement.limit(limit))]
        if len(rows) < limit:
            return Rows(rows)
        most = max(MOST_COUNTED, 10 * limit)
        matching: Select[Any] = statement.with_only_columns(literal_column("1"), maintain_column_froms=True)
        counted = select(func.count()).select_from(matching.limit(most + 1).subquery())
        total = self.connection.execute(counted).scalar_one()
        if total == len(rows):
            return Rows(rows)
        words = f"{total:,}" if total <= most else f"more than {most:,}"
        return Rows(rows, words.replace(",", " "))

    def _conditions(self, matching: DeliveryFilter) -> list[ColumnElement[bool]]:
        # On both columns, because no planner concludes one from the other.
        received = self._received(matching.since, matching.until, deliveries.c.notification_id, notifications.c.id)
        return [*matching.conditions(), *received]

    def _received(
        self, since: int | None, until: int | None, *columns: ColumnElement[int]
    ) -> list[ColumnElement[bool]]:
        """Return conditions on ids of notifications that leave out most other times.

        The time of the receipt has no index, because that would cost each accept its part.
        """
        conditions: list[ColumnElement[bool]] = []
        if since is not None:
            first = self._first_received(since - BETWEEN_CLOCKS_MS)
            conditions += [column >= first for column in columns]
        if until is not None:
            first = self._first_received(until + BETWEEN_CLOCKS_MS)
            conditions += [column < first for column in columns]
        return conditions

    def _first_received(self, at: int) -> int:
        """Return the id of the first notification received at this moment or later.

        It is found by halving the range of the ids.
        """
        n = notifications.c
        low = 0
        high = self.connection.execute(select(func.coalesce(func.max(n.id), 0))).scalar_one() + 1
        while low < high:
            middle = (low + high) // 2
            following = select(n.id, n.received_at).where(n.id >= middle).order_by(n.id).limit(1)
            row = self.connection.execute(following).one_or_none()
            if row is None or row.received_at >= at:
                high = middle
            else:
                low = row.id + 1
        return int(low)

    def _by_queue(self, state: State) -> Sequence[Any]:
        # Reads only the partial index of the state.
        d = deliveries.c
        return self.connection.execute(
            select(lanes.c.queue_id, func.count().label("number"), func.min(d.id).label("earliest"))
            .select_from(deliveries.join(lanes, d.lane_id == lanes.c.id))
            .where(d.state == state.value)
            .group_by(lanes.c.queue_id)
        ).all()

    def _received_at(self, delivery_id: int) -> int:
        notification_id = select(deliveries.c.notification_id).where(deliveries.c.id == delivery_id).scalar_subquery()
        received = select(notifications.c.received_at).where(notifications.c.id == notification_id)
        return int(self.connection.execute(received).scalar_one())


def _queue_state(queue: Any, now: int, configured: Collection[tuple[str, Channel]]) -> str:
    if (queue.route, Channel(queue.merchant, queue.channel)) not in configured:
        return ORPHANED
    return "running" if queue.paused_until is None else "paused" if queue.paused_until > now else "probing"


def _text(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else to_text(milliseconds)


def _plain(row: Any) -> dict[str, Any]:
    return {name: _text(value) if name.rpartition("_")[2] == "at" else value for name, value in row._mapping.items()}


def _deliveries() -> Any:
    d, lane = deliveries.c, lanes.c
    is_current = lane.current_delivery_id.is_not_distinct_from(d.id)
    comes_next = (d.state == State.WAITING.value) & (is_current | lane.current_delivery_id.is_(None))
    return joined(
        d.id, d.notification_id, lane.order_id, notifications.c.reference.label("order_reference"),
        queues.c.route, queues.c.merchant, queues.c.channel, d.state, d.reason,
        d.attempts.label("tries"), (is_current & (lane.claim > lane.settled)).label("in_doubt"),
        notifications.c.received_at, case((comes_next, lane.next_at)).label("next_at"), d.first_attempt_at, d.ended_at,
        d.again_of, attempts.c.code, attempts.c.message, d.reference,
    )  # fmt: skip


def _until(milliseconds: int | None) -> str | None:
    return "a person resumes it" if milliseconds == FOR_EVER else _text(milliseconds)
