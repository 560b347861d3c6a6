"""Queries for people: what the ledger contains, as plain values.

They read beside the writer and change nothing. They show no body, and nothing of an order but its id.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import ColumnElement, Connection, Select, case, func, select

from adapter.identifiers import Channel
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

Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions on deliveries, all of which must hold.

    `since` and `until` limit the time of the end, in milliseconds.
    """

    ids: Annotated[tuple[Id, ...], Meta(max_length=MAX_IDS)] = ()
    state: Text | None = None
    reason: Text | None = None
    route: Text | None = None
    merchant: Text | None = None
    channel: Text | None = None
    order_id: Text | None = None
    notification_id: Id | None = None
    code: Text | None = None  # of the last attempt
    since: Moment | None = None
    until: Moment | None = None

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
        if self.order_id is not None:
            # Naming every queue lets the database use the index on queue and order.
            of_order = (lanes.c.order_id == self.order_id) & lanes.c.queue_id.in_(select(queues.c.id))
            conditions.append(d.lane_id.in_(select(lanes.c.id).where(of_order)))
        if self.ids:
            conditions.append(d.id.in_(self.ids))
        if self.since is not None:
            conditions.append(d.ended_at >= self.since)
        if self.until is not None:
            conditions.append(d.ended_at < self.until)
        return conditions


class Author(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The person who gives a command, and the reason. Both are stored with it."""

    who: Text
    why: Text

    def __post_init__(self) -> None:
        if not self.who.strip() or not self.why.strip():
            raise ValueError("`who` and `why` must not be blank: they are stored with the command")


def joined(*columns: Any) -> Select[Any]:
    """Select from deliveries with their lane, queue and last attempt."""
    others = attempts.alias("others")
    last = select(func.max(others.c.id)).where(others.c.delivery_id == deliveries.c.id).scalar_subquery()
    return select(*columns).select_from(
        deliveries.join(lanes, deliveries.c.lane_id == lanes.c.id)
        .join(queues, lanes.c.queue_id == queues.c.id)
        .outerjoin(attempts, attempts.c.id == last)
    )


def notification_columns() -> list[Any]:
    """Return the columns of a notification without its body, which is personal data."""
    return [column for column in notifications.c if column.name not in ("body", "identity", "digest")]


RECENT_NOTIFICATIONS = 50_000  # notifications without a delivery are found by their order only among these
MAX_PER_ORDER = 10_000


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

    def deliveries(self, matching: DeliveryFilter = DeliveryFilter(), *, limit: int = 100) -> list[dict[str, Any]]:  # noqa: B008 - frozen
        """Return deliveries, newest first."""
        statement = _deliveries().where(*matching.conditions()).order_by(deliveries.c.id.desc()).limit(limit)
        return [_plain(row) for row in self.connection.execute(statement)]

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
        statement = joined(*by, func.count().label("count")).where(*matching.conditions()).group_by(*by).order_by(*by)
        return [dict(row._mapping) for row in self.connection.execute(statement)]

    def notifications(
        self,
        *,
        order_id: str | None = None,
        callback: str | None = None,
        merchant: str | None = None,
        channel: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """Return notifications, newest first.

        With an order id, these are all notifications of the order that have a delivery; those without one are found
        only among the most recent of all.
        """
        n = notifications.c
        statement = select(*notification_columns()).order_by(n.id.desc()).limit(limit)
        for column, value in ((n.callback, callback), (n.merchant, merchant), (n.channel, channel)):
            if value is not None:
                statement = statement.where(column == value)
        if order_id is not None:
            delivered = joined(deliveries.c.notification_id).where(*DeliveryFilter(order_id=order_id).conditions())
            newest = select(func.coalesce(func.max(n.id), 0)).scalar_subquery()
            recent = select(n.id).where(n.id > newest - RECENT_NOTIFICATIONS, n.order_id == order_id)
            ids = {*self.connection.execute(delivered).scalars(), *self.connection.execute(recent).scalars()}
            statement = statement.where(n.id.in_(sorted(ids)[-MAX_PER_ORDER:]))
        return [_plain(row) for row in self.connection.execute(statement)]

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

    def queues(self, now: int, configured: Collection[tuple[str, Channel]]) -> list[dict[str, Any]]:
        """Return every queue with its state and its numbers of waiting and running deliveries.

        Args:
            now: The ledger's clock.
            configured: The route and the channel of each configured queue. Any other queue is orphaned.
        """
        waiting = {row.queue_id: row.number for row in self._by_queue(State.WAITING)}
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
            }
            for row in self.connection.execute(select(queues).order_by(*order))
        ]

    def verdicts(
        self,
        *,
        kind: str | None = None,
        route: str | None = None,
        order_id: str | None = None,
        since: int | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """Return the verdicts that did not count, newest first."""
        v = verdicts.c
        given = ((v.kind, kind), (v.route, route), (v.order_id, order_id))
        statement = select(verdicts).where(*(column == value for column, value in given if value is not None))
        if since is not None:
            statement = statement.where(v.at >= since)
        rows = self.connection.execute(statement.order_by(v.at.desc(), v.id.desc()).limit(limit))
        return [_plain(row) | {"codes": json.loads(row.codes)} for row in rows]

    def count_verdicts(self, *, since: int | None = None) -> list[dict[str, Any]]:
        """Count the verdicts that did not count, by route.

        `differs` counts those that would have changed the answer.
        """
        v = verdicts.c
        rejects, patches = v.decided.in_(("reject", "refuse")), v.decided == "patch"
        approves = v.decided.in_(("approve", "accept"))
        differs = patches | rejects & (v.answered == "approve") | approves & (v.answered == "reject")
        counted = {"late": v.kind == "late", "shadow": v.kind == "shadow"}
        counted |= {"rejects": rejects, "failed": v.decided == "failed", "differs": differs & v.answered.is_not(None)}
        counts = [func.count().filter(condition).label(name) for name, condition in counted.items()]
        statement = select(v.route, *counts).group_by(v.route).order_by(v.route)
        if since is not None:
            statement = statement.where(v.at >= since)
        return [dict(row._mapping) for row in self.connection.execute(statement)]

    def actions(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the commands of people, newest first."""
        newest = select(actions).order_by(actions.c.id.desc()).limit(limit)
        return [_plain(row) for row in self.connection.execute(newest)]

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
        d.id, d.notification_id, lane.order_id, queues.c.route, queues.c.merchant, queues.c.channel, d.state, d.reason,
        d.attempts.label("tries"), (is_current & (lane.claim > lane.settled)).label("in_doubt"),
        case((comes_next, lane.next_at)).label("next_at"), d.first_attempt_at, d.ended_at, d.again_of,
        attempts.c.code, attempts.c.message, attempts.c.reference,
    )  # fmt: skip


def _until(milliseconds: int | None) -> str | None:
    return "a person resumes it" if milliseconds == FOR_EVER else _text(milliseconds)
