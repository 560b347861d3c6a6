"""What pauses a queue, how far something has come, and what people did"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("queues", sa.Column("paused_by", sa.Text(), nullable=True))
    op.add_column("queues", sa.Column("failed_lanes", sa.Text(), nullable=True))
    op.add_column("queues", sa.Column("pauses_in_row", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_index("ix_deliveries_lane_id", "deliveries", ["lane_id"])
    watermarks = op.create_table(
        "watermarks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_watermarks")),
    )
    op.bulk_insert(watermarks, [{"name": name, "value": 0} for name in ("clock_latest", "clock_away")])
    op.create_table(
        "actions",
        sa.Column("id", KEY, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("matching", sa.Text(), nullable=False),
        sa.Column("changed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_actions")),
    )
