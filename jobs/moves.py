"""How a job's row changes: its status by the table of `jobs.states`, an event and a version beside every change.

These are the moves of which the store's transactions are made; nothing else writes `status`.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.errors import LeaseLost
from jobs.models import AttemptRow, CheckpointRow, JobRow
from jobs.recording import add_event
from jobs.spec import Claim
from jobs.states import HELD, WAITING, Desired, Stage, Status, allowed

# How an attempt ended that the next one makes with a smaller micro-batch.
LACKED_MEMORY = "out_of_memory"


def move(row: JobRow, target: Status) -> None:
    """The only place where a status changes, by the table of `jobs.states`."""
    if not allowed(Status(row.status), target):
        raise AssertionError(f"{row.id}: {row.status} to {target} is no transition")
    row.status = target


def locked(session: Session, row: JobRow) -> JobRow:
    """The row as it stands now, nobody else's until the transaction ends."""
    session.refresh(row, with_for_update=True)
    return row


def fenced(session: Session, claim: Claim) -> JobRow:
    """The claimed row, locked, its lease renewed. Raises LeaseLost."""
    fence = (
        JobRow.id == claim.job_id,
        JobRow.attempt == claim.attempt,
        JobRow.owner == claim.worker_id,
        JobRow.status == HELD[claim.stage],
    )
    row: JobRow | None = session.scalar(select(JobRow).where(*fence).with_for_update())
    if row is None:
        raise LeaseLost(
            f"{claim.job_id}: attempt {claim.attempt} of {claim.worker_id} is no longer the newest"
        )
    row.heartbeat_seq += 1
    return row


def tell(session: Session, row: JobRow, state: str, message: str, *, level: str = "info") -> None:
    """Say what the job does now, in its row and in its history."""
    row.detail_state, row.detail_message, row.detail_since = state, message, time.time()
    row.version += 1
    add_event(session, row.id, message, level=level, data={"state": state, "status": row.status})


def end(
    session: Session, row: JobRow, status: Status, state: str, message: str, *, level: str = "info"
) -> None:
    """The job has ended, and nothing changes it again."""
    move(row, status)
    row.owner, row.finished_at, row.eta_seconds = None, time.time(), None
    tell(session, row, state, message, level=level)


def fail_row(session: Session, row: JobRow, error: dict[str, Any]) -> None:
    """The job has failed; `error` holds code and message."""
    row.error = error
    end(session, row, Status.FAILED, error["code"], f"Failed: {error['message']}", level="error")


def obey(session: Session, row: JobRow) -> bool:
    """Do what people want of a job that nobody holds any more; False where they want it to go on."""
    match Desired(row.desired):
        case Desired.CANCEL:
            end(session, row, Status.CANCELLED, "by_user", "Cancelled")
        case Desired.PAUSE:
            move(row, Status.PAUSED)
            row.owner, row.eta_seconds = None, None
            newest = select(func.max(CheckpointRow.step)).where(CheckpointRow.job_id == row.id)
            step = session.scalar(newest)
            where = f"; resume goes on from step {step}" if step else ""
            tell(session, row, "by_user", f"Paused{where}")
        case Desired.RUN:
            return False
    return True


def give_back(session: Session, row: JobRow, stage: Stage, reason: str, *, level: str) -> None:
    """The job waits for its stage again, or does what people want instead."""
    row.owner, row.eta_seconds = None, None
    if row.desired != Desired.RUN and level != "info":
        add_event(session, row.id, reason, level=level)
    if not obey(session, row):
        move(row, WAITING[stage])
        tell(session, row, "retrying", reason, level=level)


def count_failure(
    session: Session,
    row: JobRow,
    stage: Stage,
    error: dict[str, Any],
    *,
    max_failures: int,
    retry_seconds: float,
) -> None:
    """A run died: try again later, or fail where it has died too often.

    One that ended for lack of memory goes on with less: no number of those is too many.
    """
    row.failures += 1
    lacks = select(func.count()).where(
        AttemptRow.job_id == row.id, AttemptRow.outcome == LACKED_MEMORY
    )
    deaths = row.failures - (session.scalar(lacks) or 0)
    if deaths >= max_failures and row.desired != Desired.CANCEL:
        tries = f" It was tried {row.failures} times." if row.failures > 1 else ""
        fail_row(session, row, {**error, "message": f"{error['message']}.{tries}"})
        return
    row.not_before = time.time() + retry_seconds * 2 ** (row.failures - 1)
    give_back(
        session,
        row,
        stage,
        f"{error['message']}; going on from the newest checkpoint",
        level="warn",
    )
