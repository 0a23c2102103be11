"""`/v1/files`: upload, list, retrieve, content, delete."""

import re
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from api import once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas.files import FileObject
from api.schemas.lists import After, Deleted, ListOf, Order
from api.schemas.problems import answers
from api.uploads import FORMATS, Received, keep, receiving, too_large
from jobs.receipts import Receipt
from jobs.spec import FileRecord, NewFile, new_id

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(require_key)])

# Chunks from the socket are small; a thread hop for each would cost more than the work in it.
FEED_BYTES = 1 << 20
MAX_PROBLEMS_SHOWN = 100
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"const": "fine-tune"},
                        "sat[format]": {"enum": list(FORMATS), "default": "auto"},
                        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post(
    "",
    operation_id="createFile",
    openapi_extra=FORM,
    responses=answers(
        "dataset_invalid",
        "unsupported_purpose",
        "unknown_parameter",
        "missing_required_parameter",
        "file_too_large",
        "unsupported_media_type",
        "storage_quota_exceeded",
        *once.CODES,
    ),
    response_model=FileObject,
)
async def create_file(request: Request, app: App, key: Caller, creating: once.Creating) -> Any:
    """Upload a data set; every row is checked while it arrives, and a file with a bad row is refused."""
    limit = app.settings.max_file_bytes
    length = request.headers.get("content-length", "")
    # The form around the file is small; what is clearly too long need not be read.
    if length.isdigit() and int(length) > limit + FEED_BYTES:
        raise too_large(limit)
    with receiving(app.artifacts.files, request.headers.get("content-type", ""), limit) as upload:
        waiting = bytearray()
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= FEED_BYTES:
                await run_in_threadpool(upload.feed, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(upload.feed, bytes(waiting))
        received = await run_in_threadpool(upload.finish)
        sent = [received.sha256, received.filename, received.purpose, received.report.format]
        return await creating.run(
            once.fingerprint(sent),
            lambda receipt: _register(app, key.project, received, receipt),
            FileObject.of,
            location=router.prefix,
        )


def _register(app: Services, project: str, received: Received, receipt: Receipt) -> FileRecord:
    report = received.report
    if not report.ok:
        raise ApiError(
            "dataset_invalid",
            report.summary(received.filename),
            "file",
            problems=[asdict(problem) for problem in report.problems[:MAX_PROBLEMS_SHOWN]],
        )
    file_id = new_id("file-")
    target = app.artifacts.file(file_id)
    keep(received, target)
    try:
        return app.store.add_file(
            project,
            NewFile(
                id=file_id,
                filename=received.filename,
                purpose=received.purpose,
                bytes=received.bytes,
                sha256=received.sha256,
                format=report.format,
                rows=report.rows,
                report=_verdict(received),
            ),
            receipt,
        )
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _verdict(received: Received) -> dict[str, Any]:
    report = received.report
    return {
        "status": "valid_with_warnings" if report.warnings else "valid",
        "format": report.format,
        "rows": report.rows,
        "warnings": list(report.warnings),
    }


@router.get("", operation_id="listFiles", responses=answers("invalid_value", "invalid_cursor"))
def list_files(
    app: App,
    key: Caller,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    purpose: Annotated[str | None, Query()] = None,
) -> ListOf[FileObject]:
    """Files of the key's project."""
    page = app.store.list_files(key.project, after=after, limit=limit, order=order, purpose=purpose)
    return ListOf[FileObject].of([FileObject.of(f) for f in page.items], has_more=page.has_more)


@router.get("/{file_id}", operation_id="retrieveFile", responses=answers("file_not_found"))
def retrieve_file(file_id: str, app: App, key: Caller) -> FileObject:
    """One file."""
    return FileObject.of(app.store.get_file(key.project, file_id))


@router.get(
    "/{file_id}/content",
    operation_id="downloadFile",
    response_class=FileResponse,
    responses=answers("file_not_found", "range_not_satisfiable"),
)
def download_file(
    file_id: str,
    app: App,
    key: Caller,
    wanted: Annotated[str | None, Header(alias="range")] = None,
) -> FileResponse:
    """The bytes as uploaded; ranges are served."""
    record = app.store.get_file(key.project, file_id)
    first = re.fullmatch(r"bytes=(\d+)-\d*", wanted or "")
    if first and int(first[1]) >= record.bytes:
        raise ApiError(
            "range_not_satisfiable",
            f"The file has {record.bytes} bytes; {wanted} begins after its end.",
            headers={"content-range": f"bytes */{record.bytes}"},
        )
    return FileResponse(
        app.artifacts.file(record.id),
        media_type="text/csv" if record.format == "csv" else "application/octet-stream",
        filename=record.filename,
        headers={"etag": f'"{record.sha256}"'},
    )


@router.delete(
    "/{file_id}", operation_id="deleteFile", responses=answers("file_not_found", "file_in_use")
)
def delete_file(file_id: str, app: App, key: Caller) -> Deleted:
    """Delete a file that no unfinished job needs."""
    app.store.delete_file(key.project, file_id)
    app.artifacts.file(file_id).unlink(missing_ok=True)
    kind: Literal["file"] = "file"
    return Deleted(id=file_id, object=kind)
