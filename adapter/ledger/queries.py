"""
For people: what came in, what is owed, what was done, what is dead and why, what is paused, who did what. Reads beside
the writer and changes nothing. No body and nothing of an order but its id is shown.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import ColumnElement, Connection, Select, case, func, select

from adapter.ledger.schema import actions, attempts, deliveries, lanes, notifications, processes, queues, verdicts
from adapter.ledger.settlement import State
from adapter.moments import to_text

MOST_IDS = 10_000

Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is given must hold. `since` and `until` are milliseconds, of the end; `code` is the last attempt's."""

    ids: Annotated[tuple[Id, ...], Meta(max_length=MOST_IDS)] = ()
    state: Text | None = None
    reason: Text | None = None
    route: Text | None = None
    merchant: Text | None = None
    channel: Text | None = None
    order_id: Text | None = None
    notification_id: Id | None = None
    code: Text | None = None
    since: Moment | None = None
    until: Moment | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value not in (None, ())}

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a statement over the tables of `joined`."""
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
            # Every queue named, so that the index on queue and order finds the few lanes that there are.
            of_it = (lanes.c.order_id == self.order_id) & lanes.c.queue_id.in_(select(queues.c.id))
            conditions.append(d.lane_id.in_(select(lanes.c.id).where(of_it)))
        if self.ids:
            conditions.append(d.id.in_(self.ids))
        if self.since is not None:
            conditions.append(d.ended_at >= self.since)
        if self.until is not None:
            conditions.append(d.ended_at < self.until)
        return conditions


class Author(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who does something, and why: it is written down."""

    who: Text
    why: Text

    def __post_init__(self) -> None:
        if not self.who.strip() or not self.why.strip():
            raise ValueError("who and why must be given: they are written down")


def joined(*columns: Any) -> Select[Any]:
    """Deliveries with their lane, queue and last attempt."""
    tries = attempts.alias("tries")
    last = select(func.max(tries.c.id)).where(tries.c.delivery_id == deliveries.c.id).scalar_subquery()
    return select(*columns).select_from(
        deliveries.join(lanes, deliveries.c.lane_id == lanes.c.id)
        .join(queues, lanes.c.queue_id == queues.c.id)
        .outerjoin(attempts, attempts.c.id == last)
    )


def notification_columns() -> list[Any]:
    """All of a notification but its body, which is other people's data."""
    return [column for column in notifications.c if column.name not in ("body", "identity", "digest")]


NEWEST_LOOKED_THROUGH = 50_000  # notifications that nobody wanted can be found by their order only this far back
MOST_OF_AN_ORDER = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """How the ledger stands: what waits and what is dead, by route, and the age in seconds of the oldest waiting."""

    by_route: Mapping[tuple[str, str], int]
    oldest_waiting_seconds: Mapping[str, float]
    paused: Mapping[tuple[str, str, str], str]


