"""what the queue goes by: priority, device, memory; what a worker trains on."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"

DOCUMENT = sa.JSON(none_as_null=True).with_variant(
    postgresql.JSONB(none_as_null=True), "postgresql"
)


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("priority", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.add_column("jobs", sa.Column("needs_device", sa.String(length=8), nullable=True))
    op.add_column("jobs", sa.Column("needs_memory", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("hardware", DOCUMENT, nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "hardware")
    op.drop_column("jobs", "needs_memory")
    op.drop_column("jobs", "needs_device")
    op.drop_column("jobs", "priority")
