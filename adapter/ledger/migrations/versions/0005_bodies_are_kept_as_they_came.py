"""
Bodies are kept as they came

PostgreSQL compresses what it keeps beside a row; of an order of 5 KB that was a fifth of what its accept cost.
"""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("ALTER TABLE notifications ALTER COLUMN body SET STORAGE EXTERNAL")
