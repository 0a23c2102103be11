"""Every change of a job's state: one conditional UPDATE that names the states it may leave, and an event beside it.

A claim raises `attempt`; each later write of a worker names attempt and owner in its WHERE, so that whoever holds an older
claim changes nothing and is told so (LeaseLost). A lease is judged by whoever watches: it is lost when its heartbeat
counter has not moved for the lease time on the watcher's own monotonic clock. The road not taken is an expiry time in the
row: clocks of two machines, or one clock that is set, would take back living jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from jobs.base import storable
from jobs.chores import Chores
from jobs.integrations import Integrations, add_integrations
from jobs.library import Library, file_row, lock_content
from jobs.measures import Measures
from jobs.models import AttemptRow, JobRow, ModelRow
from jobs.moves import (
    LACKED_MEMORY,
    count_failure,
    end,
    fail_row,
    fenced,
    give_back,
    move,
    obey,
    tell,
)
from jobs.pins import Pins
from jobs.pulses import Pulses
from jobs.quotas import in_turn, may_start, take_queue_place
from jobs.quotes import Quotes
from jobs.reads import Reads, job_record
from jobs.receipts import Receipt, Receipts, keep
from jobs.recording import add_event, apply
from jobs.reports import Reports
from jobs.roster import Roster
from jobs.secrets import Secrets
from jobs.spec import Claim, JobRecord, Lease, NewFile, NewJob, new_id
from jobs.states import HELD, WAITING, Desired, Stage, Status
from jobs.tenants import Tenants
from jobs.uploads import Uploads
from jobs.waiting import Waiting
from jobs.webhooks import Webhooks
from jobs.wishes import Wishes

_PRIORITIES = {"low": -1, "normal": 0, "high": 1}


class Store(
    Library,
    Reads,
    Reports,
    Measures,
    Roster,
    Tenants,
    Receipts,
    Webhooks,
    Chores,
    Wishes,
    Pins,
    Pulses,
    Waiting,
    Uploads,
    Quotes,
    Integrations,
    Secrets,
):
    """The job store. One method is one transaction."""

    def create_job(self, project: str, new: NewJob, receipt: Receipt | None = None) -> JobRecord:
        """Accept a job.

        Raises:
            QuotaExceeded: the project has too many jobs waiting.
            InProgress: the receipt was taken over by another attempt.
        """
        now = time.time()
        with self.writing() as session:
            take_queue_place(session, project)
            row = JobRow(
                id=new_id("ftjob-"),
                project=project,
                created_at=now,
                model=new.model,
                suffix=new.suffix,
                seed=new.seed,
                training_file=new.training_file,
                validation_file=new.validation_file,
                tags=new.metadata,
                request=new.request,
                **_needs(new.request["sat"]),
                integrations=list(new.integrations),
                status=Status.VALIDATING_FILES,
                detail_state="waiting_for_worker",
                detail_message="Waiting for a worker to read the files",
                detail_since=now,
                warnings=[],
            )
            session.add(row)
            session.flush()
            add_integrations(session, row)
            add_event(
                session, row.id, "Job accepted", data={"state": row.detail_state}, created_at=now
            )
            session.flush()
            record = job_record(row)
            keep(session, receipt, record)
            return record

    def claim(
        self, worker_id: str, stage: Stage, hardware: Mapping[str, Any] | None = None
    ) -> Claim | None:
        """Take the job whose turn it is (`quotas.in_turn`) and that can train on `hardware`; None where there is none."""
        now = time.time()
        with self.writing() as session:
            query = in_turn(select(JobRow).where(*_claimable(stage)), stage, hardware).limit(1)
            row = session.scalar(query.with_for_update(of=JobRow, skip_locked=True))
            # The limit was read before the row was locked: two workers may have read the same.
            if row is None or not may_start(session, row.project, stage):
                return None
            row.owner, row.attempt, row.heartbeat_seq = worker_id, row.attempt + 1, 0
            move(row, HELD[stage])
            row.started_at = row.started_at or now
            session.add(
                AttemptRow(
                    job_id=row.id,
                    attempt=row.attempt,
                    stage=stage,
                    worker_id=worker_id,
                    started_at=now,
                )
            )
            tell(
                session,
                row,
                "starting",
                f"Worker {worker_id} starts to {stage}",
            )
            session.flush()
            earlier = session.scalars(
                select(AttemptRow)
                .where(
                    AttemptRow.job_id == row.id,
                    AttemptRow.stage == stage,
                    AttemptRow.attempt < row.attempt,
                )
                .order_by(AttemptRow.attempt)
            ).all()
            return Claim(
                job=job_record(row),
                attempt=row.attempt,
                stage=stage,
                worker_id=worker_id,
                read={a.attempt: a.read_position for a in earlier},
                seconds=sum(a.ended_at - a.started_at for a in earlier if a.ended_at is not None),
                memory_lacks=sum(a.outcome == LACKED_MEMORY for a in earlier),
            )

    def heartbeat(self, claim: Claim) -> Desired:
        """Renew the lease; what people want of the job. Raises LeaseLost."""
        with self.writing() as session:
            return Desired(fenced(session, claim).desired)

    def record(
        self,
        claim: Claim,
        events: list[dict[str, Any]],
        *,
        run: str,
        read_position: int,
        attempt: int | None = None,
    ) -> Desired:
        """Write a run's events, move the read position, renew the lease: all or nothing.

        Args:
            claim: whose run it is.
            events: complete lines of events.jsonl, in order, each told once.
            run: run folder, relative to the data folder.
            read_position: bytes of events.jsonl read so far.
            attempt: whose events they are, where it was an earlier one's.

        Raises:
            LeaseLost: nothing was written.
        """
        with self.writing() as session:
            row = fenced(session, claim)
            number = claim.attempt if attempt is None else attempt
            apply(session, row, number, run, storable(events))
            row.version += bool(events)
            told = session.get_one(AttemptRow, (claim.job_id, number))
            told.read_position = read_position
            told.read_seq = events[-1]["seq"] if events else told.read_seq
            return Desired(row.desired)

    def spent(self, claim: Claim, joules: float) -> None:
        """What the GPUs of a run that has ended spent on it. Raises LeaseLost."""
        with self.writing() as session:
            fenced(session, claim)
            session.get_one(AttemptRow, (claim.job_id, claim.attempt)).energy_joules = joules

    def finish_prepare(self, claim: Claim, prepared: dict[str, Any]) -> None:
        """Freeze the resolved configuration on the job, which then waits for a GPU slot. Raises LeaseLost."""
        with self.writing() as session:
            row = fenced(session, claim)
            row.config, row.hyperparameters = prepared["config"], prepared["hyperparameters"]
            row.figures, row.total_steps = prepared["figures"], prepared["total_steps"]
            row.quote = prepared.get("quote")
            row.warnings = list(prepared["warnings"])
            for warning in row.warnings:
                add_event(session, row.id, warning, kind="message", level="warn")
            self._end_attempt(session, claim, "prepared")
            row.owner = None
            move(row, Status.QUEUED)
            if not obey(session, row):
                tell(session, row, "waiting_for_gpu", "Waiting for a free slot to train in")

    def finish_train(
        self,
        claim: Claim,
        *,
        model: str,
        path: str,
        summary: dict[str, Any],
        table: NewFile | None = None,
        place: Callable[[], None] | None = None,
    ) -> None:
        """The job has succeeded: name and folder of its model, what was measured, the file of its metrics.

        `place` puts that file's bytes under their hash.

        Raises:
            LeaseLost: nothing was written.
        """
        with self.writing() as session:
            row = fenced(session, claim)
            self._end_attempt(session, claim, "succeeded")
            row.fine_tuned_model, row.summary = model, storable(summary)
            if table is not None:
                lock_content(session, table.sha256)
                session.add(file_row(row.project, table))
                row.result_file = table.id
            row.trained_tokens = summary.get("trained_tokens", row.trained_tokens)
            session.add(
                ModelRow(
                    id=model,
                    project=row.project,
                    job_id=row.id,
                    base=row.model,
                    path=path,
                    created_at=time.time(),
                )
            )
            end(session, row, Status.SUCCEEDED, "done", f"Succeeded: {model}")
            session.flush()
            if place is not None:
                place()

    def fail(self, claim: Claim, error: dict[str, Any]) -> None:
        """The job has failed for a reason that trying again does not mend. Raises LeaseLost."""
        with self.writing() as session:
            row = fenced(session, claim)
            self._end_attempt(session, claim, "failed")
            fail_row(session, row, storable(error))

    def release(self, claim: Claim, reason: str) -> None:
        """Give a job back unharmed: its worker ends, or a stop was asked for. Not counted as a failure.

        Raises:
            LeaseLost: nothing was written.
        """
        with self.writing() as session:
            row = fenced(session, claim)
            self._end_attempt(session, claim, "released")
            give_back(session, row, claim.stage, reason, level="info")

    def crash(
        self,
        claim: Claim,
        error: dict[str, Any],
        *,
        max_failures: int,
        retry_seconds: float,
        outcome: str = "crashed",
    ) -> None:
        """A run died without a reason of the user's: try again, a counted number of times. Raises LeaseLost."""
        with self.writing() as session:
            row = fenced(session, claim)
            self._end_attempt(session, claim, outcome)
            count_failure(
                session,
                row,
                claim.stage,
                storable(error),
                max_failures=max_failures,
                retry_seconds=retry_seconds,
            )

    def leases(self) -> list[Lease]:
        """Every held job as it stands, for a watcher to compare with what it saw before."""
        with self.reading() as session:
            query = select(JobRow.id, JobRow.attempt, JobRow.heartbeat_seq, JobRow.owner).where(
                JobRow.owner.isnot(None)
            )
            return [
                Lease(job_id=job, attempt=attempt, heartbeat_seq=beat, owner=owner or "")
                for job, attempt, beat, owner in session.execute(query)
            ]

    def expire(self, lease: Lease, *, max_failures: int, retry_seconds: float) -> bool:
        """Take back a job whose lease stood still; False where it has moved since."""
        with self.writing() as session:
            fence = (
                JobRow.id == lease.job_id,
                JobRow.attempt == lease.attempt,
                JobRow.heartbeat_seq == lease.heartbeat_seq,
                JobRow.owner == lease.owner,
            )
            row = session.scalar(select(JobRow).where(*fence).with_for_update())
            if row is None:
                return False
            attempt = session.get_one(AttemptRow, (row.id, row.attempt))
            attempt.ended_at, attempt.outcome = time.time(), "lost"
            error = {
                "code": "worker_lost",
                "message": f"Worker {lease.owner} was lost",
                "param": None,
            }
            stage = Stage(attempt.stage)
            count_failure(
                session, row, stage, error, max_failures=max_failures, retry_seconds=retry_seconds
            )
            return True

    def waiting(self, stage: Stage) -> int:
        """Jobs of a stage that could be claimed now."""
        with self.reading() as session:
            query = select(func.count()).select_from(JobRow).where(*_claimable(stage))
            return session.scalar(query) or 0

    def slot_wanted(self, stage: Stage, hardware: Mapping[str, Any] | None = None) -> bool:
        """Whether a job waits for nothing but a slot on `hardware`; one beyond the limit of its project does not."""
        with self.reading() as session:
            query = in_turn(select(JobRow).where(*_claimable(stage)), stage, hardware).limit(1)
            return session.scalar(query) is not None

    def _end_attempt(self, session: Session, claim: Claim, outcome: str) -> None:
        attempt = session.get_one(AttemptRow, (claim.job_id, claim.attempt))
        attempt.ended_at, attempt.outcome = time.time(), outcome


def _needs(sat: Mapping[str, Any]) -> dict[str, Any]:
    """What the queue goes by, out of a request's settings."""
    device, gib = sat["resources"]["device"], sat["resources"]["min_memory_gib"]
    return {
        "priority": _PRIORITIES[sat["priority"]],
        "needs_device": None if device == "any" else device,
        "needs_memory": None if gib is None else int(gib * 2**30),
    }


def _claimable(stage: Stage) -> tuple[ColumnElement[bool], ...]:
    """What is true of a job that waits for a claim and may have one now, its project's limit left aside."""
    return (
        JobRow.status == WAITING[stage],
        JobRow.owner.is_(None),
        JobRow.desired == Desired.RUN,
        JobRow.not_before <= time.time(),
    )
