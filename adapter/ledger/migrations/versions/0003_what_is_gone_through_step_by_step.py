"""What is gone through step by step: dead letters by their ids, notifications that still have a body"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.drop_index("ix_deliveries_dead", table_name="deliveries")
    dead = sa.text("state = 'dead'")
    op.create_index("ix_deliveries_dead", "deliveries", ["id", "lane_id"], sqlite_where=dead, postgresql_where=dead)
    has_one = sa.text("body IS NOT NULL")
    op.create_index("ix_notifications_bodies", "notifications", ["id"], sqlite_where=has_one, postgresql_where=has_one)
