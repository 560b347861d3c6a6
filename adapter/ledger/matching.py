"""
Which deliveries are meant, and who asks: what lists, replays and discards are asked with.

They come over the network too: what a database could not take (a number beyond 64 bits, a NUL in a text) is refused
when it is read, and not found out by a failing statement.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy import ColumnElement, Select, func, select

from adapter.ledger.schema import attempts, deliveries, lanes, notifications, queues

MOST_IDS = 10_000

Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Moment = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]


class Matching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class By(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
