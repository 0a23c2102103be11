"""`/v1/uploads`: a file in parts, with OpenAI's shapes; it ends in the checks that a whole file goes through.

A part may be sent again without harm, and completing again answers with the same file, since clients repeat what they
got no answer to.
"""

import hashlib
import os
import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.drafts import (
    EXPIRES_SECONDS,
    FORMATS,
    PURPOSE,
    Draft,
    Terms,
    new_file,
    row_check,
    shown_name,
)
from api.errors import ApiError
from api.multipart import FEED_BYTES, Form, receive, receiving
from api.schemas.bodies import Body, described, read
from api.schemas.files import PartObject, UploadObject
from api.schemas.problems import answers
from jobs.errors import UploadClosed
from jobs.spec import NewUpload, UploadPart, UploadRecord, new_id

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], dependencies=[Depends(require_key)])

MAX_PART_BYTES = 64 * 2**20
BODY = ("invalid_value", "missing_required_parameter", "unknown_parameter", "request_too_large")
STATES = ("upload_not_found", "upload_closed")
PART_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {
                        "data": {"type": "string", "contentMediaType": "application/octet-stream"}
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
# What `Terms.of_body` reads; its messages are better than a schema's.
EXPIRY: dict[str, Any] = {
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"const": "created_at"},
        "seconds": {
            "type": "integer",
            "minimum": EXPIRES_SECONDS[0],
            "maximum": EXPIRES_SECONDS[1],
        },
    },
    "additionalProperties": False,
}
SAT: dict[str, Any] = {
    "properties": {"format": {"enum": list(FORMATS)}, "keep_invalid": {"type": "boolean"}},
    "additionalProperties": False,
}


class CreateUpload(Body):
    """`sat` may hold `format` and `keep_invalid`, as the form of `/v1/files` does."""

    bytes: Annotated[int, Field(ge=1, le=2**53)]
    filename: Annotated[str, Field(min_length=1, max_length=512)]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: Annotated[str, Field(max_length=64, json_schema_extra={"const": PURPOSE})]
    expires_after: Annotated[dict[str, Any] | None, Field(json_schema_extra=EXPIRY)] = None
    sat: Annotated[dict[str, Any] | None, Field(json_schema_extra=SAT)] = None


