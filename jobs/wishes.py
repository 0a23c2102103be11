"""What people want of a job: cancel, pause, resume.

A job that nobody holds obeys at once. One that is held is asked: `desired` is read by its owner at the next heartbeat, the
child finishes its step and writes a checkpoint, and the release does what is wanted (`moves.obey`). All three are
idempotent in effect, because clients send a POST again when its answer was lost: asking for what is already so changes
nothing. A resume that overtakes a pause withdraws it: the job then only takes the way through the queue.
"""

from __future__ import annotations

from jobs.errors import JobNotPausable, JobTerminal
from jobs.models import JobRow
from jobs.moves import end, locked, move, obey, tell
from jobs.reads import find_job, job_record
from jobs.spec import JobRecord
from jobs.states import TERMINAL, Desired, Status
from jobs.transactions import Transactions


class Wishes(Transactions):
    """Wishes for the jobs of the store."""

    def cancel_job(self, project: str, job_id: str) -> JobRecord:
        """Cancel at once where nobody works on it, else ask its owner; cancelled stays cancelled.

        Raises:
            NotFound: no such job.
            JobTerminal: it has succeeded or failed.
        """
        with self.writing() as session:
            row = locked(session, find_job(session, project, job_id))
            if row.status != Status.CANCELLED:
                _refuse_ended(row, "cancelled")
            if row.status != Status.CANCELLED and row.owner is None:
                row.desired = Desired.CANCEL
                end(session, row, Status.CANCELLED, "by_user", "Cancelled")
            elif row.status != Status.CANCELLED and row.desired != Desired.CANCEL:
                row.desired = Desired.CANCEL
                tell(session, row, "cancelling", "Cancelling: the current step ends first")
            session.flush()
            return job_record(row)

    def pause_job(self, project: str, job_id: str) -> JobRecord:
        """Pause at once where nobody works on it, else after its current step and a checkpoint.

        Raises:
            NotFound: no such job.
            JobTerminal: it has ended.
            JobNotPausable: it is being cancelled.
        """
        with self.writing() as session:
            row = locked(session, find_job(session, project, job_id))
            _refuse(row, "paused")
            if row.status != Status.PAUSED and row.desired != Desired.PAUSE:
                row.desired = Desired.PAUSE
                if row.owner is None:
                    obey(session, row)
                else:
                    tell(session, row, "pausing", "Pausing: the current step ends first")
            session.flush()
            return job_record(row)

    def resume_job(self, project: str, job_id: str) -> JobRecord:
        """Let a paused job wait for a slot again; it goes on from its newest checkpoint.

        Raises:
            NotFound: no such job.
            JobTerminal: it has ended.
            JobNotPausable: it is being cancelled.
        """
        with self.writing() as session:
            row = locked(session, find_job(session, project, job_id))
            _refuse(row, "resumed")
            if row.status == Status.PAUSED:
                row.desired, row.not_before = Desired.RUN, 0.0
                if row.config is None:
                    move(row, Status.VALIDATING_FILES)
                    tell(session, row, "waiting_for_worker", "Resumed; waiting for a worker")
                else:
                    move(row, Status.QUEUED)
                    tell(session, row, "waiting_for_gpu", "Resumed; waiting for a free slot")
            elif row.desired == Desired.PAUSE:
                row.desired = Desired.RUN
                tell(session, row, "resuming", "Resumed before the pause was complete")
            session.flush()
            return job_record(row)


def _refuse(row: JobRow, wish: str) -> None:
    _refuse_ended(row, wish)
    if row.desired == Desired.CANCEL:
        error = JobNotPausable(f"{row.id} is being cancelled; it cannot be {wish}")
        error.status = row.status
        raise error


def _refuse_ended(row: JobRow, wish: str) -> None:
    if row.status in TERMINAL:
        error = JobTerminal(f"{row.id} has {_has(row.status)}; an ended job cannot be {wish}")
        error.status = row.status
        raise error


def _has(status: str) -> str:
    return "been cancelled" if status == Status.CANCELLED else status
