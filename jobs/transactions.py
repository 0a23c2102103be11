"""One request or one change of state is one transaction, and nothing else commits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, TimeoutError
from sqlalchemy.orm import Session

from jobs.audit import write_audit
from jobs.db import looker, writer
from jobs.errors import StoreUnavailable
from jobs.outbox import write_deliveries


class _WritingSession(Session):
    """A session whose flushes leave audit rows and webhook deliveries beside what they write."""


event.listen(_WritingSession, "before_flush", write_audit)
event.listen(_WritingSession, "before_flush", write_deliveries)


class Transactions:
    """The kinds of transaction that the store's methods are made of."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._writer, self._looker = engine, writer(engine), looker(engine)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads. Raises StoreUnavailable."""
        with _translated(), Session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block, or leaves nothing. Raises StoreUnavailable."""
        with _translated(), _WritingSession(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """One statement that only reads, without the ORM: for what is asked at every request. Raises StoreUnavailable.

        Such statements are made once, with parameters: to make one and find it in SQLAlchemy's cache takes longer than the
        database does.
        """
        with _translated(), self._looker.connect() as connection:
            yield connection

    def ping(self) -> None:
        """Ask the database something. Raises StoreUnavailable where it does not answer."""
        with self.looking() as connection:
            connection.execute(text("SELECT 1"))


@contextmanager
def _translated() -> Iterator[None]:
    """Callers know the store's errors, not the driver's; a broken constraint stays what it is.

    PostgreSQL's InternalError is that of a server which only reads, as in a failover or with a full disk.
    """
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as error:
        raise StoreUnavailable(f"The database does not answer: {error.orig}") from error
    except TimeoutError as error:
        raise StoreUnavailable(f"The database does not answer: {error}") from error
