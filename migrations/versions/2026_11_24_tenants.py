"""tenants, receipts and webhooks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

DOCUMENT = sa.JSON(none_as_null=True).with_variant(
    postgresql.JSONB(none_as_null=True), "postgresql"
)
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
HOLDERS = ("keys", "files", "jobs", "models")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("archived_at", sa.Double(), nullable=True),
        sa.Column("queued_jobs", sa.BigInteger(), nullable=True),
        sa.Column("running_jobs", sa.BigInteger(), nullable=True),
        sa.Column("storage_bytes", sa.BigInteger(), nullable=True),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_projects")),
        sa.UniqueConstraint("id", name=op.f("uq_projects_id")),
    )
    op.create_table(
        "service_accounts",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_service_accounts")),
        sa.UniqueConstraint("id", name=op.f("uq_service_accounts_id")),
    )
    op.create_index(op.f("ix_service_accounts_project"), "service_accounts", ["project"])
    with op.batch_alter_table("keys", schema=None) as batch_op:
        # Keys of before could do all there was.
        batch_op.add_column(
            sa.Column("scopes", DOCUMENT, nullable=False, server_default=sa.text("'[\"admin\"]'"))
        )
        batch_op.add_column(
            sa.Column("hint", sa.String(length=8), nullable=False, server_default="")
        )
        batch_op.add_column(sa.Column("service_account", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("revoked_at", sa.Double(), nullable=True))
    with op.batch_alter_table("keys", schema=None) as batch_op:
        batch_op.alter_column("scopes", server_default=None)
        batch_op.alter_column("hint", server_default=None)
    op.create_table(
        "audit_logs",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=700), nullable=False),
        sa.Column("changed", DOCUMENT, nullable=False),
        sa.Column("actor", sa.String(length=16), nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("operation", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit_logs")),
        sa.UniqueConstraint("id", name=op.f("uq_audit_logs_id")),
    )
    op.create_index(op.f("ix_audit_logs_project_seq"), "audit_logs", ["project", "seq"])
    op.create_table(
        "receipts",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("token", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("retry", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_receipts")),
        sa.UniqueConstraint("token", name=op.f("uq_receipts_token")),
        sa.UniqueConstraint("project", "scope", "key", name=op.f("uq_receipts_project_scope_key")),
    )
    op.create_index(op.f("ix_receipts_created_at"), "receipts", ["created_at"])
    op.create_index(op.f("ix_receipts_key_id_fingerprint"), "receipts", ["key_id", "fingerprint"])
    # Keys of the last 24 hours are forgotten: what they kept was a job, not an answer.
    op.drop_table("idempotency_keys")
    op.create_table(
        "webhook_endpoints",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("event_types", DOCUMENT, nullable=False),
        sa.Column("secret", sa.String(length=64), nullable=False),
        sa.Column("old_secret", sa.String(length=64), nullable=True),
        sa.Column("old_secret_until", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("disabled_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_webhook_endpoints")),
        sa.UniqueConstraint("id", name=op.f("uq_webhook_endpoints_id")),
    )
    op.create_index(
        op.f("ix_webhook_endpoints_project_seq"), "webhook_endpoints", ["project", "seq"]
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("seq", SERIAL, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("endpoint_id", sa.String(length=40), nullable=False),
        sa.Column("event_id", sa.String(length=40), nullable=False),
        sa.Column("event_type", sa.String(length=64), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("status", sa.String(length=12), nullable=False),
        sa.Column("tries", sa.BigInteger(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("tried_at", sa.Double(), nullable=True),
        sa.Column("response_status", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name=op.f("fk_webhook_deliveries_endpoint_id_webhook_endpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_webhook_deliveries")),
        sa.UniqueConstraint("id", name=op.f("uq_webhook_deliveries_id")),
    )
    op.create_index(
        op.f("ix_webhook_deliveries_status_next_at"), "webhook_deliveries", ["status", "next_at"]
    )
    op.create_index(
        op.f("ix_webhook_deliveries_endpoint_id_seq"), "webhook_deliveries", ["endpoint_id", "seq"]
    )
    for table in HOLDERS:
        op.execute(
            "INSERT INTO projects (id, name, created_at) "  # noqa: S608 - names of our own tables
            f"SELECT DISTINCT project, project, {_now()} FROM {table} "
            "WHERE project NOT IN (SELECT id FROM projects)"
        )
    op.execute(
        "INSERT INTO projects (id, name, created_at) "  # noqa: S608
        f"SELECT 'default', 'Default', {_now()} "
        "WHERE NOT EXISTS (SELECT 1 FROM projects WHERE id = 'default')"
    )


def _now() -> str:
    if op.get_bind().dialect.name == "postgresql":
        return "extract(epoch from now())"
    return "CAST(strftime('%s', 'now') AS REAL)"


def downgrade() -> None:
    for table in ("webhook_deliveries", "webhook_endpoints", "receipts", "audit_logs"):
        op.drop_table(table)
    op.create_table(
        "idempotency_keys",
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project", "key", name=op.f("pk_idempotency_keys")),
    )
    with op.batch_alter_table("keys", schema=None) as batch_op:
        for column in ("scopes", "hint", "service_account", "expires_at", "revoked_at"):
            batch_op.drop_column(column)
    op.drop_table("service_accounts")
    op.drop_table("projects")
