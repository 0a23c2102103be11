"""Who works here: workers tell that they live, and people look. No job is judged by it, that is what leases are for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, update

from jobs.library import record_of
from jobs.models import WorkerRow
from jobs.spec import WorkerRecord
from jobs.transactions import Transactions


class Roster(Transactions):
    """Workers of the store."""

    def register_worker(
        self,
        worker_id: str,
        *,
        hostname: str,
        pid: int,
        slots: dict[str, int],
        hardware: Mapping[str, Any] | None = None,
        integrations: Sequence[str] = (),
    ) -> None:
        """Tell of a worker that starts, what it trains on, and the trackers that it can send to."""
        now = time.time()
        with self.writing() as session:
            # Merged: of a first try it may be the answer alone that was lost.
            session.merge(
                WorkerRow(
                    id=worker_id,
                    hostname=hostname,
                    pid=pid,
                    slots=slots,
                    hardware=None if hardware is None else dict(hardware),
                    integrations=list(integrations),
                    started_at=now,
                    beat_at=now,
                )
            )

    def beat_worker(self, worker_id: str) -> None:
        """Tell that a worker lives."""
        with self.writing() as session:
            session.execute(
                update(WorkerRow)
                .where(WorkerRow.id == worker_id)
                .values(beat_seq=WorkerRow.beat_seq + 1, beat_at=time.time())
            )

    def forget_worker(self, worker_id: str) -> None:
        """A worker has ended in order."""
        with self.writing() as session:
            row = session.get(WorkerRow, worker_id)
            if row is not None:
                session.delete(row)

    def workers(self) -> list[WorkerRecord]:
        """Workers that have told of themselves, newest first."""
        with self.reading() as session:
            rows = session.scalars(select(WorkerRow).order_by(WorkerRow.started_at.desc()))
            return [record_of(WorkerRecord, row) for row in rows]