class Queries:
    """Lists and shows, on a connection that only reads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def deliveries(self, matching: DeliveryFilter = DeliveryFilter(), *, limit: int = 100) -> list[dict[str, Any]]:  # noqa: B008 - frozen
        """The newest deliveries first, as plain values."""
        statement = _deliveries().where(*matching.conditions()).order_by(deliveries.c.id.desc()).limit(limit)
        return [_plain(row) for row in self.connection.execute(statement)]

    def delivery(self, delivery_id: int) -> dict[str, Any] | None:
        """One delivery with its attempts, oldest first; None where there is none."""
        row = self.connection.execute(_deliveries().where(deliveries.c.id == delivery_id)).one_or_none()
        if row is None:
            return None
        names = ("started_at", "ended_at", "kind", "outcome", "code", "message", "reference")
        its = select(*(attempts.c[name] for name in names)).where(attempts.c.delivery_id == delivery_id)
        tries = self.connection.execute(its.order_by(attempts.c.id))
        return _plain(row) | {"attempts": [_plain(attempt) for attempt in tries]}

    def count(self, matching: DeliveryFilter) -> list[dict[str, Any]]:
        """How many deliveries match, by route, merchant, channel, state and reason."""
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
        """
        The newest notifications first. By order: those that a route wanted, however old; of the others, which have no
        lane, only the newest.
        """
        n = notifications.c
        statement = select(*notification_columns()).order_by(n.id.desc()).limit(limit)
        for column, value in ((n.callback, callback), (n.merchant, merchant), (n.channel, channel)):
            if value is not None:
                statement = statement.where(column == value)
        if order_id is not None:
            owed = joined(deliveries.c.notification_id).where(*DeliveryFilter(order_id=order_id).conditions())
            newest = select(func.coalesce(func.max(n.id), 0)).scalar_subquery()
            recent = select(n.id).where(n.id > newest - NEWEST_LOOKED_THROUGH, n.order_id == order_id)
            ids = {*self.connection.execute(owed).scalars(), *self.connection.execute(recent).scalars()}
            statement = statement.where(n.id.in_(sorted(ids)[-MOST_OF_AN_ORDER:]))
        return [_plain(row) for row in self.connection.execute(statement)]

    def notification(self, notification_id: int) -> dict[str, Any] | None:
        """One notification with its deliveries and the conflicts it met; None where there is none."""
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

    def queues(self, now: int) -> list[dict[str, Any]]:
        """Every queue: whether it runs, what waits in it, what is being tried. `now` is the ledger's clock."""
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
                "state": "running" if row.paused_until is None else "paused" if row.paused_until > now else "probing",
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
        """What routes decided that counted for nothing, the newest first."""
        v = verdicts.c
        given = ((v.kind, kind), (v.route, route), (v.order_id, order_id))
        statement = select(verdicts).where(*(column == value for column, value in given if value is not None))
        if since is not None:
            statement = statement.where(v.at >= since)
        rows = self.connection.execute(statement.order_by(v.at.desc(), v.id.desc()).limit(limit))
        return [_plain(row) | {"codes": json.loads(row.codes)} for row in rows]

    def count_verdicts(self, *, since: int | None = None) -> list[dict[str, Any]]:
        """
        The same, counted by route: how many would have rejected, or have failed, and how many would have made another
        answer than went out.
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
        """What people did, the newest first."""
        newest = select(actions).order_by(actions.c.id.desc()).limit(limit)
        return [_plain(row) for row in self.connection.execute(newest)]

    def processes(self, now: int) -> list[dict[str, Any]]:
        """The processes that live on a lease."""
        p = processes.c
        statement = select(p.id, p.version, p.started_at, (p.lease_until > now).label("alive")).order_by(p.id)
        return [_plain(row) for row in self.connection.execute(statement)]

    def overview(self, now: int) -> Overview:
        """Counts and ages; `now` is the ledger's clock in milliseconds."""
        by_route: Counter[tuple[str, str]] = Counter()
        oldest: dict[str, float] = {}
        stand = {state: self._by_queue(state) for state in (State.WAITING, State.DEAD)}
        route_of = {row.id: row.route for row in self.connection.execute(select(queues.c.id, queues.c.route))}
        for state, rows in stand.items():
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
        """How many deliveries are in this state, and the earliest. From the index that holds just those, row by row."""
        d = deliveries.c
        return self.connection.execute(
            select(lanes.c.queue_id, func.count().label("number"), func.min(d.id).label("earliest"))
            .select_from(deliveries.join(lanes, d.lane_id == lanes.c.id))
            .where(d.state == state.value)
            .group_by(lanes.c.queue_id)
        ).all()

    def _received_at(self, delivery_id: int) -> int:
        its = select(deliveries.c.notification_id).where(deliveries.c.id == delivery_id).scalar_subquery()
        received = select(notifications.c.received_at).where(notifications.c.id == its)
        return int(self.connection.execute(received).scalar_one())


def _text(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else to_text(milliseconds)


def _plain(row: Any) -> dict[str, Any]:
    """A row by its columns, with moments as people read them."""
    return {name: _text(value) if name.rpartition("_")[2] == "at" else value for name, value in row._mapping.items()}


def _deliveries() -> Any:
    d, lane = deliveries.c, lanes.c
    is_current = lane.current_delivery_id.is_not_distinct_from(d.id)
    comes_next = (d.state == State.WAITING.value) & (is_current | lane.current_delivery_id.is_(None))
    return joined(
        d.id, d.notification_id, lane.order_id, queues.c.route, queues.c.merchant, queues.c.channel, d.state, d.reason,
        d.attempts.label("tries"), (is_current & (lane.claim > lane.settled)).label("in_doubt"),
        case((comes_next, lane.next_at)).label("next_at"), d.first_attempt_at, d.ended_at,
        attempts.c.code, attempts.c.message, attempts.c.reference,
    )  # fmt: skip


def _until(milliseconds: int | None) -> str | None:
    far = milliseconds is not None and milliseconds >= 253_000_000_000_000
    return "a person resumes it" if far else _text(milliseconds)
