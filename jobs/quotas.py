"""What a project may have at once, asked inside the transaction that would take it.

The project's row is locked first, so that two requests or two workers cannot both take the last place. A project without
a row, or a limit of None, is not limited. Requests per minute are counted at the door (`api.limiter`), not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Select, Subquery, case, func, select
from sqlalchemy.orm import Session

from jobs.errors import QuotaExceeded
from jobs.models import CheckpointRow, FileRow, JobRow, UploadRow
from jobs.spec import Usage
from jobs.states import Stage, Status, UploadStatus
from jobs.tenant_models import ProjectRow

_QUEUED = (Status.VALIDATING_FILES, Status.QUEUED, Status.PAUSED)


def usage_of(session: Session, project: str) -> Usage:
    """What a project has now."""
    return Usage(
        queued_jobs=_jobs(session, project, JobRow.status.in_(_QUEUED)),
        running_jobs=_jobs(session, project, JobRow.status == Status.RUNNING),
        storage_bytes=_stored(session, project),
    )


def take_queue_place(session: Session, project: str) -> None:
    """Raises QuotaExceeded where the project may have no further job waiting."""
    limit = _locked_limit(session, project, "queued_jobs")
    if limit is not None:
        waiting = _jobs(session, project, JobRow.status.in_(_QUEUED))
        if waiting >= limit:
            message = f"{waiting} jobs of this project wait or pause; allowed are {limit}"
            raise QuotaExceeded.of("queued_jobs", message)


def take_storage(session: Session, project: str, more: int) -> None:
    """Raises QuotaExceeded where `more` bytes would be too many."""
    limit = _locked_limit(session, project, "storage_bytes")
    if limit is not None:
        stored = _stored(session, project)
        if stored + more > limit:
            message = f"The project stores {stored} bytes; with {more} more it would pass its limit of {limit}"
            raise QuotaExceeded.of("storage_bytes", message)


def may_start(session: Session, project: str, stage: Stage) -> bool:
    """Whether one more job of the project may run; preparing is not limited."""
    if stage is not Stage.TRAIN:
        return True
    limit = _locked_limit(session, project, "running_jobs")
    return limit is None or _jobs(session, project, JobRow.status == Status.RUNNING) < limit


def holdings() -> Subquery:
    """Of each project that holds any, its claimed (`held`) and its running jobs."""
    return (
        select(
            JobRow.project.label("project"),
            func.count(JobRow.owner).label("held"),
            func.count(case((JobRow.status == Status.RUNNING, 1))).label("running"),
        )
        .where(JobRow.status.in_((Status.VALIDATING_FILES, Status.RUNNING)))
        .group_by(JobRow.project)
        .subquery()
    )


def in_turn(
    waiting: Select[JobRow], stage: Stage, hardware: Mapping[str, Any] | None = None
) -> Select[JobRow]:
    """The waiting jobs that may start, in order: by priority, then whose project holds least, then the oldest.

    So among equals one project's hundred jobs delay nobody's one. With `hardware` those that can train on it only.
    """
    holding = holdings()
    query = waiting.outerjoin(holding, holding.c.project == JobRow.project)
    if stage is Stage.TRAIN:
        if hardware is not None:
            query = query.where(
                JobRow.needs_device.is_(None) | (JobRow.needs_device == hardware["device"]),
                JobRow.needs_memory.is_(None) | (JobRow.needs_memory <= hardware["memory_bytes"]),
            )
        query = query.outerjoin(ProjectRow, ProjectRow.id == JobRow.project).where(
            ProjectRow.running_jobs.is_(None)
            | (func.coalesce(holding.c.running, 0) < ProjectRow.running_jobs)
        )
    return query.order_by(JobRow.priority.desc(), func.coalesce(holding.c.held, 0), JobRow.seq)


def _locked_limit(session: Session, project: str, name: str) -> int | None:
    query = select(getattr(ProjectRow, name)).where(ProjectRow.id == project)
    limit: int | None = session.scalar(query)
    return session.scalar(query.with_for_update()) if limit is not None else None


def _jobs(session: Session, project: str, condition: ColumnElement[bool]) -> int:
    query = select(func.count()).select_from(JobRow).where(JobRow.project == project, condition)
    return session.scalar(query) or 0


def _stored(session: Session, project: str) -> int:
    files = select(func.sum(FileRow.bytes)).where(FileRow.project == project)
    checkpoints = (
        select(func.sum(CheckpointRow.size_bytes))
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.project == project)
    )
    # What is announced is taken; its parts lie on the disk already.
    uploads = select(func.sum(UploadRow.bytes)).where(
        UploadRow.project == project, UploadRow.status == UploadStatus.PENDING
    )
    return sum(int(session.scalar(query) or 0) for query in (files, checkpoints, uploads))
