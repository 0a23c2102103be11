"""integrations and secrets, quotes kept with their jobs, energy."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"

DOCUMENT = sa.JSON(none_as_null=True).with_variant(
    postgresql.JSONB(none_as_null=True), "postgresql"
)


def upgrade() -> None:
    op.create_table(
        "integrations",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("run", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(length=40), nullable=True),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "status IN ('open', 'done', 'failed')", name=op.f("ck_integrations_status")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_integrations_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_integrations")),
    )
    op.create_index(op.f("ix_integrations_status_next_at"), "integrations", ["status", "next_at"])
    op.create_table(
        "secrets",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_secrets")),
        sa.UniqueConstraint("project", "name", name=op.f("uq_secrets_project_name")),
    )
    op.add_column("jobs", sa.Column("integrations", DOCUMENT, nullable=True))
    op.add_column("jobs", sa.Column("quote", DOCUMENT, nullable=True))
    op.add_column("attempts", sa.Column("energy_joules", sa.Double(), nullable=True))
    op.add_column("workers", sa.Column("integrations", DOCUMENT, nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "integrations")
    op.drop_column("attempts", "energy_joules")
    op.drop_column("jobs", "quote")
    op.drop_column("jobs", "integrations")
    op.drop_table("secrets")
    op.drop_table("integrations")
