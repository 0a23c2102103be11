"""Files that come in parts: begun, filled, and completed into a file, cancelled, or swept after an hour.

The parts lie in the data folder under their ids and are joined once, by whoever completes; an upload becomes a file in the
transaction that makes the file's row, so completing twice gives one file. What is announced counts as stored from then
on, so that no upload is refused for its size at the end. A client may send a part again that it does not know to have
arrived: parts that are not named at the end are dropped, and what they may have together is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.errors import NotFound, PartsMismatch, QuotaExceeded, UploadClosed
from jobs.library import file_record, insert_file, record_of
from jobs.models import FileRow, UploadPartRow, UploadRow
from jobs.quotas import take_storage
from jobs.receipts import Receipt, keep
from jobs.spec import NewFile, NewUpload, UploadPart, UploadRecord, new_id
from jobs.states import UploadStatus
from jobs.transactions import Transactions

UPLOAD_SECONDS = 3600
MAX_PENDING = 100
MAX_PARTS = 10_000
# How often all parts may come: OpenAI's clients send what was not answered twice more.
SENDINGS = 3


class Uploads(Transactions):
    """Uploads of the store."""

    def create_upload(
        self, project: str, new: NewUpload, receipt: Receipt | None = None
    ) -> UploadRecord:
        """Begin. Raises QuotaExceeded, InProgress."""
        now = time.time()
        with self.writing() as session:
            pending = select(func.count()).where(
                UploadRow.project == project, UploadRow.status == UploadStatus.PENDING
            )
            count = session.scalar(pending) or 0
            if count >= MAX_PENDING:
                message = (
                    f"{count} uploads of this project are not complete; allowed are {MAX_PENDING}"
                )
                raise QuotaExceeded.of("storage_bytes", message)
            take_storage(session, project, new.bytes)
            row = UploadRow(
                id=new_id("upload_"),
                project=project,
                created_at=now,
                expires_at=now + UPLOAD_SECONDS,
                bytes=new.bytes,
                filename=new.filename,
                purpose=new.purpose,
                settings=new.settings,
                status=UploadStatus.PENDING,
            )
            session.add(row)
            session.flush()
            record = _record(session, row)
            keep(session, receipt, record)
            return record

    def get_upload(self, project: str, upload_id: str) -> UploadRecord:
        """One upload. Raises NotFound."""
        with self.reading() as session:
            return _record(session, _find(session, project, upload_id))

    def add_part(self, project: str, upload_id: str, part_id: str, size: int) -> UploadPart:
        """A part whose bytes lie in the data folder.

        Raises:
            NotFound: no such upload.
            UploadClosed: it takes no more parts.
            PartsMismatch: its parts are together far larger than the file, or too many.
        """
        with self.writing() as session:
            upload = _open(session, project, upload_id)
            count, stored = session.execute(
                select(func.count(), func.coalesce(func.sum(UploadPartRow.bytes), 0)).where(
                    UploadPartRow.upload_id == upload_id
                )
            ).one()
            most = SENDINGS * upload.bytes
            if count >= MAX_PARTS or int(stored) + size > most:
                raise PartsMismatch(
                    f"{upload_id} has {count} parts of {stored} bytes; for a file of {upload.bytes} bytes allowed are "
                    f"{MAX_PARTS} parts of {most} bytes"
                )
            row = UploadPartRow(id=part_id, upload_id=upload_id, bytes=size, created_at=time.time())
            session.add(row)
            session.flush()
            return _part(row)

    def chosen_parts(
        self, project: str, upload_id: str, part_ids: Sequence[str]
    ) -> list[UploadPart]:
        """The parts that make the file, in order.

        Raises:
            NotFound: no such upload.
            UploadClosed: it is not pending.
            PartsMismatch: a part that is not there, or twice, or not as many bytes as were announced.
        """
        with self.reading() as session:
            upload = _find(session, project, upload_id)
            _refuse_closed(upload)
            rows = session.scalars(
                select(UploadPartRow).where(UploadPartRow.upload_id == upload_id)
            )
            known = {row.id: _part(row) for row in rows}
        for at, id in enumerate(part_ids):
            if id not in known:
                raise PartsMismatch(f"part_ids.{at} {id!r} is no part of {upload_id}")
        if len(set(part_ids)) < len(part_ids):
            raise PartsMismatch("part_ids names a part twice")
        total = sum(known[id].bytes for id in part_ids)
        if total != upload.bytes:
            raise PartsMismatch(
                f"the parts have {total} bytes together; {upload.bytes} were announced"
            )
        return [known[id] for id in part_ids]

    def complete_upload(
        self, project: str, upload_id: str, file: NewFile, place: Callable[[], None]
    ) -> UploadRecord:
        """The upload is this file now. Raises NotFound, UploadClosed, QuotaExceeded."""
        with self.writing() as session:
            upload = _open(session, project, upload_id)
            # First, since a file takes the place in the quota that the upload has held.
            upload.status = UploadStatus.COMPLETED
            session.flush()
            insert_file(session, project, file)
            upload.file_id = file.id
            session.flush()
            place()
            return _record(session, upload)

    def cancel_upload(self, project: str, upload_id: str) -> UploadRecord:
        """No more parts; cancelled stays cancelled. Raises NotFound, UploadClosed."""
        with self.writing() as session:
            upload = _find(session, project, upload_id, lock=True)
            if upload.status != UploadStatus.CANCELLED:
                _refuse_closed(upload)
                upload.status = UploadStatus.CANCELLED
            session.flush()
            return _record(session, upload)

    def expire_uploads(self) -> list[str]:
        """End uploads whose time is over; their ids, for their parts to be removed."""
        with self.writing() as session:
            query = (
                select(UploadRow)
                .where(
                    UploadRow.status == UploadStatus.PENDING, UploadRow.expires_at <= time.time()
                )
                .limit(100)
                .with_for_update(skip_locked=True)
            )
            rows = list(session.scalars(query))
            for row in rows:
                row.status = UploadStatus.EXPIRED
            return [row.id for row in rows]


def _find(session: Session, project: str, upload_id: str, *, lock: bool = False) -> UploadRow:
    query = select(UploadRow).where(UploadRow.project == project, UploadRow.id == upload_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound.of("upload", upload_id)
    return row


def _open(session: Session, project: str, upload_id: str) -> UploadRow:
    row = _find(session, project, upload_id, lock=True)
    _refuse_closed(row)
    return row


def _refuse_closed(row: UploadRow) -> None:
    status = _status(row)
    if status != UploadStatus.PENDING:
        error = UploadClosed(f"{row.id} is {status}; create another upload")
        error.status = status
        raise error


def _status(row: UploadRow) -> str:
    """What is late is expired, swept or not."""
    late = row.status == UploadStatus.PENDING and row.expires_at <= time.time()
    return UploadStatus.EXPIRED if late else row.status


def _record(session: Session, row: UploadRow) -> UploadRecord:
    file = row.file_id and session.scalar(select(FileRow).where(FileRow.id == row.file_id))
    return UploadRecord(
        id=row.id,
        project=row.project,
        created_at=row.created_at,
        expires_at=row.expires_at,
        bytes=row.bytes,
        filename=row.filename,
        purpose=row.purpose,
        settings=row.settings,
        status=_status(row),
        file_id=row.file_id,
        file=file_record(file) if file else None,
    )


def _part(row: UploadPartRow) -> UploadPart:
    return record_of(UploadPart, row)  # type: ignore[no-any-return]
