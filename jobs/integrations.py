"""Where else a job's metrics go: one row for each tracker, which remembers how far it was told.

The rows of `metrics` are the queue, so nothing is lost while no worker sends, and nothing waits in memory. A sender claims a
row by moving its `next_at` on and says so again while it sends: whoever dies over it, another goes on from what has arrived.
Two senders at once do no harm, since trackers know the steps that they have; so unlike a job's, this lease may be judged
by the clock. A failure is told once, in the job's events, and ends nothing but the sending.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from jobs.errors import LeaseLost
from jobs.models import IntegrationRow, JobRow
from jobs.reads import job_exists
from jobs.recording import add_event
from jobs.states import TERMINAL, IntegrationStatus, Status
from jobs.transactions import Transactions

TYPES = ("mlflow", "tensorboard", "wandb")
SENDING_SECONDS = 120
# Seconds until the next try, after each failure in a row.
BACK_OFF = (5, 60, 300, 1800, 7200, 21600)
MAX_ERROR = 500


@dataclass(frozen=True, kw_only=True)
class Integration:
    """One tracker of a job; as `claim_integration` returns it, also the right to send to it.

    `step` is the last that arrived, -1 for none; `run` names the run there: a URL where there is one.
    """

    job_id: str
    number: int
    type: str
    settings: dict[str, Any]
    project: str
    status: str
    step: int
    run: str | None
    error: str | None
    owner: str | None


class Integrations(Transactions):
    """Trackers of the store's jobs."""

    def list_integrations(self, project: str, job_id: str) -> list[Integration]:
        """Those of a job, in its own order. Raises NotFound."""
        with self.reading() as session:
            job_exists(session, project, job_id)
            query = _with_jobs().where(IntegrationRow.job_id == job_id)
            found = session.execute(query.order_by(IntegrationRow.number))
            return [_record(row, job) for row, job in found]

    def claim_integration(self, types: Sequence[str]) -> Integration | None:
        """One of these types that has something to be told, now the caller's; None where there is none."""
        due = _due(types)
        with self.reading() as session:
            # Idle workers do not write.
            if session.scalar(_with_jobs().where(*due).limit(1)) is None:
                return None
        with self.writing() as session:
            query = _with_jobs().where(*due).order_by(IntegrationRow.next_at).limit(1)
            query = query.with_for_update(of=IntegrationRow, skip_locked=True)
            found = session.execute(query).first()
            if found is None:
                return None
            row, job = found
            row.owner = "sender-" + secrets.token_hex(8)
            row.next_at = time.time() + SENDING_SECONDS
            return _record(row, job)

    def integration_sent(self, claim: Integration, step: int, run: str | None) -> Integration:
        """All up to `step` has arrived, in the tracker's `run`; the claim holds on. Raises LeaseLost."""
        with self.writing() as session:
            row = _held(session, claim)
            if step > row.step:
                row.step, row.failures, row.error = step, 0, None
            if run != row.run:
                row.run = run
                _tell(session, row, f"Metrics go to {row.type}: {run}")
            row.next_at = time.time() + SENDING_SECONDS
        return replace(claim, step=max(step, claim.step), run=run)

    def release_integration(self, claim: Integration) -> None:
        """Send no more for now. Raises LeaseLost."""
        with self.writing() as session:
            row = _held(session, claim)
            row.owner, row.next_at = None, time.time()

    def end_integration(self, claim: Integration) -> None:
        """All has arrived, the end included. Raises LeaseLost."""
        with self.writing() as session:
            row = _held(session, claim)
            row.owner, row.status = None, IntegrationStatus.DONE

    def fail_integration(self, claim: Integration, error: str) -> None:
        """It did not work: try again later, a counted number of times. Raises LeaseLost."""
        with self.writing() as session:
            row = _held(session, claim)
            said = f"Metrics do not reach {row.type}: {error[:MAX_ERROR]}"
            if row.failures == 0:
                _tell(session, row, said, level="warn")
            row.owner, row.error = None, error[:MAX_ERROR]
            row.failures += 1
            if row.failures > len(BACK_OFF):
                row.status = IntegrationStatus.FAILED
            else:
                row.next_at = time.time() + BACK_OFF[row.failures - 1]


def add_integrations(session: Session, job: JobRow) -> None:
    """The rows of a job that is being accepted."""
    session.add_all(
        IntegrationRow(
            job_id=job.id,
            number=number,
            type=entry["type"],
            status=IntegrationStatus.OPEN,
            next_at=job.created_at,
        )
        for number, entry in enumerate(job.integrations or [])
    )


def _tell(session: Session, row: IntegrationRow, message: str, *, level: str = "info") -> None:
    """An event of the job, beside the version that brings its followers to it (`jobs.pulses`)."""
    query = select(JobRow).where(JobRow.id == row.job_id)
    job = session.scalars(query.with_for_update()).one()
    job.version += 1
    add_event(session, job.id, message, kind="message", level=level)


def _with_jobs() -> Any:
    return select(IntegrationRow, JobRow).join(JobRow, JobRow.id == IntegrationRow.job_id)


def _due(types: Sequence[str]) -> tuple[ColumnElement[bool], ...]:
    # A job that ended before its first step has nothing to tell, and its rows stay as they are.
    ended = JobRow.status.in_(TERMINAL) & JobRow.progress_step.isnot(None)
    return (
        IntegrationRow.status == IntegrationStatus.OPEN,
        IntegrationRow.next_at <= time.time(),
        IntegrationRow.type.in_(types),
        (JobRow.status == Status.RUNNING) | ended,
    )


def _held(session: Session, claim: Integration) -> IntegrationRow:
    """The claimed row, locked. Raises LeaseLost."""
    query = select(IntegrationRow).where(
        IntegrationRow.job_id == claim.job_id,
        IntegrationRow.number == claim.number,
        IntegrationRow.owner == claim.owner,
    )
    row = session.scalar(query.with_for_update())
    if row is None:
        raise LeaseLost(f"{claim.job_id}: somebody else sends to its {claim.type}")
    return row


def _record(row: IntegrationRow, job: JobRow) -> Integration:
    entry = (job.integrations or [])[row.number]
    return Integration(
        job_id=row.job_id,
        number=row.number,
        type=row.type,
        settings=entry.get(row.type) or {},
        project=job.project,
        status=row.status,
        step=row.step,
        run=row.run,
        error=row.error,
        owner=row.owner,
    )
