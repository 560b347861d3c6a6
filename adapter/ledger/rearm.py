"""
A dead letter is owed again: with its whole schedule, in its own place in the lane.

What is known about the lane's doubt stays as it is, unless a person has looked and says that nothing happened.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from adapter.deliveries import State
from adapter.ledger.schema import deliveries, lanes

LOCKED = (
    select(lanes)
    .where(lanes.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(lanes.c.queue_id, lanes.c.order_id)
    .with_for_update()
)


def rearm(
    connection: Connection, letters: Sequence[tuple[int, int]], now: int, *, nothing_happened: bool = False
) -> int:
    """Makes dead deliveries (each with its lane) wait again; how many were dead. Idempotent."""
    lane = {row.id: row for row in locked_lanes(connection, {lane_id for _, lane_id in letters})}
    d = deliveries.c
    changed = 0
    for delivery_id, lane_id in letters:
        if lane[lane_id].holder is not None and lane[lane_id].current_delivery_id == delivery_id:
            continue  # its handler has not let go of its thread
        again = {"state": State.WAITING.value, "reason": None, "ended_at": None, "attempts": 0}
        again |= {"first_attempt_at": None, "replayed_at": now}
        dead = (d.id == delivery_id) & (d.state == State.DEAD.value)
        if connection.execute(update(deliveries).where(dead).values(again)).rowcount != 1:
            continue
        changed += 1
        row = lane[lane_id]
        if row.holder is None and row.next_at is None and row.current_delivery_id in (None, delivery_id):
            settled = row.claim if nothing_happened else row.settled
            connection.execute(update(lanes).where(lanes.c.id == lane_id).values(next_at=now, settled=settled))
    return changed


def locked_lanes(connection: Connection, lane_ids: Iterable[int]) -> Sequence[Any]:
    """The rows of these lanes, locked in the one order in which lanes are locked everywhere."""
    return connection.execute(LOCKED, {"ids": list(lane_ids)}).all()
