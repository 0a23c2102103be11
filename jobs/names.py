"""Public names of what jobs make: results, and checkpoints, which are models too.

    ft:BASE:PROJECT:SUFFIX:ID               a result
    ft:BASE:PROJECT:SUFFIX:ID:ckpt-step-N   a checkpoint of the same job, result or not

A name is made of the job, never kept apart from it; so a checkpoint needs no row of its own among the models.
"""

from __future__ import annotations

import re

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.models import CheckpointRow, JobRow
from jobs.spec import JobRecord

ID_CHARS = 8
_CHECKPOINT = re.compile(
    rf"(?P<result>ft:.*:(?P<id>[0-9a-f]{{{ID_CHARS}}})):ckpt-step-(?P<step>\d{{1,18}})"
)


def result_name(job: JobRecord | JobRow) -> str:
    """The name of the model that a job makes; a base that is itself a result lends its own base."""
    base = job.model.split(":")[1] if job.model.startswith("ft:") else job.model
    return f"ft:{base}:{job.project}:{job.suffix or ''}:{job.id[-ID_CHARS:]}"


def checkpoint_name(job: JobRecord | JobRow, step: int) -> str:
    """The name of a job's checkpoint as a model."""
    return f"{result_name(job)}:ckpt-step-{step}"


def is_checkpoint(name: str) -> bool:
    """Whether a model's name is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


def checkpoint_step(name: str) -> int | None:
    """The step of a checkpoint, from its name; None for any other model."""
    parts = _CHECKPOINT.fullmatch(name)
    return int(parts["step"]) if parts else None


def find_checkpoint(
    session: Session, project: str, name: str
) -> tuple[JobRow, CheckpointRow] | None:
    """The checkpoint of this name, with its job."""
    parts = _CHECKPOINT.fullmatch(name)
    if parts is None:
        return None
    query = (
        select(JobRow, CheckpointRow)
        .join(CheckpointRow, CheckpointRow.job_id == JobRow.id)
        .where(
            JobRow.project == project,
            CheckpointRow.step == int(parts["step"]),
            JobRow.id.endswith(parts["id"]),
        )
    )
    found = ((row[0], row[1]) for row in session.execute(query))
    return next((pair for pair in found if result_name(pair[0]) == parts["result"]), None)
