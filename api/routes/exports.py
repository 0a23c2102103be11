"""`/v1/exports`: models in the form in which a person takes them home.

An export is a chore, so the same model in the same form is made once, whoever asks how often; what it made stays until the
export is deleted, and outlives its model.
"""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from api import once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.downloads import CODES as DOWNLOAD_CODES
from api.downloads import RESPONSES, FileList, WantedFile, WantedPart, download
from api.errors import ApiError, refuse_unknown
from api.schemas.create import json_object
from api.schemas.exports import Export
from api.schemas.lists import After, Deleted, ListOf
from api.schemas.problems import answers
from jobs.errors import NotFound
from jobs.receipts import Receipt
from jobs.spec import ChoreRecord
from jobs.states import ChoreStatus
from sat_io.portable import gguf_refusal

router = APIRouter(prefix="/v1/exports", tags=["exports"], dependencies=[Depends(require_key)])

KIND = "export"
FORMATS = ("safetensors", "adapter", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {
                            "type": "string",
                            "description": "Name of a result, or of a checkpoint.",
                        },
                        "format": {"enum": list(FORMATS), "default": "safetensors"},
                        "dtype": {
                            "enum": list(DTYPES),
                            "default": "float32",
                            "description": "float32 is what was trained; half the size is bfloat16.",
                        },
                    },
                    "additionalProperties": False,
                },
                "examples": {"gguf": {"value": {"model": "ft:…", "format": "gguf"}}},
            }
        },
    }
}


@router.post(
    "",
    operation_id="createExport",
    response_model=Export,
    openapi_extra=BODY,
    responses=answers(
        "invalid_request",
        "invalid_value",
        "missing_required_parameter",
        "unknown_parameter",
        "unknown_model",
        "format_not_supported",
        "request_too_large",
        "queue_quota_exceeded",
        *once.CODES,
    ),
)
async def create_export(request: Request, app: App, key: Caller, creating: once.Creating) -> Any:
    """Export a model; the same model in the same form is the same export."""
    body = await json_object(request)
    asked = _checked(body)
    return await creating.run(
        once.fingerprint(body),
        lambda receipt: _ask(app, key.project, asked, receipt),
        Export.of,
        location=router.prefix,
        then=app.bell.ring,
    )


def _checked(body: dict[str, Any]) -> dict[str, str]:
    refuse_unknown(list(body), ("model", "format", "dtype"))
    if body.get("model") is None:
        raise ApiError("missing_required_parameter", "model is missing.", "model")
    if not isinstance(body["model"], str):
        raise ApiError("unknown_model", f"model is {body['model']!r}; allowed is a name.", "model")
    asked = {"model": body["model"]}
    for name, allowed in (("format", FORMATS), ("dtype", DTYPES)):
        value = allowed[0] if body.get(name) is None else body[name]
        if value not in allowed:
            raise ApiError(
                "invalid_value", f"{name} is {value!r}; allowed: {', '.join(allowed)}.", name
            )
        asked[name] = value
    return asked


def _ask(app: Services, project: str, asked: dict[str, str], receipt: Receipt) -> ChoreRecord:
    _can_be(app, project, asked["model"], asked["format"])
    params = {"target": asked["format"], "dtype": asked["dtype"]}
    return app.store.ask_chore(project, KIND, asked["model"], params, receipt)


def _can_be(app: Services, project: str, name: str, format: str) -> None:
    """Refuse what is no model that a job made, or cannot have that form."""
    try:
        model = app.store.get_model(project, name)
    except NotFound as error:
        raise ApiError(
            "unknown_model",
            f"model {name!r} is not one that a job of this project made; allowed is the name of a result or of a "
            "checkpoint.",
            "model",
        ) from error
    refusal = None
    if format == "adapter":
        config = app.store.get_job(project, model.job_id).config or {}
        if config.get("tuning") != "lora":
            refusal = (
                f"{name} was trained with tuning {config.get('tuning')!r} and has no adapter; only runs with "
                "sat.train.tuning 'lora' have one. Ask for safetensors."
            )
    elif format == "gguf":
        why = gguf_refusal(app.artifacts.absolute(model.path))
        refusal = f"{name} cannot be written as GGUF: {why}." if why else None
    if refusal:
        raise ApiError("format_not_supported", refusal, "format")


@router.get("", operation_id="listExports", responses=answers("invalid_value", "invalid_cursor"))
def list_exports(
    app: App,
    key: Caller,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> ListOf[Export]:
    """Exports of the key's project, newest first."""
    page = app.store.list_chores(key.project, KIND, after=after, limit=limit)
    return ListOf[Export].of([Export.of(c) for c in page.items], has_more=page.has_more)


@router.get("/{export_id}", operation_id="retrieveExport", responses=answers("export_not_found"))
def retrieve_export(export_id: str, app: App, key: Caller) -> Export:
    """One export."""
    return Export.of(_found(app, key.project, export_id))


@router.get(
    "/{export_id}/files",
    operation_id="listExportFiles",
    responses=answers("export_not_found", "export_not_ready"),
)
def list_export_files(export_id: str, app: App, key: Caller) -> FileList:
    """The files with sizes and hashes."""
    chore, _ = _made(app, key.project, export_id)
    return FileList(data=Export.of(chore).files)


@router.get(
    "/{export_id}/content",
    operation_id="downloadExport",
    response_class=StreamingResponse,
    responses=RESPONSES
    | answers("export_not_found", "export_not_ready", "invalid_value", *DOWNLOAD_CODES),
)
def download_export(
    export_id: str, app: App, key: Caller, wanted: WantedPart, file: WantedFile = None
) -> StreamingResponse:
    """All files as a tar archive, or one of them. Ranges are served, so a broken download goes on where it was."""
    chore, folder = _made(app, key.project, export_id)
    known = {made.name: made.sha256 for made in Export.of(chore).files}
    return download(folder, export_id, file, wanted, known.get(file or ""))


@router.delete("/{export_id}", operation_id="deleteExport", responses=answers("export_not_found"))
def delete_export(export_id: str, app: App, key: Caller) -> Deleted:
    """Delete an export and its files; one that is being made is given up."""
    _found(app, key.project, export_id)
    app.store.delete_chore(key.project, export_id)
    app.artifacts.delete(app.artifacts.relative(app.artifacts.exports(export_id)))
    return Deleted(id=export_id, object="export")


def _found(app: Services, project: str, export_id: str) -> ChoreRecord:
    try:
        chore = app.store.get_chore(project, export_id)
    except NotFound as error:
        raise NotFound.of("export", export_id) from error
    if chore.kind != KIND:
        raise NotFound.of("export", export_id)
    return chore


def _made(app: Services, project: str, export_id: str) -> tuple[ChoreRecord, Path]:
    chore = _found(app, project, export_id)
    folder = app.artifacts.export(chore.id, chore.attempt)
    if chore.status != ChoreStatus.SUCCEEDED or not folder.is_dir():
        status = Export.of(chore).status
        raise ApiError("export_not_ready", f"Export {export_id} is {status}; it has no content.")
    return chore, folder
