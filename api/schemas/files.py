"""OpenAI's FileObject, and what the row-by-row check found beside it."""

from typing import Any, Literal, Self

from pydantic import BaseModel

from jobs.spec import FileRecord, UploadPart, UploadRecord


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
            expires_at=None if record.expires_at is None else int(record.expires_at),
            filename=record.filename,
            purpose=record.purpose,
            status=record.status,
            status_details=record.report.get("summary") if record.status == "error" else None,
            sha256=record.sha256,
            format=record.format,
            rows=record.rows,
            # The errors themselves are many; they stand in the report.
            validation={k: v for k, v in record.report.items() if k != "errors"},
        )


class UploadObject(BaseModel):
    """OpenAI's Upload: a file in parts, and once it is complete the file."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None

    @classmethod
    def of(cls, record: UploadRecord) -> Self:
        """The upload as a client sees it."""
        return cls.model_validate(
            {
                "id": record.id,
                "bytes": record.bytes,
                "created_at": int(record.created_at),
                "expires_at": int(record.expires_at),
                "filename": record.filename,
                "purpose": record.purpose,
                "status": str(record.status),
                "file": FileObject.of(record.file) if record.file else None,
            }
        )


class PartObject(BaseModel):
    """OpenAI's UploadPart; `bytes` is ours."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int

    @classmethod
    def of(cls, part: UploadPart) -> Self:
        """The part as a client sees it."""
        return cls(
            id=part.id,
            created_at=int(part.created_at),
            upload_id=part.upload_id,
            bytes=part.bytes,
        )
