"""Dead letters: their retry by a person, and the release of lanes that they stop.

A retried letter waits again, with its whole schedule, in its old place. The lane's doubt stays, unless a person has
looked at the destination and found no effect there. The retries of a schedule, before a delivery is dead, are computed
in `settlement`.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, case, literal_column, select, update

from adapter.ledger.databases import any_of
from adapter.ledger.schema import deliveries, lanes
from adapter.ledger.selection import LaneDelivery
from adapter.ledger.settlement import Reason, State

LOCK_LANES = select(lanes).where(any_of(lanes.c.id)).order_by(lanes.c.queue_id, lanes.c.order_id).with_for_update()
# A literal: with a parameter, the planner does not use the index of dead letters.
_is_known_letter = (deliveries.c.state == literal_column("'dead'")) & (deliveries.c.reason != Reason.UNKNOWN.value)
_is_stopped_by_it = lanes.c.holder.is_(None) & (lanes.c.current_delivery_id == deliveries.c.id) & _is_known_letter
STOPPED_LANES = (
    select(lanes.c.id)
    .join_from(deliveries, lanes, deliveries.c.lane_id == lanes.c.id)
    .where(any_of(lanes.c.queue_id), _is_stopped_by_it)
)
# A lane is due even if nothing waits in it: a claim notices that.
PASS_LETTERS = (
    update(lanes)
    .where(any_of(lanes.c.id), select(deliveries.c.id).where(_is_stopped_by_it).exists())
    .values(current_delivery_id=None, next_at=bindparam("now"))
)


def retry_dead_letters(
    connection: Connection,
    letters: Collection[LaneDelivery],
    now: int,
    *,
    reasons: Collection[Reason],
    ends_doubt: bool = False,
) -> int:
    """Make dead letters with one of these reasons wait again, and return their number.

    A lane becomes due if a letter had stopped it or if it was idle; any other lane goes on as
    before. A letter stays dead while its blocked handler still holds the lane.
    """
    d = deliveries.c
    locked = lock_lanes(connection, {letter.lane_id for letter in letters})
    held = {lane.current_delivery_id for lane in locked if lane.holder is not None}
    dead = (
        d.id.in_([letter.delivery_id for letter in letters if letter.delivery_id not in held]),
        d.state == State.DEAD.value,
        d.reason.in_([reason.value for reason in reasons]),
    )
    waiting = {"state": State.WAITING.value, "reason": None, "ended_at": None, "attempts": 0}
    waiting |= {"first_attempt_at": None, "retried_at": now}
    changed = connection.execute(update(deliveries).where(*dead).values(waiting).returning(d.id, d.lane_id)).all()
    lane_ids, stopped_by = {row.lane_id for row in changed}, {None, *(row.id for row in changed)}
    due = [
        lane.id
        for lane in locked
        if lane.id in lane_ids and lane.next_at is None and lane.current_delivery_id in stopped_by
    ]
    if due:
        settled = {"settled": lanes.c.claim, "next_at": now} if ends_doubt else {"next_at": after_doubt(now)}
        connection.execute(update(lanes).where(lanes.c.id.in_(due)).values(settled))
    return len(changed)


def pass_dead_letters(connection: Connection, queue_ids: Collection[int], now: int) -> None:
    """Release the lanes of these queues that a dead letter with a known outcome has stopped.

    Their routes read the order again, so an earlier dead letter must not hold the later deliveries.
    """
    stopped = connection.execute(STOPPED_LANES, {"ids": list(queue_ids)}).scalars().all()
    if stopped:
        lock_lanes(connection, stopped)
        connection.execute(PASS_LETTERS, {"ids": list(stopped), "now": now})


def after_doubt(now: int) -> ColumnElement[int]:
    """Return now, or the moment at which a lane's request in doubt has had its time."""
    lane = lanes.c
    return case(((lane.claim > lane.settled) & (lane.doubt_until > now), lane.doubt_until), else_=now)


def lock_lanes(connection: Connection, lane_ids: Iterable[int]) -> Sequence[Any]:
    """Lock these lanes in the order that the whole ledger uses, and return their rows."""
    return connection.execute(LOCK_LANES, {"ids": list(lane_ids)}).all()
