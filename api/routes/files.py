"""`/v1/files`: upload, list, retrieve, content, delete."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from api import datasets, downloads, once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.drafts import (
    ANCHOR_FIELD,
    EXPIRES_SECONDS,
    FIELDS,
    FORMAT_FIELD,
    FORMATS,
    KEEP_FIELD,
    PURPOSE,
    SECONDS_FIELD,
    Draft,
    Terms,
    declared_format,
    new_file,
    row_check,
    shown_name,
)
from api.errors import ApiError
from api.multipart import Form, receive, receiving
from api.routes.uploads import too_large
from api.schemas.files import FileObject
from api.schemas.lists import After, Deleted, ListOf, Order
from api.schemas.problems import answers
from jobs.spec import Key

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(require_key)])

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"const": PURPOSE},
                        FORMAT_FIELD: {"enum": list(FORMATS), "default": "auto"},
                        KEEP_FIELD: {
                            "type": "boolean",
                            "default": False,
                            "description": "Keep a file with bad rows, with status `error`, for its report.",
                        },
                        ANCHOR_FIELD: {"const": "created_at"},
                        SECONDS_FIELD: {
                            "type": "integer",
                            "minimum": EXPIRES_SECONDS[0],
                            "maximum": EXPIRES_SECONDS[1],
                        },
                        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                    },
                    "dependentRequired": {
                        ANCHOR_FIELD: [SECONDS_FIELD],
                        SECONDS_FIELD: [ANCHOR_FIELD],
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
    names: list[str] = []
    early: list[str] = []

    def refuse() -> ApiError:
        return too_large(limit, "file")

    def opener(filename: str, fields: Mapping[str, str]) -> Draft:
        names.append(shown_name(filename))
        early.extend(fields)
        check = row_check(names[0], declared_format(fields))
        return Draft(app.artifacts.files, limit, refuse, check)

    kind = request.headers.get("content-type", "")
    form = Form(kind, stored=("file",), fields=FIELDS, opener=opener)
    with receiving(form):
        draft = await receive(request, form, refuse, limit)
        if FORMAT_FIELD in form.fields and FORMAT_FIELD not in early:
            raise ApiError(
                "invalid_request",
                f"{FORMAT_FIELD} must come before file in the form.",
                FORMAT_FIELD,
            )
        return await keep_file(app, key, draft, names[0], Terms.of(form.fields), creating)


async def keep_file(
    app: Services, key: Key, draft: Draft, filename: str, terms: Terms, creating: once.Once
) -> Response:
    """Judge a file that is whole, and register it. Raises ApiError where it has a bad row."""
    file = await run_in_threadpool(new_file, draft, filename, terms)
    return await creating.run(
        once.fingerprint([file.sha256, file.filename, file.format, asdict(terms)]),
        lambda receipt: app.store.add_file(
            key.project,
            file,
            receipt,
            place=lambda: app.artifacts.keep(draft.path, file.sha256),
        ),
        FileObject.of,
        location=router.prefix,
    )


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
    return FileObject.of(datasets.settled(app, app.store.get_file(key.project, file_id)))


@router.get(
    "/{file_id}/content",
    operation_id="downloadFile",
    response_class=StreamingResponse,
    responses=downloads.responses("application/octet-stream", "text/csv")
    | answers("file_not_found", "range_not_satisfiable"),
)
def download_content(
    file_id: str, app: App, key: Caller, wanted: downloads.WantedPart
) -> StreamingResponse:
    """The bytes as uploaded; ranges are served."""
    record = app.store.get_file(key.project, file_id)
    path = app.artifacts.file(record.sha256)
    kind = "text/csv" if record.format == "csv" else "application/octet-stream"
    return downloads.download_file(path, record.filename, record.sha256, wanted, kind)


@router.delete(
    "/{file_id}", operation_id="deleteFile", responses=answers("file_not_found", "file_in_use")
)
def delete_file(file_id: str, app: App, key: Caller) -> Deleted:
    """Delete a file that no unfinished job needs."""
    app.store.delete_file(key.project, file_id, app.artifacts.dropping)
    kind: Literal["file"] = "file"
    return Deleted(id=file_id, object=kind)
