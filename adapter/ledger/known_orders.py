"""The orders of Norce that the ledger knows."""

from collections.abc import Collection

import msgspec
from sqlalchemy import select

from adapter.identifiers import Channel
from adapter.ledger.queries import IS_UNWANTED
from adapter.ledger.schema import deliveries, lanes, notifications, queues
from adapter.ledger.store import Store, StoreUnavailable


class KnownOrders(msgspec.Struct, frozen=True, kw_only=True):
    """Orders of a channel that the ledger knows, as pairs of an order and a name."""

    callbacks: set[tuple[str, str]]  # of a notification
    routes: set[tuple[str, str]]  # of a delivery


def known_orders(store: Store, channel: Channel, order_ids: Collection[str]) -> KnownOrders:
    """Return what the ledger has of these orders. It reads beside the writer, in any thread.

    Notifications that a route wanted are found through the lanes of their order, the others through an index.

    Raises:
        StoreUnavailable: The ledger cannot be read.
    """
    n, of_channel = notifications.c, (queues.c.merchant == channel.merchant) & (queues.c.channel == channel.name)
    try:
        with store.read_connection() as connection:
            routes = {
                row.id: row.route for row in connection.execute(select(queues.c.id, queues.c.route).where(of_channel))
            }
            delivered = connection.execute(
                select(lanes.c.order_id, lanes.c.queue_id, n.callback)
                .join_from(lanes, deliveries, deliveries.c.lane_id == lanes.c.id)
                .join(notifications, n.id == deliveries.c.notification_id)
                .where(lanes.c.queue_id.in_(routes), lanes.c.order_id.in_(order_ids))
                .distinct()
            ).all()
            unwanted = connection.execute(
                select(n.order_id, n.callback)
                .where(
                    IS_UNWANTED, n.order_id.in_(order_ids), n.merchant == channel.merchant, n.channel == channel.name
                )
                .distinct()
            ).all()
    except store.database.errors as error:
        raise StoreUnavailable("the ledger cannot be read") from error
    return KnownOrders(
        callbacks={(row.order_id, row.callback) for row in (*delivered, *unwanted)},
        routes={(row.order_id, routes[row.queue_id]) for row in delivered},
    )
