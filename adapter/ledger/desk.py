"""
For people: what is owed, what was done, what is dead and why. Reads beside the writer and changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select

from adapter.deliveries import State
from adapter.ledger.schema import attempts, deliveries, lanes, notifications, queues


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """How the ledger stands: what waits and what is dead, by route, and the age in seconds of the oldest waiting."""

    by_route: Mapping[tuple[str, str], int]
    oldest_waiting_seconds: Mapping[str, float]
    paused: Mapping[tuple[str, str, str], str]


class Desk:
    """Lists and shows, on a connection that only reads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def deliveries(
        self,
        *,
        state: str | None = None,
        route: str | None = None,
        order_id: str | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """The newest deliveries first, as plain values."""
        statement = _deliveries().order_by(deliveries.c.id.desc()).limit(limit)
        for column, value in ((deliveries.c.state, state), (queues.c.route, route), (lanes.c.order_id, order_id)):
            if value is not None:
                statement = statement.where(column == value)
        return [_shown(row._mapping) for row in self._connection.execute(statement)]

    def delivery(self, delivery_id: int) -> dict[str, Any] | None:
        """One delivery with its attempts, oldest first; None where there is none."""
        row = self._connection.execute(_deliveries().where(deliveries.c.id == delivery_id)).one_or_none()
        if row is None:
            return None
        tries = self._connection.execute(
            select(attempts).where(attempts.c.delivery_id == delivery_id).order_by(attempts.c.id)
        )
        kept = ("kind", "outcome", "code", "message", "reference")
        return _shown(row._mapping) | {
            "attempts": [
                {
                    "started_at": _moment(attempt.started_at),
                    "ended_at": _moment(attempt.ended_at),
                    **{name: attempt._mapping[name] for name in kept},
                }
                for attempt in tries
            ]
        }

    def overview(self, now: int) -> Overview:
        """Counts and ages; `now` is the ledger's clock in milliseconds."""
        d = deliveries.c
        joined = deliveries.join(lanes, d.lane_id == lanes.c.id).join(queues, lanes.c.queue_id == queues.c.id)
        by_route: dict[tuple[str, str], int] = {}
        oldest: dict[str, float] = {}
        # One state at a time, so that each uses the index that holds just the rows in question.
        for state in (State.WAITING.value, State.DEAD.value):
            rows = self._connection.execute(
                select(queues.c.route, func.count(), func.min(notifications.c.received_at))
                .select_from(joined.join(notifications, d.notification_id == notifications.c.id))
                .where(d.state == state)
                .group_by(queues.c.route)
            )
            for route, count, earliest in rows:
                by_route[route, state] = count
                if state == State.WAITING.value:
                    oldest[route] = max(0.0, (now - earliest) / 1000)
        paused = {
            (row.route, row.merchant, row.channel): row.pause_reason
            for row in self._connection.execute(select(queues).where(queues.c.paused_until > now))
        }
        return Overview(by_route=by_route, oldest_waiting_seconds=oldest, paused=paused)


def _deliveries() -> Any:
    d = deliveries.c
    last = (
        select(attempts.c.delivery_id, func.max(attempts.c.id).label("id")).group_by(attempts.c.delivery_id).subquery()
    )
    return select(
        d.id, d.notification_id, d.state, d.reason, d.attempts, d.first_attempt_at, d.ended_at,
        queues.c.route, queues.c.merchant, queues.c.channel, lanes.c.order_id, lanes.c.next_at,
        lanes.c.current_delivery_id, lanes.c.claim, lanes.c.settled, lanes.c.holder,
        attempts.c.code, attempts.c.message, attempts.c.reference,
    ).select_from(
        deliveries.join(lanes, d.lane_id == lanes.c.id)
        .join(queues, lanes.c.queue_id == queues.c.id)
        .outerjoin(last, last.c.delivery_id == d.id)
        .outerjoin(attempts, attempts.c.id == last.c.id)
    )  # fmt: skip


def _shown(row: Mapping[Any, Any]) -> dict[str, Any]:
    waiting = row["state"] == State.WAITING.value
    is_current = row["current_delivery_id"] == row["id"]
    return {
        "id": row["id"],
        "notification_id": row["notification_id"],
        "order_id": row["order_id"],
        "route": row["route"],
        "merchant": row["merchant"],
        "channel": row["channel"],
        "state": row["state"],
        "reason": row["reason"],
        "tries": row["attempts"],
        "in_doubt": bool(is_current and row["claim"] > row["settled"]),
        "next_at": _moment(row["next_at"]) if waiting and (is_current or row["current_delivery_id"] is None) else None,
        "first_attempt_at": _moment(row["first_attempt_at"]),
        "ended_at": _moment(row["ended_at"]),
        "code": row["code"],
        "message": row["message"],
        "reference": row["reference"],
    }


def _moment(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
