"""One engine for SQLite and PostgreSQL that behaves the same on both: whole transactions, bounded waits.

SQLite needs three things said aloud. (1) Python's sqlite3 must not open transactions by itself, or DDL escapes them.
(2) A transaction that will write takes the write lock at once (BEGIN IMMEDIATE): one that reads first and writes later
is refused at once by SQLite, however long the busy timeout. (3) Libraries before 3.51.3 can corrupt a WAL file that
several connections checkpoint, so they get a rollback journal, which is fast enough for what jobs write.

The road not taken is an async engine: the API's handlers are short and run in threads, and the worker is threads.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

from jobs.settings import Settings

# The first SQLite without the WAL-reset bug.
SAFE_WAL = (3, 51, 3)
# As many connections as may be open stay open: what is opened beyond a pool's size is closed as soon as it is given back,
# and under load most requests would then pay for a connection of their own. The one given back last is given out first:
# few are in use at a time, and theirs are the warm caches.
POOL = {"pool_size": 20, "max_overflow": 0, "pool_use_lifo": True}
# Execution option of connections whose transactions write.
WRITES = "satune_writes"


def make_engine(settings: Settings) -> Engine:
    """Engine for `settings.url`; makes the data folder where the database is a file in it."""
    url = settings.url
    if url.startswith("sqlite"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, **POOL, connect_args={"timeout": 15})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    limits = "-c statement_timeout=30000 -c lock_timeout=15000 -c idle_in_transaction_session_timeout=60000"
    return create_engine(
        url,
        pool_pre_ping=True,
        **POOL,
        connect_args={
            "options": limits,
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
        },
    )


def writer(engine: Engine) -> Engine:
    """The same engine and pool; its transactions take SQLite's write lock from their start."""
    return engine.execution_options(**{WRITES: True})


def looker(engine: Engine) -> Engine:
    """The same engine and pool, for single statements that only read: PostgreSQL needs no transaction around one."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    return engine


def is_postgresql(session: Session) -> bool:
    """Whether the session speaks to PostgreSQL."""
    return session.get_bind().dialect.name == "postgresql"


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None
    wal = sqlite3.sqlite_version_info >= SAFE_WAL
    for pragma in (
        "busy_timeout = 15000",
        f"journal_mode = {'WAL' if wal else 'DELETE'}",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
