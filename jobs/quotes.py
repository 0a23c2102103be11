"""What past runs took, so that the next one can be quoted: their configuration, what they counted, where they ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from jobs.models import AttemptRow, JobRow, MetricRow
from jobs.states import Stage, Status
from jobs.transactions import Transactions

MAX_PAST_RUNS = 200
# One claim to prepare and one to train.
UNINTERRUPTED = 2


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """One run that succeeded: its configuration, what was quoted of it, what it measured.

    `memory_bytes` is the highest that it told of, `energy_joules` what its GPUs spent; None where neither was told.
    """

    job_id: str
    config: dict[str, Any]
    quote: dict[str, Any]
    summary: dict[str, Any]
    host: str
    memory_bytes: int | None
    energy_joules: float | None


class Quotes(Transactions):
    """Past runs of the store."""

    def past_runs(self, project: str, *, limit: int = MAX_PAST_RUNS) -> list[PastRun]:
        """Runs of the project that succeeded without a failure on the way, newest first."""
        query = (
            select(
                JobRow.id,
                JobRow.config,
                JobRow.quote,
                JobRow.summary,
                JobRow.attempt,
                AttemptRow.worker_id,
                AttemptRow.energy_joules,
                MetricRow.memory_bytes,
            )
            .join(
                AttemptRow,
                (AttemptRow.job_id == JobRow.id) & (AttemptRow.attempt == JobRow.attempt),
            )
            # A peak never falls, so the last step tells that of the run.
            .outerjoin(
                MetricRow, (MetricRow.job_id == JobRow.id) & (MetricRow.step == JobRow.total_steps)
            )
            .where(
                JobRow.project == project,
                JobRow.status == Status.SUCCEEDED,
                AttemptRow.stage == Stage.TRAIN,
                JobRow.failures == 0,
            )
            .order_by(JobRow.seq.desc())
            .limit(limit)
        )
        with self.reading() as session:
            rows = session.execute(query).all()
        return [
            PastRun(
                job_id=job_id,
                config=config,
                quote=quote,
                summary=summary,
                host=host_of(worker),
                memory_bytes=memory,
                # A run that was interrupted has spent more than its last attempt did.
                energy_joules=energy if attempt == UNINTERRUPTED else None,
            )
            for job_id, config, quote, summary, attempt, worker, energy, memory in rows
            if config and quote and summary
        ]


def host_of(worker_id: str) -> str:
    """The host in a worker's id, which is HOST-PID-RANDOM."""
    return worker_id.rsplit("-", 2)[0]
