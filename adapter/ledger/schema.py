"""The tables of the ledger, for SQLite and PostgreSQL.

Keys are integers in the order of insertion: in a large table, random keys cost the writer twice the time. A lane is one
order on one route, and the row that is claimed; its deliveries refer to it. Doubt is not a column: a lane is in doubt
while `claim > settled`. Moments are milliseconds since 1970 (UTC) on the ledger's clock.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
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
    true,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite makes a column the row id only if its type is INTEGER; PostgreSQL needs BIGINT for 64 bits.
Key = BigInteger().with_variant(Integer(), "sqlite")
# Ordered by bytes on both databases, so that an index finds texts by their beginning.
Bytewise = Text().with_variant(Text(collation="C"), "postgresql")


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, sqlite_where=text(where), postgresql_where=text(where))


processes = Table(
    "processes",
    metadata,
    Column("id", Key, primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False, doc="its lanes are free after this moment"),
    Column("version", Text, nullable=False),
)

queues = Table(
    "queues",
    metadata,
    Column("id", Key, primary_key=True),
    Column("route", Text, nullable=False),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("paused_until", BigInteger, doc="null: running; in the past: one lane is tried as a probe"),
    Column("pause_reason", Text, doc="the code that paused it, or a person's words"),
    Column("paused_by", Text, doc="failures, retry_after, misconfigured or person"),
    Column("failed_lanes", Text, doc="the lanes of consecutive failures, as JSON: an order counts once"),
    Column("pauses_in_row", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("route", "merchant", "channel"),
)

notifications = Table(
    "notifications",
    metadata,
    Column("id", Key, primary_key=True),
    Column(
        "identity",
        LargeBinary,
        nullable=False,
        doc="begins with lastModified, so that inserts are ordered; that of a conflict ends with its digest",
    ),
    Column(
        "conflicts_with",
        Key,
        ForeignKey("notifications.id"),
        doc="the notification with the same identity and another order",
    ),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("callback", Text, nullable=False),
    Column("order_id", Bytewise, nullable=False),
    Column("reference", Text, doc="the order's own, as received; it lives as long as the row"),
    Column("snapshot_at", BigInteger, nullable=False, doc="lastModified, or the time of receipt"),
    Column("received_at", BigInteger, nullable=False),
    Column("source", Text, nullable=False, doc="callback, reconciliation or orders"),
    Column("is_wanted", Boolean, nullable=False, server_default=true(), doc="by a route, on receipt or in a backfill"),
    Column("digest", LargeBinary, doc="of the order, once it had to be compared"),
    Column("body", LargeBinary, doc="as received; null once pruned"),
    Index("uq_notifications_identity", "identity", unique=True),
    # For pruning. Ordered by insertion, so that it costs an accept next to nothing.
    _partial_index("ix_notifications_bodies", "id", where="body IS NOT NULL"),
    _partial_index("ix_notifications_unwanted_bodies", "id", where="body IS NOT NULL AND NOT is_wanted"),
    _partial_index("ix_notifications_conflicts_with", "conflicts_with", where="conflicts_with IS NOT NULL"),
    # Those that a route wanted are found through the lanes of their order.
    _partial_index("ix_notifications_unwanted_order_id", "order_id", where="NOT is_wanted"),
    _partial_index("ix_notifications_reference", "reference", where="reference IS NOT NULL"),
)

lanes = Table(
    "lanes",
    metadata,
    Column("id", Key, primary_key=True),
    Column("queue_id", Key, ForeignKey("queues.id"), nullable=False),
    Column("order_id", Bytewise, nullable=False),  # lanes are locked in this order everywhere
    Column("holder", Key, doc="null: free"),
    Column("claim", BigInteger, nullable=False, server_default=text("0"), doc="the fencing token: counts up for ever"),
    Column("settled", BigInteger, nullable=False, server_default=text("0"), doc="the last claim with a known outcome"),
    Column("current_delivery_id", Key, doc="attempted and not finished: no delivery comes before it"),
    Column("next_at", BigInteger, doc="due then; while held, due then if the process ends; null: idle or stopped"),
    Column("doubt_until", BigInteger, doc="the request of the last claim has its time until then"),
    Column("previous", Text, doc="the last Done, as JSON: reference, facts, at"),
    UniqueConstraint("queue_id", "order_id"),
    _partial_index("ix_lanes_due", "queue_id", "next_at", where="holder IS NULL AND next_at IS NOT NULL"),
    _partial_index("ix_lanes_held", "holder", where="holder IS NOT NULL"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Key, primary_key=True),
    Column("notification_id", Key, ForeignKey("notifications.id"), nullable=False),
    Column("lane_id", Key, ForeignKey("lanes.id"), nullable=False),
    Column(
        "position", BigInteger, nullable=False, doc="its snapshot if the lane is in order of snapshots, else 0: by id"
    ),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("first_attempt_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("retried_at", BigInteger),
    Column("again_of", Key, ForeignKey("deliveries.id"), doc="of a resend: the delivery that is delivered again"),
    Column("command", Key, ForeignKey("actions.id"), doc="of a person, which made this delivery"),
    Column("reference", Text, doc="the name of the effect at the destination, from its Done"),
    Index("ix_deliveries_notification_id", "notification_id"),
    Index("ix_deliveries_lane_id", "lane_id", "id"),
    _partial_index("ix_deliveries_waiting", "lane_id", "position", "id", where="state = 'waiting'"),
    _partial_index("ix_deliveries_dead", "id", "lane_id", where="state = 'dead'"),
    # A command that is interrupted and resumed sends nothing twice.
    _partial_index("uq_deliveries_again_of", "again_of", "command", where="again_of IS NOT NULL", unique=True),
    _partial_index("ix_deliveries_reference", "reference", where="reference IS NOT NULL"),
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
    Column("message", Text, doc="from the handler, for people"),
    Column("reference", Text, doc="the name of the effect at the destination"),
)

watermarks = Table(
    "watermarks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False, doc="in milliseconds"),
)

documents = Table(
    "documents",
    metadata,
    Column("merchant", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("content", LargeBinary, nullable=False, doc="the last valid configuration document from Norce, as JSON"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("merchant", Text, primary_key=True),
    Column("name", Text, primary_key=True, doc="a digest of the login's settings, without its client secret"),
    Column("content", LargeBinary, doc="the access and refresh token, in clear"),
    Column("version", BigInteger, nullable=False, doc="counts the tokens that were stored"),
    Column("locked_until", BigInteger, nullable=False, doc="a node replaces the token until then; 0: none does"),
)

actions = Table(
    "actions",
    metadata,
    Column("id", Key, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("command", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("matching", Text, nullable=False, doc="the conditions of the command, as JSON"),
    Column("changed", Integer, nullable=False, server_default=text("0")),
)

bindings = Table(
    "bindings",
    metadata,
    Column("id", Key, primary_key=True, doc="always 1"),
    Column("norce", Text, nullable=False, doc="the environment or the address of the Norce whose orders these are"),
    Column("adapter_id", Text, nullable=False),
)

names = Table(
    "names",
    metadata,
    Column("merchant", Text, primary_key=True, doc="of a channel; empty for a callback"),
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False, doc="channel; of a callback: notification, validation or hook"),
)

uses = Table(
    "uses",
    metadata,
    Column("day", BigInteger, primary_key=True, doc="days since 1970"),
    Column("callback", Text, primary_key=True),
    Column("merchant", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("key", Text, primary_key=True, doc="the URL key that verified the calls; empty for secrets"),
    Column("calls", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("id", Key, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True, doc="the time of the verdict"),
    Column("kind", Text, nullable=False, doc="answer, late or shadow"),
    Column("callback", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("merchant", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("order_id", Bytewise, nullable=False, index=True),
    Column("decided", Text, nullable=False, doc="approve, reject, accept, patch, refuse or failed"),
    Column(
        "codes",
        Text,
        nullable=False,
        doc="of its problems or its refusal, the pointers it patches, or the reason why it failed; as JSON",
    ),
    Column("answered", Text, doc="the answer in its place: approve, reject or busy; null if there was none"),
    Column("took_ms", BigInteger, nullable=False),
)
