"""spans of metrics, result files, pinned checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

EVALUATED = sa.text("eval_loss IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "metric_spans",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("span", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("low_step", sa.BigInteger(), nullable=False),
        sa.Column("low_loss", sa.Double(), nullable=False),
        sa.Column("high_step", sa.BigInteger(), nullable=False),
        sa.Column("high_loss", sa.Double(), nullable=False),
        sa.Column("changes", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_metric_spans_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "span", name=op.f("pk_metric_spans")),
    )
    op.create_index(
        "ix_metrics_evaluations",
        "metrics",
        ["job_id", "step"],
        sqlite_where=EVALUATED,
        postgresql_where=EVALUATED,
    )
    op.add_column("jobs", sa.Column("result_file", sa.String(length=40), nullable=True))
    op.add_column("checkpoints", sa.Column("pinned_from", sa.String(length=512), nullable=True))


def downgrade() -> None:
    op.drop_column("checkpoints", "pinned_from")
    op.drop_column("jobs", "result_file")
    op.drop_index("ix_metrics_evaluations", "metrics")
    op.drop_table("metric_spans")
