"""Chores: small pieces of work without a job, done in a worker's CPU slot; a file's token report, a preview.

A chore is asked for by what it is about: (project, kind, subject, params) names one row, so asking twice is asking once,
and its result is kept until its subject goes. The rules are those of jobs: the row is the truth and the bell only wakes, a
claim raises `attempt` and takes a lease that is judged by observation, every later write carries attempt and owner in its
WHERE. What differs is the end: a child that crashes fails its chore at once, because its input is a stranger's and the
next try would crash too; only a lost worker is tried again. A chat is the chore that does not end by itself: while a
model answers, its row's `result` says where, and the row goes with it. The road not taken is a job of another kind:
jobs have events, checkpoints and pauses, and none of that is wanted here.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.base import storable
from jobs.errors import InvalidCursor, LeaseLost, NotFound, QuotaExceeded
from jobs.library import record_of
from jobs.models import ChoreRow
from jobs.receipts import Receipt, keep
from jobs.spec import ChoreRecord, Lease, Page, new_id
from jobs.states import ChoreStatus
from jobs.transactions import Transactions

CHORE_PREFIX = "chore_"
# The kind whose work is a model that answers. It takes a slot of those that train; all other kinds take a CPU slot.
CHAT = "chat"
# A failure is an answer too, but one that may be out of date: asked for again after this, the work is tried again.
RETRY_FAILED_SECONDS = 30
MAX_WAITING = 200


class Chores(Transactions):
    """Chores of the store."""

    def ask_chore(
        self,
        project: str,
        kind: str,
        subject: str,
        params: dict[str, Any] | None = None,
        receipt: Receipt | None = None,
    ) -> ChoreRecord:
        """The chore of this name, made if nobody has asked for it; ring the bell after one that waits.

        Args:
            project: whose it is.
            kind: what is to be done; `worker.kinds` knows how.
            subject: id of what it is about, such as a file.
            params: everything else that decides the result, versions of its inputs included.
            receipt: of the request that asks, where its answer is kept.

        Raises:
            QuotaExceeded: too many chores of the project wait.
            InProgress: another attempt of this request has taken over.
        """
        try:
            return self._ask(project, kind, subject, params or {}, receipt)
        except IntegrityError:
            # Another request for the same committed between our look and our insert.
            return self._ask(project, kind, subject, params or {}, receipt)

    def _ask(
        self, project: str, kind: str, subject: str, params: dict[str, Any], receipt: Receipt | None
    ) -> ChoreRecord:
        name = _fingerprint(project, kind, subject, params)
        query = select(ChoreRow).where(ChoreRow.fingerprint == name)
        with self.reading() as session:
            found = session.scalar(query)
            if receipt is None and found is not None and not _stale(found):
                return _record(found)
        with self.writing() as session:
            row = session.scalar(query.with_for_update())
            if row is not None:
                if _stale(row):
                    row.status, row.failures = ChoreStatus.WAITING, 0
                    row.error = row.finished_at = None
                    session.flush()
                record = _record(row)
                keep(session, receipt, record)
                return record
            _take_place(session, project)
            row = ChoreRow(
                id=new_id(CHORE_PREFIX),
                project=project,
                kind=kind,
                subject=subject,
                params=params,
                fingerprint=name,
                status=ChoreStatus.WAITING,
                created_at=time.time(),
            )
            session.add(row)
            session.flush()
            record = _record(row)
            keep(session, receipt, record)
            return record

    def find_chore(
        self, project: str, kind: str, subject: str, params: dict[str, Any]
    ) -> ChoreRecord | None:
        """The chore of this name, where somebody has asked for it."""
        name = _fingerprint(project, kind, subject, params)
        with self.reading() as session:
            row = session.scalar(select(ChoreRow).where(ChoreRow.fingerprint == name))
            return _record(row) if row is not None else None

    def get_chore(self, project: str, chore_id: str) -> ChoreRecord:
        """One chore. Raises NotFound."""
        with self.reading() as session:
            row = session.scalar(
                select(ChoreRow).where(ChoreRow.project == project, ChoreRow.id == chore_id)
            )
            if row is None:
                raise NotFound.of("chore", chore_id)
            return _record(row)

    def list_chores(
        self, project: str, kind: str, *, after: str | None = None, limit: int = 20
    ) -> Page[ChoreRecord]:
        """Chores of a kind, newest first. Raises InvalidCursor."""
        mine = (ChoreRow.project == project, ChoreRow.kind == kind)
        with self.reading() as session:
            query = select(ChoreRow).where(*mine)
            if after:
                seq = session.scalar(select(ChoreRow.seq).where(*mine, ChoreRow.id == after))
                if seq is None:
                    raise InvalidCursor(f"after {after!r} names no {kind} of this list")
                query = query.where(ChoreRow.seq < seq)
            rows = session.scalars(query.order_by(ChoreRow.seq.desc()).limit(limit + 1))
            found = [_record(row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def delete_chore(self, project: str, chore_id: str) -> None:
        """Drop one, with what it has found; whoever works on it is fenced off."""
        with self.writing() as session:
            query = select(ChoreRow).where(ChoreRow.project == project, ChoreRow.id == chore_id)
            if (row := session.scalar(query)) is not None:
                session.delete(row)

    def withdraw_chore(self, project: str, chore_id: str) -> None:
        """Drop one that nobody has begun with."""
        with self.writing() as session:
            session.execute(
                delete(ChoreRow).where(
                    ChoreRow.project == project,
                    ChoreRow.id == chore_id,
                    ChoreRow.status == ChoreStatus.WAITING,
                )
            )

    def claim_chore(self, worker_id: str, *, chat: bool = False) -> ChoreRecord | None:
        """Take a waiting chat, or else chore; None where none is.

        Of the project that has the fewest in work, then of the one that was served longest ago, the oldest.
        """
        served = (
            select(
                ChoreRow.project,
                func.count().filter(ChoreRow.status == ChoreStatus.RUNNING).label("running"),
                func.max(ChoreRow.started_at).label("last_at"),
            )
            .where((ChoreRow.kind == CHAT) == chat)
            .group_by(ChoreRow.project)
            .subquery()
        )
        with self.writing() as session:
            query = (
                select(ChoreRow)
                .join(served, served.c.project == ChoreRow.project)
                .where(ChoreRow.status == ChoreStatus.WAITING, (ChoreRow.kind == CHAT) == chat)
                .order_by(served.c.running, func.coalesce(served.c.last_at, 0), ChoreRow.seq)
                .limit(1)
            )
            row = session.scalar(query.with_for_update(of=ChoreRow, skip_locked=True))
            if row is None:
                return None
            row.owner, row.attempt, row.heartbeat_seq = worker_id, row.attempt + 1, 0
            row.status, row.started_at = ChoreStatus.RUNNING, time.time()
            session.flush()
            return _record(row)

    def beat_chore(self, claim: ChoreRecord) -> None:
        """Renew the lease. Raises LeaseLost."""
        with self.writing() as session:
            _fenced(session, claim)

    def publish_chore(self, claim: ChoreRecord, result: dict[str, Any]) -> None:
        """What is to be known while the work goes on. Raises LeaseLost."""
        with self.writing() as session:
            _fenced(session, claim).result = result

    def finish_chore(self, claim: ChoreRecord, result: dict[str, Any]) -> None:
        """The chore is done, with this result. Raises LeaseLost."""
        with self.writing() as session:
            _end(_fenced(session, claim), ChoreStatus.SUCCEEDED, result=storable(result))

    def fail_chore(self, claim: ChoreRecord, error: dict[str, Any]) -> None:
        """The chore has failed; `error` holds code, message and param. Raises LeaseLost."""
        with self.writing() as session:
            _end(_fenced(session, claim), ChoreStatus.FAILED, error=storable(error))

    def release_chore(self, claim: ChoreRecord) -> None:
        """Give a chore back unharmed: its worker ends. Raises LeaseLost."""
        with self.writing() as session:
            row = _fenced(session, claim)
            row.status, row.owner = ChoreStatus.WAITING, None

    def chore_leases(self) -> list[Lease]:
        """Every held chore as it stands, for a watcher to compare with what it saw before."""
        with self.reading() as session:
            query = select(
                ChoreRow.id, ChoreRow.attempt, ChoreRow.heartbeat_seq, ChoreRow.owner
            ).where(ChoreRow.status == ChoreStatus.RUNNING)
            return [
                Lease(job_id=id, attempt=attempt, heartbeat_seq=beat, owner=owner or "")
                for id, attempt, beat, owner in session.execute(query)
            ]

    def expire_chore(self, lease: Lease, *, max_failures: int) -> bool:
        """Take back a chore whose lease stood still; False where it has moved since."""
        fence = (
            ChoreRow.id == lease.job_id,
            ChoreRow.attempt == lease.attempt,
            ChoreRow.heartbeat_seq == lease.heartbeat_seq,
            ChoreRow.owner == lease.owner,
            ChoreRow.status == ChoreStatus.RUNNING,
        )
        with self.writing() as session:
            row = session.scalar(select(ChoreRow).where(*fence).with_for_update())
            if row is None:
                return False
            if row.kind == CHAT:
                # Whoever still asks for it asks anew.
                session.delete(row)
                return True
            row.failures += 1
            row.status, row.owner = ChoreStatus.WAITING, None
            if row.failures >= max_failures:
                message = f"Worker {lease.owner} was lost; it was tried {row.failures} times."
                error = {"code": "worker_lost", "message": message, "param": None}
                _end(row, ChoreStatus.FAILED, error=error)
            return True

    def chores_waiting(self, kind: str | None = None) -> int:
        """Chores that could be claimed now, all or those of a kind."""
        with self.reading() as session:
            query = select(func.count()).where(ChoreRow.status == ChoreStatus.WAITING)
            if kind is not None:
                query = query.where(ChoreRow.kind == kind)
            return session.scalar(query) or 0


def _fingerprint(project: str, kind: str, subject: str, params: dict[str, Any]) -> str:
    content = json.dumps([project, kind, subject, params], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _take_place(session: Session, project: str) -> None:
    waiting = session.scalar(
        select(func.count()).where(
            ChoreRow.project == project, ChoreRow.status == ChoreStatus.WAITING
        )
    )
    if (waiting or 0) >= MAX_WAITING:
        message = f"{waiting} small pieces of work of this project wait; allowed are {MAX_WAITING}"
        raise QuotaExceeded.of("queued_jobs", message)


def _stale(row: ChoreRow) -> bool:
    return (
        row.status == ChoreStatus.FAILED
        and time.time() - (row.finished_at or 0.0) > RETRY_FAILED_SECONDS
    )


def _fenced(session: Session, claim: ChoreRecord) -> ChoreRow:
    """The claimed row, locked, its lease renewed. Raises LeaseLost."""
    fence = (
        ChoreRow.id == claim.id,
        ChoreRow.attempt == claim.attempt,
        ChoreRow.owner == claim.owner,
        ChoreRow.status == ChoreStatus.RUNNING,
    )
    row = session.scalar(select(ChoreRow).where(*fence).with_for_update())
    if row is None:
        raise LeaseLost(
            f"{claim.id}: attempt {claim.attempt} of {claim.owner} is no longer the newest"
        )
    row.heartbeat_seq += 1
    return row


def _end(
    row: ChoreRow,
    status: ChoreStatus,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> None:
    row.status, row.owner, row.finished_at = status, None, time.time()
    row.result, row.error = result, error


def _record(row: ChoreRow) -> ChoreRecord:
    return record_of(ChoreRecord, row)  # type: ignore[no-any-return]
