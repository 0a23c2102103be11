"""The queue as it stands: who waits in which order, what runs, how long such things took before.

The order is the one in which `Store.claim` would take the jobs if none ended meanwhile: whose project holds least comes
first among jobs of one priority, and every job taken makes its project hold one more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.models import AttemptRow, JobRow
from jobs.quotas import holdings
from jobs.states import HELD, WAITING, Desired, Stage
from jobs.tenant_models import ProjectRow
from jobs.transactions import Transactions

# What was long ago says little of today's jobs.
PAST_ATTEMPTS = 50
_DONE = {Stage.PREPARE: "prepared", Stage.TRAIN: "succeeded"}


@dataclass(frozen=True, kw_only=True)
class Waiter:
    """A job that waits. `over_limit`: its project runs, or will run before it, as many as it may."""

    job_id: str
    project: str
    not_before: float
    needs_device: str | None
    needs_memory: int | None
    over_limit: bool

    def fits(self, hardware: Mapping[str, Any] | None) -> bool:
        """Whether it can train on this; of a worker that does not tell, it is not known and so not denied."""
        return hardware is None or (
            self.needs_device in (None, hardware["device"])
            and (self.needs_memory or 0) <= hardware["memory_bytes"]
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One stage. `left` holds, for each job that is worked on, the seconds so far and those it expects yet."""

    stage: Stage
    waiting: tuple[Waiter, ...]
    left: tuple[tuple[float, float | None], ...]
    past_seconds: tuple[float, ...]


class Waiting(Transactions):
    """The queue of the store."""

    def lines(self) -> dict[Stage, Line]:
        """All stages, across projects: show a project its own jobs, and of others only counts."""
        with self.reading() as session:
            return {
                stage: Line(
                    stage=stage,
                    waiting=_waiting(session, stage),
                    left=_left(session, stage),
                    past_seconds=_past(session, stage),
                )
                for stage in Stage
            }


def _waiting(session: Session, stage: Stage) -> tuple[Waiter, ...]:
    holding = holdings()
    in_project = func.row_number().over(
        partition_by=JobRow.project, order_by=(JobRow.priority.desc(), JobRow.seq)
    )
    query = (
        select(
            JobRow.id,
            JobRow.project,
            JobRow.not_before,
            JobRow.needs_device,
            JobRow.needs_memory,
            in_project,
            func.coalesce(holding.c.running, 0),
            ProjectRow.running_jobs,
        )
        .outerjoin(holding, holding.c.project == JobRow.project)
        .outerjoin(ProjectRow, ProjectRow.id == JobRow.project)
        .where(
            JobRow.status == WAITING[stage],
            JobRow.owner.is_(None),
            JobRow.desired == Desired.RUN,
        )
        .order_by(JobRow.priority.desc(), func.coalesce(holding.c.held, 0) + in_project, JobRow.seq)
    )
    return tuple(
        Waiter(
            job_id=job_id,
            project=project,
            not_before=not_before,
            needs_device=device,
            needs_memory=memory,
            over_limit=stage is Stage.TRAIN and limit is not None and running + number > limit,
        )
        for job_id, project, not_before, device, memory, number, running, limit in session.execute(
            query
        )
    )


def _left(session: Session, stage: Stage) -> tuple[tuple[float, float | None], ...]:
    query = (
        select(AttemptRow.started_at, JobRow.eta_seconds)
        .join(JobRow, (JobRow.id == AttemptRow.job_id) & (JobRow.attempt == AttemptRow.attempt))
        .where(JobRow.status == HELD[stage], JobRow.owner.isnot(None))
    )
    now = time.time()
    return tuple((max(0.0, now - started), eta) for started, eta in session.execute(query))


def _past(session: Session, stage: Stage) -> tuple[float, ...]:
    query = (
        select(AttemptRow.ended_at - AttemptRow.started_at)
        .where(AttemptRow.stage == stage, AttemptRow.outcome == _DONE[stage])
        .order_by(AttemptRow.ended_at.desc())
        .limit(PAST_ATTEMPTS)
    )
    return tuple(max(0.0, seconds) for seconds in session.scalars(query) if seconds is not None)
