"""Files and models: rows that have no life of their own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from jobs.db import is_postgresql
from jobs.errors import FileInUse, InvalidCursor, ModelInUse, NotFound
from jobs.models import ChoreRow, FileRow, JobRow, ModelRow
from jobs.names import find_checkpoint
from jobs.quotas import take_storage
from jobs.receipts import Receipt, keep
from jobs.spec import FileRecord, ModelRecord, NewFile, Page
from jobs.states import ACTIVE
from jobs.transactions import Transactions


class Library(Transactions):
    """Files and models of the store."""

    def add_file(
        self,
        project: str,
        file: NewFile,
        receipt: Receipt | None = None,
        *,
        place: Callable[[], None] | None = None,
    ) -> FileRecord:
        """Register a file; `place` puts its bytes under their hash while no deletion can take them away.

        Raises:
            QuotaExceeded: the project stores too much.
            InProgress: another attempt of this request has taken over.
        """
        with self.writing() as session:
            record = insert_file(session, project, file)
            keep(session, receipt, record)
            if place is not None:
                place()
            return record

    def get_file(self, project: str, file_id: str) -> FileRecord:
        """One file. Raises NotFound."""
        with self.reading() as session:
            return file_record(_find_file(session, project, file_id))

    def list_files(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 100,
        order: str = "desc",
        purpose: str | None = None,
    ) -> Page[FileRecord]:
        """Files, newest first unless `order` is asc. Raises InvalidCursor."""
        with self.reading() as session:
            query = select(FileRow).where(FileRow.project == project)
            if purpose:
                query = query.where(FileRow.purpose == purpose)
            if after:
                try:
                    seq = _find_file(session, project, after).seq
                except NotFound as error:
                    raise InvalidCursor(f"after {after!r} names no file of this list") from error
                query = query.where(FileRow.seq < seq if order == "desc" else FileRow.seq > seq)
            query = query.order_by(FileRow.seq.desc() if order == "desc" else FileRow.seq).limit(
                limit + 1
            )
            found = [file_record(row) for row in session.scalars(query)]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def delete_file(
        self,
        project: str,
        file_id: str,
        dropping: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Forget a file and what was found out about it; `dropping` its bytes where no other file has the same.

        Raises:
            NotFound: no such file.
            FileInUse: jobs that have not ended need it.
        """
        # The bytes go after the commit, and come back where it fails.
        with ExitStack() as after, self.writing() as session:
            row = _find_file(session, project, file_id)
            lock_content(session, row.sha256)
            _refuse_used(session, project, file_id)
            session.execute(
                delete(ChoreRow).where(ChoreRow.project == project, ChoreRow.subject == file_id)
            )
            session.delete(row)
            session.flush()
            others = select(FileRow.seq).where(FileRow.sha256 == row.sha256).limit(1)
            if dropping and session.scalar(others) is None:
                after.enter_context(dropping(row.sha256))

    def settle_file(
        self, project: str, file_id: str, *, status: str, rows: int | None, report: dict[str, Any]
    ) -> FileRecord:
        """What a worker found in a file that could not be judged while it arrived. Raises NotFound."""
        with self.writing() as session:
            row = _find_file(session, project, file_id)
            if row.status == "uploaded":
                row.status, row.rows, row.report = status, rows, report
            session.flush()
            return file_record(row)

    def expired_files(self) -> list[tuple[str, str]]:
        """Project and id of files whose time is over."""
        with self.reading() as session:
            query = select(FileRow.project, FileRow.id).where(FileRow.expires_at <= time.time())
            return [(project, id) for project, id in session.execute(query.limit(100))]

    def needed_corpora(self) -> set[str]:
        """Names of the corpora that jobs which have not ended train on."""
        with self.reading() as session:
            query = select(JobRow.config["corpus"].as_string())
            paths = session.scalars(
                query.where(JobRow.status.in_(ACTIVE), JobRow.config.isnot(None))
            )
            return {Path(path).name for path in paths}

    def list_models(self, project: str) -> list[ModelRecord]:
        """All results of a project, newest first."""
        with self.reading() as session:
            query = (
                select(ModelRow).where(ModelRow.project == project).order_by(ModelRow.seq.desc())
            )
            return [_model(row) for row in session.scalars(query)]

    def get_model(self, project: str, name: str) -> ModelRecord:
        """One result, or a checkpoint, by its public name. Raises NotFound."""
        with self.reading() as session:
            found = find_checkpoint(session, project, name)
            if found is None:
                return _model(_find_model(session, project, name))
            job, checkpoint = found
            return ModelRecord(
                seq=checkpoint.seq,
                id=name,
                project=project,
                job_id=job.id,
                base=job.model,
                path=f"{checkpoint.path}/model",
                created_at=checkpoint.created_at,
            )

    def delete_model(self, project: str, name: str) -> None:
        """Forget a result; its folder is the caller's to remove.

        Raises:
            NotFound: no such result.
            ModelInUse: jobs that have not ended start from it.
        """
        with self.writing() as session:
            row = _find_model(session, project, name)
            refuse_used_model(session, project, name)
            session.delete(row)


