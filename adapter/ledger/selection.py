"""The selection of deliveries for a command, in steps that read a limited number of rows."""

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, select

from adapter.ledger.queries import joined
from adapter.ledger.schema import deliveries

MAX_READ_PER_STEP = 2_000  # deliveries, however few of them match
MAX_IDS_PER_STEP = 20_000  # that a step passes over


class LaneDelivery(NamedTuple):
    """A delivery and its lane."""

    delivery_id: int
    lane_id: int


def next_deliveries(
    connection: Connection,
    chosen: Iterable[ColumnElement[bool]],
    matching: Iterable[ColumnElement[bool]],
    *,
    after: int,
    most: int,
    in_ranges: bool,
) -> tuple[list[LaneDelivery], int | None]:
    """Return the next deliveries that match, by id, and where the next step begins.

    Args:
        connection: The ledger.
        chosen: Conditions on the table of deliveries alone.
        matching: Further conditions, on the tables of `joined`.
        after: The delivery after which this step begins.
        most: The largest number of deliveries.
        in_ranges: Look through one range of ids, because no index has the chosen deliveries in the order of their ids.
    """
    d, end = deliveries.c, None
    ids = select(d.id).where(d.id > after, *chosen).order_by(d.id).limit(MAX_READ_PER_STEP)
    if in_ranges:
        end = after + MAX_IDS_PER_STEP
        ids = ids.where(d.id <= end)
        end = end if connection.execute(select(d.id).where(d.id > end).limit(1)).first() else None
    read = connection.execute(ids).scalars().all()
    found = joined(d.id, d.lane_id).where(d.id.in_(read), *matching).order_by(d.id).limit(most)
    selected = [LaneDelivery(*row) for row in connection.execute(found)] if read else []
    if len(selected) == most:
        return selected, selected[-1].delivery_id
    return selected, read[-1] if len(read) == MAX_READ_PER_STEP else end
