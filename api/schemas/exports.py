"""An export: a model on its way home, in the form asked for."""

from typing import Literal, Self

from pydantic import BaseModel

from api.downloads import FileEntry
from jobs.spec import ChoreRecord
from jobs.states import ChoreStatus

# Words for a client: a chore waits, an export is queued, as jobs are.
_QUEUED = "queued"


class ExportError(BaseModel):
    """Why an export failed."""

    code: str
    message: str
    param: str | None = None


class Export(BaseModel):
    """A model in another form; `files` once it has succeeded, to be had from its content."""

    id: str
    object: Literal["export"] = "export"
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "succeeded", "failed"]
    model: str
    format: str
    dtype: str
    files: list[FileEntry]
    bytes: int
    error: ExportError | None

    @classmethod
    def of(cls, chore: ChoreRecord) -> Self:
        """The export as a client sees it."""
        files = [FileEntry(**entry) for entry in (chore.result or {}).get("files", [])]
        return cls.model_validate(
            {
                "id": chore.id,
                "created_at": int(chore.created_at),
                "finished_at": None if chore.finished_at is None else int(chore.finished_at),
                "status": _QUEUED if chore.status == ChoreStatus.WAITING else chore.status,
                "model": chore.subject,
                "format": chore.params["target"],
                "dtype": chore.params["dtype"],
                "files": files,
                "bytes": sum(entry.bytes for entry in files),
                "error": chore.error,
            }
        )