class CompleteUpload(Body):
    """The parts in their order, and the MD5 of the whole as hexadecimal digits."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


@router.post(
    "",
    operation_id="createUpload",
    openapi_extra=described(CreateUpload),
    response_model=UploadObject,
    responses=answers(
        "unsupported_purpose", "file_too_large", "storage_quota_exceeded", *BODY, *once.CODES
    ),
)
async def create_upload(request: Request, app: App, key: Caller, creating: once.Creating) -> Any:
    """Announce a file; its parts may come within the hour."""
    body, raw = await read(request, CreateUpload)
    Terms.of_body(raw)
    if body.bytes > app.settings.max_file_bytes:
        raise too_large(app.settings.max_file_bytes, "bytes")
    new = NewUpload(
        bytes=body.bytes,
        filename=shown_name(body.filename),
        purpose=PURPOSE,
        settings={
            "purpose": body.purpose,
            "sat": body.sat,
            "expires_after": body.expires_after,
        },
    )
    return await creating.run(
        once.fingerprint(raw),
        lambda receipt: app.store.create_upload(key.project, new, receipt),
        UploadObject.of,
        location=router.prefix,
    )


@router.post(
    "/{upload_id}/parts",
    operation_id="addUploadPart",
    openapi_extra=PART_FORM,
    responses=answers(
        *STATES,
        "invalid_request",
        "parts_mismatch",
        "missing_required_parameter",
        "unknown_parameter",
        "file_too_large",
        "unsupported_media_type",
    ),
)
async def add_part(upload_id: str, request: Request, app: App, key: Caller) -> PartObject:
    """One part, at most 64 MiB and no more than the file; the order is told at the end."""
    upload = await run_in_threadpool(app.store.get_upload, key.project, upload_id)
    refuse_closed(upload)
    folder = app.artifacts.upload(upload_id)
    folder.mkdir(parents=True, exist_ok=True)
    most = min(MAX_PART_BYTES, upload.bytes)

    def refuse() -> ApiError:
        return ApiError(
            "file_too_large",
            f"A part may have {MAX_PART_BYTES} bytes, and no more than the {upload.bytes} announced for the file.",
            "data",
        )

    form = Form(
        request.headers.get("content-type", ""),
        stored=("data",),
        fields=(),
        opener=lambda _name, _fields: Draft(folder, most, refuse, None),
    )
    try:
        with receiving(form):
            draft = await receive(request, form, refuse, most)
            part = await run_in_threadpool(_keep_part, app, key.project, upload_id, draft)
    except FileNotFoundError:
        # The folder goes as soon as the upload has ended.
        refuse_closed(await run_in_threadpool(app.store.get_upload, key.project, upload_id))
        raise
    return PartObject.of(part)


@router.post(
    "/{upload_id}/complete",
    operation_id="completeUpload",
    openapi_extra=described(CompleteUpload),
    responses=answers(
        *STATES,
        *BODY,
        "dataset_invalid",
        "parts_mismatch",
        "checksum_mismatch",
        "storage_quota_exceeded",
    ),
)
async def complete_upload(upload_id: str, request: Request, app: App, key: Caller) -> UploadObject:
    """Join the parts to a file, which is checked row by row. Completing again gives the same file."""
    await run_in_threadpool(app.store.get_upload, key.project, upload_id)
    body, _ = await read(request, CompleteUpload)
    record = await run_in_threadpool(_complete, app, key.project, upload_id, body)
    return UploadObject.of(record)


@router.post("/{upload_id}/cancel", operation_id="cancelUpload", responses=answers(*STATES))
def cancel_upload(upload_id: str, app: App, key: Caller) -> UploadObject:
    """Take no more parts, and forget those that came."""
    record = app.store.cancel_upload(key.project, upload_id)
    shutil.rmtree(app.artifacts.upload(upload_id), ignore_errors=True)
    return UploadObject.of(record)


def too_large(max_bytes: int, param: str) -> ApiError:
    """The answer to a file above the limit."""
    return ApiError(
        "file_too_large",
        f"The file has more than {max_bytes} bytes, the limit of this service (SATUNE_MAX_FILE_BYTES).",
        param,
    )


def refuse_closed(upload: UploadRecord) -> None:
    """Refuse to go on with an upload that has ended. Raises UploadClosed."""
    if upload.status != "pending":
        error = UploadClosed(f"{upload.id} is {upload.status}; create another upload")
        error.status = upload.status
        raise error


def _keep_part(app: Services, project: str, upload_id: str, draft: Draft) -> UploadPart:
    draft.finish()
    part_id = new_id("part_")
    place = draft.path.with_name(part_id)
    os.rename(draft.path, place)
    try:
        return app.store.add_part(project, upload_id, part_id, draft.bytes)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def _complete(app: Services, project: str, upload_id: str, body: CompleteUpload) -> UploadRecord:
    try:
        return _make_file(app, project, upload_id, body)
    except (UploadClosed, FileNotFoundError):
        # It is complete already: the client asks again, or asked twice at once. Or it was cancelled meanwhile.
        upload = app.store.get_upload(project, upload_id)
        if upload.status == "completed":
            return upload
        refuse_closed(upload)
        raise


def _make_file(app: Services, project: str, upload_id: str, body: CompleteUpload) -> UploadRecord:
    parts = app.store.chosen_parts(project, upload_id, body.part_ids)
    upload = app.store.get_upload(project, upload_id)
    terms, limit = Terms.of_body(upload.settings), app.settings.max_file_bytes
    draft = Draft(
        app.artifacts.files,
        limit,
        lambda: too_large(limit, "bytes"),
        row_check(upload.filename, terms.declared),
    )
    try:
        _join(app, draft, upload_id, parts, body.md5)
        file = new_file(draft, upload.filename, terms)
        completed = app.store.complete_upload(
            project, upload_id, file, lambda: app.artifacts.keep(draft.path, file.sha256)
        )
    finally:
        draft.discard()
    shutil.rmtree(app.artifacts.upload(upload_id), ignore_errors=True)
    return completed


def _join(
    app: Services, draft: Draft, upload_id: str, parts: list[UploadPart], md5: str | None
) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        with (app.artifacts.upload(upload_id) / part.id).open("rb") as source:
            while piece := source.read(FEED_BYTES):
                digest.update(piece)
                draft.feed(piece)
    if md5 is not None and digest.hexdigest() != md5.lower():
        raise ApiError(
            "checksum_mismatch",
            f"The parts together have the MD5 {digest.hexdigest()}, not {md5}; send them again.",
            "md5",
        )
