"""Resends: deliveries that a person has delivered again.

A resend is a new delivery of the same notification in the same lane, with its own history, schedule and idempotency
key. `again_of` names the delivery that it repeats, and `command` the action of the person. Each pair exists once, so a
command that was interrupted can be resumed.

Ids select any delivery that does not wait. A filter selects one delivery for each lane: the newest that is delivered
or dead, if it matches. So an order whose newest delivery is not meant stays as it is.
"""

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select, tuple_, update

from adapter.ledger.dead_letters import lock_lanes
from adapter.ledger.queries import DeliveryFilter, joined
from adapter.ledger.schema import deliveries, lanes, notifications, queues
from adapter.ledger.selection import MAX_READ_PER_STEP, LaneDelivery, next_deliveries
from adapter.ledger.settlement import Reason, State

DEAD_REASONS = (Reason.REJECTED, Reason.EXHAUSTED, Reason.UNKNOWN, Reason.CONDITION, Reason.BROKEN)

LeftOut = Literal["waiting", "attempted", "unknown", "without-body"]

# Why a delivery is left out, for people.
LEFT_OUT: Mapping[LeftOut, str] = {
    "waiting": "because they wait already",
    "attempted": "because their handler still runs",
    "unknown": "because their effect is unknown; look at the destination, and see --unknown",
    "without-body": "because their route does not read the order again and their body is no longer stored",
}


class Selected(NamedTuple):
    """A delivery that a person selected."""

    id: int
    lane_id: int
    notification_id: int
    position: int
    state: str
    reason: str | None
    route: str
    merchant: str
    channel: str
    has_body: bool