def file_row(project: str, file: NewFile) -> FileRow:
    """The row of a file whose bytes lie in the data folder."""
    return FileRow(project=project, **dataclasses.asdict(file))


def insert_file(session: Session, project: str, file: NewFile) -> FileRecord:
    """A file's row; until the transaction ends its bytes can be put in place. Raises QuotaExceeded."""
    take_storage(session, project, file.bytes)
    lock_content(session, file.sha256)
    row = file_row(project, file)
    session.add(row)
    session.flush()
    return file_record(row)


def lock_content(session: Session, sha256: str) -> None:
    """Until the transaction ends nobody else adds or drops these bytes; SQLite has one writer anyway."""
    if is_postgresql(session):
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(sha256, 0))))


def _refuse_used(session: Session, project: str, file_id: str) -> None:
    active = select(JobRow.id, JobRow.training_file, JobRow.validation_file, JobRow.request).where(
        JobRow.project == project, JobRow.status.in_(ACTIVE)
    )
    jobs = session.execute(active)
    if users := tuple(id for id, *files in jobs if file_id in files_of(*files)):
        error = FileInUse(f"{file_id} is needed by {', '.join(users)}, which have not ended")
        error.job_ids = users
        raise error


def users_of_model(session: Session, project: str, name: str) -> tuple[str, ...]:
    """Jobs that have not ended and start from the result or checkpoint of this public name."""
    active = select(JobRow.id).where(
        JobRow.project == project, JobRow.model == name, JobRow.status.in_(ACTIVE)
    )
    return tuple(session.scalars(active))


def refuse_used_model(session: Session, project: str, name: str) -> None:
    """Raises ModelInUse where jobs that have not ended start from it."""
    if users := users_of_model(session, project, name):
        raise ModelInUse.of(users, f"{', '.join(users)}, which have not ended, start from {name}")


def files_of(training: str, validation: str | None, request: dict[str, Any]) -> list[str]:
    """Ids of all files that a job reads, its own first."""
    mix = request["sat"]["data"]["mix"]
    own = [training, *([validation] if validation else [])]
    return list(dict.fromkeys([*own, *(entry["file"] for entry in mix)]))


def _find_file(session: Any, project: str, file_id: str) -> FileRow:
    row: FileRow | None = session.scalar(
        select(FileRow).where(FileRow.project == project, FileRow.id == file_id)
    )
    if row is None:
        raise NotFound.of("file", file_id)
    return row


def _find_model(session: Any, project: str, name: str) -> ModelRow:
    row: ModelRow | None = session.scalar(
        select(ModelRow).where(ModelRow.project == project, ModelRow.id == name)
    )
    if row is None:
        raise NotFound.of("model", name)
    return row


def record_of(kind: Any, row: Any) -> Any:
    """The frozen record of a row whose columns have the record's names."""
    return kind(**{f.name: getattr(row, f.name) for f in dataclasses.fields(kind)})


def file_record(row: FileRow) -> FileRecord:
    """The record of a file's row."""
    return record_of(FileRecord, row)  # type: ignore[no-any-return]


def _model(row: ModelRow) -> ModelRecord:
    return record_of(ModelRecord, row)  # type: ignore[no-any-return]
