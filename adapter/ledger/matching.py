"""
Which deliveries are meant, and who asks: what lists, replays and discards are asked with.
"""

from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Select, func, select

from adapter.ledger.schema import attempts, deliveries, lanes, notifications, queues


class Matching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is given must hold. `since` and `until` are milliseconds, of the end; `code` is the last attempt's."""

    ids: tuple[int, ...] = ()
    state: str | None = None
    reason: str | None = None
    route: str | None = None
    merchant: str | None = None
    channel: str | None = None
    order_id: str | None = None
    notification_id: int | None = None
    code: str | None = None
    since: int | None = None
    until: int | None = None

    def said(self) -> str:
        """As JSON, with what was given."""
        return msgspec.json.encode(
            {k: v for k, v in msgspec.structs.asdict(self).items() if v not in (None, ())}
        ).decode()

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a statement over the tables of `joined`."""
        d = deliveries.c
        given: list[tuple[Any, Any]] = [
            (d.state, self.state),
            (d.reason, self.reason),
            (queues.c.route, self.route),
            (queues.c.merchant, self.merchant),
            (queues.c.channel, self.channel),
            (lanes.c.order_id, self.order_id),
            (d.notification_id, self.notification_id),
            (attempts.c.code, self.code),
        ]
        conditions = [column == value for column, value in given if value is not None]
        if self.order_id is not None:  # every queue named, so that the index on queue and order is of use
            conditions.append(lanes.c.queue_id.in_(select(queues.c.id)))
        if self.ids:
            conditions.append(d.id.in_(self.ids))
        if self.since is not None:
            conditions.append(d.ended_at >= self.since)
        if self.until is not None:
            conditions.append(d.ended_at < self.until)
        return conditions


class By(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who does something, and why: it is written down."""

    who: str
    why: str

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
