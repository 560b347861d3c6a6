"""
The tables. Whole-number keys in order of insertion: keys that jump about cost twice the writer's time in a large table.

A *lane* is one order on one route, and the row that is claimed; its deliveries are the list beneath. Doubt is not a
column: a lane is in doubt where `claim > settled`. Moments are whole milliseconds since 1970 (UTC) on the ledger's one
clock. Laid out for SQLite and PostgreSQL alike.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite makes a column the row id only where its type is INTEGER; everywhere else a key has 64 bits.
Key = BigInteger().with_variant(Integer(), "sqlite")


def _partial(name: str, *columns: str, where: str) -> Index:
    """An index of the rows in question alone, which costs the others nothing."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


processes = Table(
    "processes",
    metadata,
    Column("id", Key, primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False, doc="its lanes are free when this has passed"),
    Column("version", Text, nullable=False),
)

queues = Table(
    "queues",
    metadata,
    Column("id", Key, primary_key=True),
    Column("route", Text, nullable=False),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("paused_until", BigInteger, doc="null: running; in the past: one lane is tried, until one succeeds"),
    Column("pause_reason", Text, doc="the code that paused it, or a person's words"),
    Column("paused_by", Text, doc="failures, retry_after, misconfigured or person"),
    Column("failed_lanes", Text, doc="the lanes of the failures in a row, as JSON: one order counts once"),
    Column("pauses_in_row", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("route", "merchant", "channel"),
)

notifications = Table(
    "notifications",
    metadata,
    Column("id", Key, primary_key=True),
    Column("identity", LargeBinary, doc="null for a conflict; begins with lastModified, so that it inserts in order"),
    Column("conflicts_with", Key, ForeignKey("notifications.id"), doc="same identity, another order inside"),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("callback", Text, nullable=False),
    Column("order_id", Text, nullable=False),
    Column("snapshot_at", BigInteger, nullable=False, doc="lastModified, or else when it was received"),
    Column("received_at", BigInteger, nullable=False),
    Column("source", Text, nullable=False, doc="callback or reconciliation"),
    Column("digest", LargeBinary, doc="of the order, once it had to be compared"),
    Column("body", LargeBinary, doc="as received, byte for byte; null once pruned"),
    Index("uq_notifications_identity", "identity", unique=True),
    # What pruning has before it. In order of insertion, so that it costs an accept next to nothing.
    _partial("ix_notifications_bodies", "id", where="body IS NOT NULL"),
    _partial("ix_notifications_conflicts_with", "conflicts_with", where="conflicts_with IS NOT NULL"),
)

lanes = Table(
    "lanes",
    metadata,
    Column("id", Key, primary_key=True),
    Column("queue_id", Key, ForeignKey("queues.id"), nullable=False),
    # In the order of its bytes on both databases: lanes are locked in that order, everywhere.
    Column("order_id", Text().with_variant(Text(collation="C"), "postgresql"), nullable=False),
    Column("holder", Key, doc="null: free"),
    Column("claim", BigInteger, nullable=False, server_default=text("0"), doc="counts up for ever: the fence"),
    Column("settled", BigInteger, nullable=False, server_default=text("0"), doc="the last claim known to have ended"),
    Column("current_delivery_id", Key, doc="attempted and not passed: nothing goes before it"),
    Column("next_at", BigInteger, doc="due then; while held, when the doubt about it would end; null: idle or stopped"),
    Column("newest_snapshot_at", BigInteger, nullable=False),
    Column("previous", Text, doc="the last Done, as JSON: reference, facts, at"),
    UniqueConstraint("queue_id", "order_id"),
    _partial("ix_lanes_due", "queue_id", "next_at", where="holder IS NULL AND next_at IS NOT NULL"),
    _partial("ix_lanes_held", "holder", where="holder IS NOT NULL"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Key, primary_key=True),
    Column("notification_id", Key, ForeignKey("notifications.id"), nullable=False),
    Column("lane_id", Key, ForeignKey("lanes.id"), nullable=False),
    Column("snapshot_at", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("first_attempt_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("retried_at", BigInteger),
    Index("ix_deliveries_notification_id", "notification_id"),
    Index("ix_deliveries_lane_id", "lane_id"),
    _partial("ix_deliveries_waiting", "lane_id", "snapshot_at", "id", where="state = 'waiting'"),
    _partial("ix_deliveries_dead", "id", "lane_id", where="state = 'dead'"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Key, primary_key=True),
    Column("delivery_id", Key, ForeignKey("deliveries.id"), nullable=False, index=True),
    Column("claim", BigInteger, nullable=False),
    Column("kind", Text, nullable=False, doc="deliver or lookup"),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("code", Text),
    Column("message", Text, doc="for a person; from the handler"),
    Column("reference", Text, doc="the destination's name for the effect"),
)

watermarks = Table(
    "watermarks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False, doc="how far something has come: the clock, the pruning"),
)

documents = Table(
    "documents",
    metadata,
    Column("merchant", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("content", LargeBinary, nullable=False, doc="of Norce's configuration, what was taken the last time; JSON"),
)

actions = Table(
    "actions",
    metadata,
    Column("id", Key, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("command", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("matching", Text, nullable=False, doc="what it was asked for, as JSON"),
    Column("changed", Integer, nullable=False, server_default=text("0")),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("id", Key, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True, doc="when it was known; the oldest are pruned"),
    Column("kind", Text, nullable=False, doc="late or shadow"),
    Column("callback", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("order_id", Text, nullable=False, index=True),
    Column("decided", Text, nullable=False, doc="approve, reject, accept, patch, refuse or failed"),
    Column("codes", Text, nullable=False, doc="of its problems or its refusal, or where it patches; as JSON"),
    Column("answered", Text, doc="what counted in its stead: approve or reject; null for a shadow"),
    Column("took_ms", BigInteger, nullable=False),
)
