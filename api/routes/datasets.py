"""`/v1/files/{id}/validation` and `/preview`: what a file holds, before a job is paid for.

Both answer 200 at once with what is known; `pending` says that a worker is at it, and `wait` holds the answer back for it.
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.concurrency import run_in_threadpool

from api import datasets
from api.auth import Caller, require_key
from api.deps import App, Services
from api.named import data_file, model_exists
from api.schemas.datasets import FilePreview, FileValidation
from api.schemas.problems import answers
from api.shapes import refuse_unfit
from jobs.spec import FileRecord
from sat_core.plan.request import DataFormat, RunRequest

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(require_key)])

MAX_WAIT_SECONDS = 50
MAX_PREVIEW_ROWS = 100
CODES = ("file_not_found", "unknown_model", "invalid_value", "queue_quota_exceeded")

Model = Annotated[
    str | None, Query(max_length=512, description="Whose tokenizer and chat template to use.")
]
Wait = Annotated[
    float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the worker.")
]
Format = Annotated[
    DataFormat, Query(description="As sat.data.format of a job: the rows' format, or auto.")
]
TrainOn = Annotated[
    Literal["assistant", "all"], Query(description="As sat.train.train_on of a job.")
]
SeqLen = Annotated[
    int | None, Query(ge=8, le=1_048_576, description="As sat.train.max_seq_len of a job.")
]


@router.get(
    "/{file_id}/validation",
    operation_id="validateFile",
    responses=answers(*CODES, "missing_required_parameter"),
)
async def validate_file(
    file_id: str,
    response: Response,
    app: App,
    key: Caller,
    model: Model = None,
    against: Annotated[
        str | None,
        Query(max_length=64, description="File to look for rows that stand in both."),
    ] = None,
    format: Format = "auto",
    train_on: TrainOn = "assistant",
    max_seq_len: SeqLen = None,
    wait: Wait = 0,
) -> FileValidation:
    """The report on a file: every error by its place, copies, and with `model` what would be trained on."""
    file = await run_in_threadpool(_file, app, key.project, file_id, against)
    if file.status == "error":
        return FileValidation.of(file, None, model=model, against=against)
    run = await run_in_threadpool(_run, app, key.project, model, format, train_on, max_seq_len)
    params = await run_in_threadpool(
        datasets.validation_params, app, run, against=against, declared=format
    )
    chore = await datasets.ask(app, key.project, datasets.VALIDATION, file.id, params, wait)
    report = FileValidation.of(file, chore, model=model, against=against)
    if report.status == "pending":
        response.headers["retry-after"] = "1"
    return report


@router.get(
    "/{file_id}/preview",
    operation_id="previewFile",
    responses=answers(*CODES, "missing_required_parameter"),
)
async def preview_file(
    file_id: str,
    response: Response,
    app: App,
    key: Caller,
    model: Annotated[
        str, Query(max_length=512, description="Whose tokenizer and chat template to use.")
    ],
    rows: Annotated[int, Query(ge=1, le=MAX_PREVIEW_ROWS)] = 5,
    format: Format = "auto",
    train_on: TrainOn = "assistant",
    max_seq_len: SeqLen = None,
    wait: Wait = 0,
) -> FilePreview:
    """The first rows as the model sees them: tokens, and which of them are trained on, masked or cut off."""
    file = await run_in_threadpool(_file, app, key.project, file_id, None)
    run = await run_in_threadpool(_run, app, key.project, model, format, train_on, max_seq_len)
    assert run is not None  # noqa: S101 - a model was given
    params = await run_in_threadpool(datasets.preview_params, app, run, rows)
    chore = await datasets.ask(app, key.project, datasets.PREVIEW, file.id, params, wait)
    preview = FilePreview.of(file, chore, model)
    if preview.status == "pending":
        response.headers["retry-after"] = "1"
    return preview


def _file(app: Services, project: str, file_id: str, against: str | None) -> FileRecord:
    if against is not None:
        data_file(app, project, against, "against")
    return datasets.settled(app, app.store.get_file(project, file_id))


def _run(
    app: Services,
    project: str,
    model: str | None,
    format: str,
    train_on: str,
    max_seq_len: int | None,
) -> RunRequest | None:
    if model is None:
        return None
    model_exists(app, project, model)
    train = {"train_on": train_on, "max_seq_len": max_seq_len}
    run = RunRequest.from_dict(
        {"model": model, "sat": {"train": train, "data": {"format": format}}}
    )
    refuse_unfit(app, project, run)
    return run