class ResendFilter(NamedTuple):
    """The conditions of a resend, and what may be done with the deliveries that match."""

    matching: DeliveryFilter
    sends_unknown: bool  # a person has looked for the effect of unknown dead letters, and found none
    refetching: Collection[str]  # the routes that read the order again
    command: int | None = None  # the action, once it is stored
    ended_until: int | None = None  # when the command was given: what ends later is none of its business
    further: Sequence[ColumnElement[bool]] = ()  # conditions

    @classmethod
    def of(cls, matching: DeliveryFilter, unknown: str, refetching: Collection[str], **more: Any) -> "ResendFilter":
        """Check the conditions of a person.

        Raises:
            ValueError: They do not fit a resend.
        """
        if matching.state is not None:
            raise ValueError("a resend takes no `state`: filters select what is delivered or dead, ids select any")
        if unknown == "look-up":
            raise ValueError("a resend looks nothing up: retry with `--unknown look-up` first, and resend what is done")
        reasons = [reason.value for reason in (Reason.DELIVERED, *DEAD_REASONS)]
        if matching.reason is not None and matching.reason not in reasons and not matching.ids:
            raise ValueError(
                f"filters select what is delivered or dead ({', '.join(reasons)}); give ids for the others"
            )
        return cls(matching, unknown == "send", refetching, **more)

    def reason_to_leave_out(self, selected: Selected, attempted: Container[int] = ()) -> LeftOut | None:
        """Return the cause for leaving out a delivery, or None.

        `attempted` holds the deliveries whose handler runs.
        """
        if selected.state == State.WAITING.value:
            return "waiting"
        if selected.id in attempted:
            return "attempted"
        if selected.reason == Reason.UNKNOWN.value and not self.sends_unknown:
            return "unknown"
        if not selected.has_body and selected.route not in self.refetching:
            return "without-body"
        return None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return them for a statement over the tables of `joined`."""
        d = deliveries.c
        conditions = [*self.matching.conditions(), *self.further]
        other = deliveries.alias("other")
        made = other.c.command == self.command
        if self.matching.ids:
            if self.command is not None:
                conditions.append(~select(other.c.id).where(other.c.again_of == d.id, made).exists())
            return conditions
        is_refetching = queues.c.route.in_(self.refetching)
        is_newer = or_(
            and_(is_refetching, other.c.id > d.id),
            and_(~is_refetching, tuple_(other.c.position, other.c.id) > tuple_(d.position, d.id)),
        )
        of_lane = other.c.lane_id == d.lane_id
        newer = select(other.c.id).where(of_lane, is_newer, *self._can_be_sent_again(other.c))
        conditions += [*self._can_be_sent_again(d), ~newer.exists()]
        if self.command is not None:
            conditions.append(~select(other.c.id).where(of_lane, made).exists())
        return conditions

    def _can_be_sent_again(self, d: Any) -> list[ColumnElement[bool]]:
        conditions = [or_(d.state == State.DEAD.value, d.reason == Reason.DELIVERED.value)]
        if self.ended_until is not None:
            conditions.append(d.ended_at <= self.ended_until)
        return conditions

    def find(self, connection: Connection, *, after: int, most: int) -> tuple[list[LaneDelivery], int | None]:
        """Return the next deliveries that match, in the order of their ids, and where to continue."""
        d, ids, order_id = deliveries.c, self.matching.ids, self.matching.order_id
        chosen = [d.id.in_(ids)] if ids else self._can_be_sent_again(d)
        if not ids and order_id is not None:
            chosen += DeliveryFilter(order_id=order_id).conditions()
        in_ranges = not ids and order_id is None
        return next_deliveries(connection, chosen, self.conditions(), after=after, most=most, in_ranges=in_ranges)

    def read(self, connection: Connection, ids: Collection[int]) -> list[Selected]:
        """Return those of these deliveries that still match."""
        d, q, has_body = deliveries.c, queues.c, notifications.c.body.is_not(None)
        columns = (d.id, d.lane_id, d.notification_id, d.position, d.state, d.reason, q.route, q.merchant, q.channel)
        statement = joined(*columns, has_body.label("has_body")).where(d.id.in_(ids), *self.conditions())
        return [Selected(*row) for row in connection.execute(statement.order_by(d.id))]


def preview(connection: Connection, selection: ResendFilter) -> tuple[list[dict[str, Any]], dict[LeftOut, list[int]]]:
    """Count the deliveries that a resend would send again, by queue, state and reason.

    Returns:
        The counts, and the ids that it would leave out, by the cause.
    """
    counts: Counter[tuple[str | None, ...]] = Counter()
    left_out: dict[LeftOut, list[int]] = {}
    after: int | None = 0
    while after is not None:
        found, after = selection.find(connection, after=after, most=MAX_READ_PER_STEP)
        for each in selection.read(connection, [delivery.delivery_id for delivery in found]):
            if (why := selection.reason_to_leave_out(each)) is None:
                counts[each.route, each.merchant, each.channel, each.state, each.reason] += 1
            else:
                left_out.setdefault(why, []).append(each.id)
    names = ("route", "merchant", "channel", "state", "reason")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in sorted(counts.items())], left_out


def add_resends(
    connection: Connection, selection: ResendFilter, found: Sequence[LaneDelivery], now: int
) -> tuple[list[LaneDelivery], dict[LeftOut, list[int]]]:
    """Add a delivery for each of these, and make its lane due if it is idle.

    Returns:
        The deliveries that are sent again, and those that are left out, by the cause. A dead letter among the former
        still stands: the caller ends it.
    """
    locked = lock_lanes(connection, {each.lane_id for each in found})
    attempted = {lane.current_delivery_id for lane in locked if lane.holder is not None}
    left_out: dict[LeftOut, list[int]] = {}
    rows: list[dict[str, Any]] = []
    # Read again behind the locks: other processes may have changed them, or resumed the same command.
    for each in selection.read(connection, [delivery.delivery_id for delivery in found]):
        if (why := selection.reason_to_leave_out(each, attempted)) is not None:
            left_out.setdefault(why, []).append(each.id)
            continue
        place = {"position": 0 if each.route in selection.refetching else each.position, "lane_id": each.lane_id}
        made = {"again_of": each.id, "command": selection.command, "state": State.WAITING.value}
        rows.append({"notification_id": each.notification_id, **place, **made})
    if rows:
        connection.execute(insert(deliveries), rows)
        is_idle = lanes.c.current_delivery_id.is_(None) & lanes.c.next_at.is_(None)
        of_rows = lanes.c.id.in_({row["lane_id"] for row in rows})
        connection.execute(update(lanes).where(of_rows, is_idle).values(next_at=now))
    return [LaneDelivery(row["again_of"], row["lane_id"]) for row in rows], left_out
