"""Run migrations whole or not at all, on both databases, one process at a time.

SQLite gets real transactions from `jobs.db` (BEGIN IMMEDIATE is also its lock); PostgreSQL takes an advisory lock, so that
two API replicas that start together do not migrate together.
"""

from alembic import context
from sqlalchemy import text

import jobs.models
import jobs.tenant_models
from jobs.base import Base
from jobs.db import make_engine, writer
from jobs.settings import Settings

_LOCK = 7_283_863


def run() -> None:
    """Upgrade online; SQL scripts are not offered, for a schema that is applied by hand drifts."""
    if context.is_offline_mode():
        raise SystemExit("Offline migration is not supported: run it against the database.")
    with writer(make_engine(Settings())).connect() as connection:
        sqlite = connection.dialect.name == "sqlite"
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            render_as_batch=sqlite,
            transactional_ddl=True,
            compare_type=True,
        )
        with context.begin_transaction():
            if not sqlite:
                connection.execute(text("SET LOCAL lock_timeout = '10s'"))
                # An index on many millions of rows takes as long as it takes.
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            context.run_migrations()


run()
