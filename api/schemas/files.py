"""OpenAI's FileObject, and what the row-by-row check found beside it."""

from typing import Any, Literal, Self

from pydantic import BaseModel

from jobs.spec import FileRecord


class FileObject(BaseModel):
    """An uploaded file; `format`, `rows`, `sha256` and `validation` are ours."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str
    status_details: str | None = None
    sha256: str
    format: str | None
    rows: int | None
    validation: dict[str, Any]

    @classmethod
    def of(cls, record: FileRecord) -> Self:
        """The file as a client sees it."""
        return cls(
            id=record.id,
            bytes=record.bytes,
            created_at=int(record.created_at),
            filename=record.filename,
            purpose=record.purpose,
            status=record.status,
            sha256=record.sha256,
            format=record.format,
            rows=record.rows,
            validation=record.report,
        )
