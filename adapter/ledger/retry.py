"""
A dead letter is owed again: with its whole schedule, in its own place in the lane.

What is known about the lane's doubt stays as it is, unless a person has looked and says that nothing happened.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from adapter.ledger.databases import among
from adapter.ledger.schema import deliveries, lanes
from adapter.ledger.settlement import Reason, State

LOCKED = select(lanes).where(among(lanes.c.id)).order_by(lanes.c.queue_id, lanes.c.order_id).with_for_update()


def retry_dead_letters(
    connection: Connection,
    letters: Collection[tuple[int, int]],
    now: int,
    *,
    reasons: Collection[Reason],
    nothing_happened: bool = False,
) -> int:
    """
    Makes those of these deliveries (each with its lane) wait again that are dead for such a reason; how many they were.

    A lane that a letter had stopped, or that was idle, becomes due; another goes on as it would have. A letter whose
    handler has not let go of its thread, and of the lane, stays dead.
    """
    d = deliveries.c
    locked = locked_lanes(connection, {lane_id for _, lane_id in letters})
    at_it = {lane.current_delivery_id for lane in locked if lane.holder is not None}
    dead = (
        d.id.in_([delivery_id for delivery_id, _ in letters if delivery_id not in at_it]),
        d.state == State.DEAD.value,
        d.reason.in_([reason.value for reason in reasons]),
    )
    again = {"state": State.WAITING.value, "reason": None, "ended_at": None, "attempts": 0}
    again |= {"first_attempt_at": None, "retried_at": now}
    changed = connection.execute(update(deliveries).where(*dead).values(again).returning(d.id, d.lane_id)).all()
    of_lanes, first = {row.lane_id for row in changed}, {None, *(row.id for row in changed)}
    due = [
        lane.id for lane in locked if lane.id in of_lanes and lane.next_at is None and lane.current_delivery_id in first
    ]
    if due:
        ends_doubt = {"settled": lanes.c.claim} if nothing_happened else {}
        connection.execute(update(lanes).where(lanes.c.id.in_(due)).values({"next_at": now, **ends_doubt}))
    return len(changed)


def locked_lanes(connection: Connection, lane_ids: Iterable[int]) -> Sequence[Any]:
    """The rows of these lanes, locked in the one order in which lanes are locked everywhere."""
    return connection.execute(LOCKED, {"ids": list(lane_ids)}).all()
