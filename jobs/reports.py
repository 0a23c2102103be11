"""What a report asks of the rows of a job that has ended, in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.library import record_of
from jobs.models import AttemptRow, EventRow, MetricRow
from jobs.reads import find_job, job_exists, job_record
from jobs.spec import JobRecord
from jobs.transactions import Transactions


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One claim of a job and its end; `outcome` is None while it is held."""

    attempt: int
    stage: str
    worker_id: str
    started_at: float
    ended_at: float | None
    outcome: str | None
    energy_joules: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sums over the rows of a run, which hold for runs without a result too."""

    seconds: float | None
    flops: float | None
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A job with what was measured and told of its run; `selections` are the choices where a stage of the ladder began.

    `quote` is what was said before its first step; None where its data were never prepared.
    """

    job: JobRecord
    quote: dict[str, Any] | None
    measured: Measured
    attempts: tuple[AttemptRecord, ...]
    selections: tuple[dict[str, Any], ...]


class Reports(Transactions):
    """Runs of the store, as a whole."""

    def get_run(self, project: str, job_id: str) -> RunRecord:
        """A job and its run. Raises NotFound."""
        with self.reading() as session:
            row = find_job(session, project, job_id)
            seconds, flops, memory = session.execute(
                select(
                    func.sum(MetricRow.step_seconds),
                    func.max(MetricRow.flops),
                    func.max(MetricRow.memory_bytes),
                ).where(MetricRow.job_id == job_id)
            ).one()
            attempts = session.scalars(
                select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
            )
            return RunRecord(
                job=job_record(row),
                quote=row.quote,
                measured=Measured(seconds=seconds, flops=flops, memory_bytes=memory),
                attempts=tuple(record_of(AttemptRecord, row) for row in attempts),
                selections=_selections(session, job_id),
            )

    def selections(self, project: str, job_id: str) -> tuple[dict[str, Any], ...]:
        """The choices of a job where a stage of its ladder began, in order. Raises NotFound."""
        with self.reading() as session:
            job_exists(session, project, job_id)
            return _selections(session, job_id)


def _selections(session: Session, job_id: str) -> tuple[dict[str, Any], ...]:
    told = session.scalars(
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.kind == "selection")
        .order_by(EventRow.seq)
    )
    return tuple(data for data in told if data)
