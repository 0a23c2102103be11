"""The report on a file and its preview, as clients see them."""

from typing import Any, Literal, Self

from pydantic import BaseModel

from jobs.spec import ChoreRecord, FileRecord


class Fault(BaseModel):
    """One error of a file; `line` is 1-based, `pointer` is RFC 6901 inside the row."""

    line: int
    byte_offset: int
    pointer: str
    code: str
    message: str
    excerpt: str


class RowTokens(BaseModel):
    """Tokens in a row: the median, the 95th percentile, and the longest."""

    p50: int
    p95: int
    max: int


class TokenFigures(BaseModel):
    """Tokens before rows are cut, and those that would carry loss; `histogram` in classes that double."""

    total: int
    trained: int
    per_row: RowTokens
    histogram: list[dict[Literal["from", "to", "rows"], int]]


class Overlap(BaseModel):
    """Rows of this file that stand in another one too."""

    file_id: str
    rows: int


class Failure(BaseModel):
    """Why no report could be made."""

    code: str
    message: str
    param: str | None = None


class FileValidation(BaseModel):
    """The verdict on a file. What needs a model is null without one, what a worker finds is null while it is `pending`."""

    object: Literal["file.validation"] = "file.validation"
    file_id: str
    status: Literal["pending", "valid", "valid_with_warnings", "invalid", "failed"]
    model: str | None
    filename: str
    format: str | None
    encoding: str | None
    bytes: int
    sha256: str
    rows: int | None
    error_count: int
    errors: list[Fault]
    has_more: bool
    warnings: list[str]
    duplicates: int | None = None
    overlap_with: Overlap | None = None
    roles: dict[str, int] | None = None
    seq_len: int | None = None
    tokens: TokenFigures | None = None
    truncated_rows: int | None = None
    truncated_tokens: int | None = None
    empty_targets: int | None = None
    suggestions: list[str] | None = None
    error: Failure | None = None

    @classmethod
    def of(
        cls, file: FileRecord, chore: ChoreRecord | None, *, model: str | None, against: str | None
    ) -> Self:
        """What is known by now: the file's own report, and the chore's where it has ended."""
        found: dict[str, Any] = dict(chore.result or {}) if chore else {}
        known = {**file.report, **found}
        errors = known.get("errors", [])
        count = known.get("error_count", 0)
        shared = found.get("overlap_rows")
        # Of a file that no worker could judge, its own report holds the reason.
        error = chore.error if chore else file.report.get("error")
        if not chore and not error and file.report.get("status") == "failed":
            # An earlier release kept the words alone.
            error = {"code": "internal_error", "message": str(file.report.get("summary"))}
        # The worker's report uses the same names; its `format` is that of the report itself.
        extra = {name: found[name] for name in cls.model_fields if name in found}
        if count:
            status = "invalid"
        elif error:
            status = "failed"
        elif not found:
            status = "pending"
        else:
            status = "valid_with_warnings" if known["warnings"] else "valid"
        return cls.model_validate(
            {
                "file_id": file.id,
                "model": model,
                "filename": file.filename,
                "encoding": known.get("encoding"),
                "bytes": file.bytes,
                "sha256": file.sha256,
                "rows": known.get("rows"),
                "warnings": known.get("warnings", []),
                **extra,
                "format": found.get("file_format", file.format),
                "status": status,
                "errors": errors,
                "error_count": count,
                "has_more": count > len(errors),
                "overlap_with": None
                if against is None or shared is None
                else {"file_id": against, "rows": shared},
                "error": error,
            }
        )


class Span(BaseModel):
    """Tokens `start` to `end` (excluded) that share one fate."""

    start: int
    end: int
    kind: Literal["trained", "masked", "truncated"]
    text: str


class PreviewRow(BaseModel):
    """One row as the model sees it; the spans cover all tokens in order."""

    row: int
    format: str
    text: str
    ids: list[int]
    tokens: list[str]
    spans: list[Span]


class FilePreview(BaseModel):
    """The first rows of a file as tokens; `error` says why there are none."""

    object: Literal["file.preview"] = "file.preview"
    file_id: str
    model: str
    status: Literal["pending", "ready", "failed"]
    rows: list[PreviewRow]
    error: Failure | None = None

    @classmethod
    def of(cls, file: FileRecord, chore: ChoreRecord, model: str) -> Self:
        """What is known by now."""
        status = {"succeeded": "ready", "failed": "failed"}.get(chore.status, "pending")
        return cls.model_validate(
            {
                "file_id": file.id,
                "model": model,
                "status": status,
                "rows": (chore.result or {}).get("rows", []),
                "error": chore.error,
            }
        )
