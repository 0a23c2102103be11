"""One request or one change of state is one transaction, and nothing else commits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from jobs.db import writer


class Transactions:
    """The two kinds of transaction that the store's methods are made of."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._writer = engine, writer(engine)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with Session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block, or leaves nothing."""
        with Session(self._writer) as session, session.begin():
            yield session

    def ping(self) -> None:
        """Ask the database something; raises what the driver raises where it does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))
