"""Which checkpoints stay: the newest `checkpoints.keep` of a job, and those that a person has pinned.

The core deletes the folders of older checkpoints in its run folder, and rightly knows nothing of pins. So a pin links the
bytes to a place of their own (`Artifacts.link_checkpoint`, no copy is made) and the row then points there: what the core
deletes later is only its own name for them. The road not taken is to tell the core which folders to spare: it would have
to be told while it runs, and a checkpoint of a run that is over could not be pinned at all.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.errors import ModelInUse, NotFound
from jobs.library import record_of, refuse_used_model, users_of_model
from jobs.models import CheckpointRow
from jobs.moves import fenced, locked
from jobs.names import checkpoint_name, find_checkpoint
from jobs.reads import find_job
from jobs.spec import CheckpointRecord, Claim
from jobs.states import TERMINAL
from jobs.transactions import Transactions


class Pins(Transactions):
    """Pinned checkpoints of the store."""

    def get_checkpoint(self, project: str, job_id: str, checkpoint_id: str) -> CheckpointRecord:
        """One checkpoint. Raises NotFound."""
        with self.reading() as session:
            find_job(session, project, job_id)
            return _record(_find(session, job_id, checkpoint_id))

    def unfinished_checkpoint(self, project: str, name: str) -> CheckpointRecord | None:
        """The checkpoint of this public name, where its job has not ended."""
        with self.reading() as session:
            found = find_checkpoint(session, project, name)
            return _record(found[1]) if found and found[0].status not in TERMINAL else None

    def pin_checkpoint(self, project: str, found: CheckpointRecord, path: str) -> CheckpointRecord:
        """The checkpoint now lies at `path`; one that is pinned stays as it is.

        Raises:
            NotFound: it was deleted, or trained again, since it was found.
        """
        with self.writing() as session:
            job = locked(session, find_job(session, project, found.job_id))
            row = _find(session, found.job_id, found.id)
            if row.pinned_from is None:
                if row.path != found.path:
                    raise NotFound.of("checkpoint", found.id)
                row.pinned_from, row.path = row.path, path
                job.version += 1
            session.flush()
            return _record(row)

    def unpin_checkpoint(
        self, project: str, found: CheckpointRecord, *, still_there: bool
    ) -> CheckpointRecord:
        """Leave the checkpoint to its run again; where the run has deleted it, it goes.

        Raises:
            NotFound: it was deleted since it was found.
            ModelInUse: jobs that have not ended start from it.
        """
        with self.writing() as session:
            job = locked(session, find_job(session, project, found.job_id))
            row = _find(session, found.job_id, found.id)
            refuse_used_model(session, project, checkpoint_name(job, row.step))
            if row.pinned_from is not None:
                row.path, row.pinned_from = row.pinned_from, None
                job.version += 1
            record = _record(row)
            if not still_there:
                session.delete(row)
            return record

    def tidy_checkpoints(self, claim: Claim, keep: int) -> set[str]:
        """Forget what earlier attempts saved beyond the job's newest `keep`; the paths of what stays, pins left aside.

        What a job starts from stays. This attempt's own are its run's to delete. Raises LeaseLost.
        """
        with self.writing() as session:
            job = fenced(session, claim)
            saved = select(CheckpointRow).where(
                CheckpointRow.job_id == job.id, CheckpointRow.pinned_from.is_(None)
            )
            rows = session.scalars(saved.order_by(CheckpointRow.step.desc())).all()
            newest = max((r.step for r in rows if r.attempt == claim.attempt), default=0)
            surplus = [
                row
                for row in rows[keep:]
                if row.attempt != claim.attempt
                and row.step < newest
                and not users_of_model(session, job.project, checkpoint_name(job, row.step))
            ]
            for row in surplus:
                session.delete(row)
            return {row.path for row in rows} - {row.path for row in surplus}

    def delete_checkpoint(self, project: str, name: str) -> CheckpointRecord:
        """Forget a checkpoint by its public name, pinned or not; its folders are the caller's to remove.

        Raises:
            NotFound: no such checkpoint.
            ModelInUse: its own job has not ended and may go on from it, or others that have not ended start from it.
        """
        with self.writing() as session:
            found = find_checkpoint(session, project, name)
            if found is None:
                raise NotFound.of("model", name)
            job = locked(session, found[0])
            if job.status not in TERMINAL:
                raise ModelInUse.of(
                    (job.id,), f"{job.id}, which has not ended, may go on from {name}"
                )
            refuse_used_model(session, project, name)
            row = _find(session, job.id, found[1].id)
            session.delete(row)
            job.version += 1
            return _record(row)


def _find(session: Session, job_id: str, checkpoint_id: str) -> CheckpointRow:
    query = select(CheckpointRow).where(
        CheckpointRow.job_id == job_id, CheckpointRow.id == checkpoint_id
    )
    row: CheckpointRow | None = session.scalar(query)
    if row is None:
        raise NotFound.of("checkpoint", checkpoint_id)
    return row


def _record(row: CheckpointRow) -> CheckpointRecord:
    return record_of(CheckpointRecord, row)  # type: ignore[no-any-return]
