"""What the API asks about jobs: lists by keyset, so that page one thousand costs what page one does."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import ColumnElement, Row, bindparam, func, select
from sqlalchemy.orm import Session

from jobs.errors import InvalidCursor, NotFound
from jobs.library import record_of
from jobs.models import CheckpointRow, EventRow, JobRow
from jobs.spec import CheckpointRecord, EventRecord, JobRecord, Page
from jobs.transactions import Transactions

# What `job_record` reads of a row, for those who need no JobRow: making one takes longer than the database does.
_COLUMNS = tuple(
    getattr(JobRow, name).label(name)
    for name in ("tags" if f.name == "metadata" else f.name for f in dataclasses.fields(JobRecord))
)
_JOB = select(*_COLUMNS).where(
    JobRow.project == bindparam("project"), JobRow.id == bindparam("job_id")
)


class Reads(Transactions):
    """Questions about jobs; every one is asked for a project."""

    def get_job(self, project: str, job_id: str) -> JobRecord:
        """One job. Raises NotFound."""
        with self.looking() as connection:
            row = connection.execute(_JOB, {"project": project, "job_id": job_id}).one_or_none()
        if row is None:
            raise NotFound.of("job", job_id)
        return job_record(row)

    def list_jobs(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        status: str | None = None,
    ) -> Page[JobRecord]:
        """Jobs, newest first; `metadata` must all match, and {} finds jobs without any. Raises InvalidCursor."""
        with self.reading() as session:
            query = select(*_COLUMNS).where(JobRow.project == project)
            if status:
                query = query.where(JobRow.status == status)
            if after:
                query = query.where(JobRow.seq < _cursor(session, project, after))
            if metadata is not None:
                query = query.where(*_narrowed(metadata))
            found: list[JobRecord] = []
            # What the databases make of JSON differs in its corners, so the last word on tags is ours.
            # Rows are wide: no more of them are read at a time than are asked for.
            query = query.order_by(JobRow.seq.desc())
            rows = session.execute(query.execution_options(yield_per=limit + 1))
            for row in rows:
                if metadata is None or _tagged(row.tags, metadata):
                    found.append(job_record(row))
                if len(found) > limit:
                    break
            rows.close()
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def counts_by_status(self, project: str) -> dict[str, int]:
        """How many jobs have each status."""
        with self.reading() as session:
            query = (
                select(JobRow.status, func.count())
                .where(JobRow.project == project)
                .group_by(JobRow.status)
            )
            return {row[0]: row[1] for row in session.execute(query)}

    def events(
        self,
        project: str,
        job_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> Page[EventRecord]:
        """What was told of a job. Raises NotFound, InvalidCursor."""
        with self.reading() as session:
            job_exists(session, project, job_id)
            query = select(EventRow).where(EventRow.job_id == job_id)
            if after:
                seq = session.scalar(
                    select(EventRow.seq).where(EventRow.job_id == job_id, EventRow.id == after)
                )
                if seq is None:
                    raise InvalidCursor(f"after {after!r} names no event of {job_id}")
                query = query.where(EventRow.seq < seq if newest_first else EventRow.seq > seq)
            query = query.order_by(EventRow.seq.desc() if newest_first else EventRow.seq).limit(
                limit + 1
            )
            found = [record_of(EventRecord, row) for row in session.scalars(query)]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def checkpoints(
        self, project: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[CheckpointRecord]:
        """Checkpoints, newest first. Raises NotFound, InvalidCursor."""
        with self.reading() as session:
            job_exists(session, project, job_id)
            query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
            if after:
                step = session.scalar(
                    select(CheckpointRow.step).where(
                        CheckpointRow.job_id == job_id, CheckpointRow.id == after
                    )
                )
                if step is None:
                    raise InvalidCursor(f"after {after!r} names no checkpoint of {job_id}")
                query = query.where(CheckpointRow.step < step)
            rows = session.scalars(query.order_by(CheckpointRow.step.desc()).limit(limit + 1))
            found = [record_of(CheckpointRecord, row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)


def find_job(session: Session, project: str, job_id: str) -> JobRow:
    """The row of a job of this project. Raises NotFound."""
    row = session.scalar(select(JobRow).where(JobRow.project == project, JobRow.id == job_id))
    if row is None:
        raise NotFound.of("job", job_id)
    return row


def job_exists(session: Session, project: str, job_id: str) -> None:
    """Raises NotFound where the project has no such job; cheaper than finding it."""
    query = select(JobRow.seq).where(JobRow.project == project, JobRow.id == job_id)
    if session.scalar(query) is None:
        raise NotFound.of("job", job_id)


def job_record(row: JobRow | Row[Any]) -> JobRecord:
    """The frozen record of a job's row, or of its columns."""
    values = {
        f.name: getattr(row, f.name)
        for f in dataclasses.fields(JobRecord)
        if f.name not in ("metadata", "warnings")
    }
    return JobRecord(**values, metadata=row.tags, warnings=tuple(row.warnings or ()))


def _cursor(session: Session, project: str, after: str) -> int:
    try:
        return find_job(session, project, after).seq
    except NotFound as error:
        raise InvalidCursor(f"after {after!r} names no job of this list") from error


def _narrowed(wanted: dict[str, str]) -> list[ColumnElement[bool]]:
    """Conditions that every job with these tags meets; names that a JSON path would trip over are left out."""
    if not wanted:
        return [JobRow.tags == {}]
    return [
        JobRow.tags[name].as_string() == value
        for name, value in wanted.items()
        if name.isascii() and '"' not in name and "\\" not in name
    ]


def _tagged(tags: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(tags.get(k) == v for k, v in wanted.items()) if wanted else not tags
