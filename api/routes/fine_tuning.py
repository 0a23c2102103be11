"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, events, checkpoints, metrics, result.

A create is one transaction; the bell rings after it, off the request's path. `api.once` makes sending it again safe.
"""

import re
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api import once
from api.archive import archive_size, tar_stream
from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas.create import CreateJob, check, json_object, openapi_body
from api.schemas.jobs import Checkpoint, FineTuningJob, JobEvent, JobMetrics, finite
from api.schemas.lists import After, ListOf, Order
from api.schemas.problems import answers
from jobs.receipts import Receipt
from jobs.spec import JobRecord, NewJob
from jobs.states import Status

router = APIRouter(
    prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], dependencies=[Depends(require_key)]
)

JobLimit = Annotated[int, Query(ge=1, le=100)]

CREATE_CODES = (
    "invalid_value",
    "missing_required_parameter",
    "unknown_parameter",
    "unsupported_parameter",
    "conflicting_parameters",
    "unknown_model",
    "file_not_found",
    "request_too_large",
    "queue_quota_exceeded",
    *once.CODES,
)


@router.post(
    "",
    operation_id="createFineTuningJob",
    response_model=FineTuningJob,
    openapi_extra=openapi_body(),
    responses=answers(*CREATE_CODES),
)
async def create_job(
    request: Request, background: BackgroundTasks, app: App, key: Caller, creating: once.Creating
) -> Any:
    """Start a job. A key in `Idempotency-Key` makes sending it again safe."""
    create = check(await json_object(request))
    response = await creating.run(
        create.fingerprint,
        lambda receipt: start_job(app, key.project, create, receipt),
        lambda job: FineTuningJob.of(job, app),
        location=router.prefix,
    )
    # A response made by hand carries its own background.
    background.add_task(app.bell.ring)
    response.background = background
    return response


def start_job(app: Services, project: str, create: CreateJob, receipt: Receipt) -> JobRecord:
    """Accept a job whose files and model exist. Raises ApiError where one does not."""
    new = NewJob(
        request=create.run.to_dict(),
        model=create.run.model,
        training_file=create.training_file,
        validation_file=create.validation_file,
        suffix=create.suffix,
        seed=create.run.seed,
        metadata=create.metadata,
    )
    for name in ("training_file", "validation_file"):
        file_id = getattr(new, name)
        if file_id is not None:
            _file_exists(app, project, file_id, name)
    for i, entry in enumerate(create.run.sat.data.mix):
        _file_exists(app, project, entry.file, f"sat.data.mix.{i}.file")
    _model_exists(app, project, new.model)
    return app.store.create_job(project, new, receipt)


def _file_exists(app: Services, project: str, file_id: str, param: str) -> None:
    try:
        app.store.get_file(project, file_id)
    except LookupError as error:
        raise ApiError(
            "file_not_found",
            f"{param} {file_id!r} does not exist; upload it to /v1/files first.",
            param,
        ) from error


def _model_exists(app: Services, project: str, name: str) -> None:
    """Refuse what cannot be a model. Whether a hub has ORG/NAME is known only when the worker asks it."""
    if name.startswith("ft:"):
        if app.model_path(project, name) is not None:
            return
    elif "/" in name and (app.artifacts.resolve_model(name) or not name.startswith("local/")):
        return
    known = app.artifacts.local_models()
    listed = (
        ", ".join(known[:20]) or "none yet; put model folders below a folder in SATUNE_MODEL_ROOTS"
    )
    raise ApiError(
        "unknown_model",
        f"model {name!r} does not exist. Local models: {listed}. A model of the hub is named ORG/NAME.",
        "model",
    )


@router.get(
    "",
    operation_id="listPaginatedFineTuningJobs",
    responses=answers("invalid_value", "invalid_cursor"),
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "style": "deepObject",
                "explode": True,
                "description": "Only jobs with these metadata, as metadata[k]=v.",
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            }
        ]
    },
)
def list_jobs(
    request: Request,
    app: App,
    key: Caller,
    after: After = None,
    limit: JobLimit = 20,
    status: Annotated[Status | None, Query()] = None,
) -> ListOf[FineTuningJob]:
    """Jobs of the key's project, newest first."""
    page = app.store.list_jobs(
        key.project,
        after=after,
        limit=limit,
        metadata=_metadata_filter(request),
        status=status.value if status else None,
    )
    return ListOf[FineTuningJob].of(
        [FineTuningJob.of(j) for j in page.items], has_more=page.has_more
    )


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """`metadata[k]=v` pairs, or {} for `metadata=null`: jobs without any. FastAPI knows no deepObject."""
    if request.query_params.get("metadata") == "null":
        return {}
    pairs = (
        (re.fullmatch(r"metadata\[(.+)\]", name), value)
        for name, value in request.query_params.items()
    )
    return {found[1]: value for found, value in pairs if found} or None


@router.get("/{job_id}", operation_id="retrieveFineTuningJob", responses=answers("job_not_found"))
def retrieve_job(
    job_id: str,
    response: Response,
    app: App,
    key: Caller,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Any:
    """One job; with `If-None-Match` 304 while nothing has changed."""
    job = app.store.get_job(key.project, job_id)
    etag = f'W/"j{job.version}"'
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    if if_none_match and etag.removeprefix("W/") in if_none_match:
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return FineTuningJob.of(job, app)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancelFineTuningJob",
    responses=answers("job_not_found", "job_terminal"),
)
def cancel_job(job_id: str, background: BackgroundTasks, app: App, key: Caller) -> FineTuningJob:
    """Cancel: at once where the job waits, after its current step and a checkpoint where it runs."""
    job = app.store.cancel_job(key.project, job_id)
    background.add_task(app.bell.ring)
    return FineTuningJob.of(job, app)


@router.get(
    "/{job_id}/events",
    operation_id="listFineTuningEvents",
    responses=answers("job_not_found", "invalid_cursor"),
)
def list_events(
    job_id: str,
    app: App,
    key: Caller,
    after: After = None,
    limit: JobLimit = 20,
    order: Order = "desc",
) -> ListOf[JobEvent]:
    """What was told of a job."""
    page = app.store.events(
        key.project, job_id, after=after, limit=limit, newest_first=order == "desc"
    )
    return ListOf[JobEvent].of([JobEvent.of(e) for e in page.items], has_more=page.has_more)


@router.get(
    "/{job_id}/checkpoints",
    operation_id="listFineTuningJobCheckpoints",
    responses=answers("job_not_found", "invalid_cursor"),
)
def list_checkpoints(
    job_id: str, app: App, key: Caller, after: After = None, limit: JobLimit = 10
) -> ListOf[Checkpoint]:
    """Checkpoints of a job, newest first."""
    job = app.store.get_job(key.project, job_id)
    page = app.store.checkpoints(key.project, job_id, after=after, limit=limit)
    return ListOf[Checkpoint].of(
        [Checkpoint.of(c, job) for c in page.items], has_more=page.has_more
    )


@router.get(
    "/{job_id}/metrics",
    operation_id="listFineTuningJobMetrics",
    responses=answers("job_not_found", "invalid_value"),
)
def list_metrics(
    job_id: str,
    app: App,
    key: Caller,
    after: Annotated[int, Query(ge=-1, description="Only steps above this one.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> JobMetrics:
    """Measured rows in order of steps; step 0 is the evaluation before training."""
    columns, rows, has_more = app.store.metrics(key.project, job_id, after_step=after, limit=limit)
    step = list(columns).index("step")
    return JobMetrics(
        columns=list(columns),
        rows=finite(rows),
        last_step=rows[-1][step] if rows else after,
        has_more=has_more,
    )


@router.get(
    "/{job_id}/result",
    operation_id="downloadFineTuningJobResult",
    response_class=StreamingResponse,
    responses=answers("job_not_found", "result_not_ready"),
)
def download_result(job_id: str, app: App, key: Caller) -> StreamingResponse:
    """The model folder as a tar archive: what `from_pretrained` loads once it is unpacked."""
    return result_archive(app, key.project, job_id)


def result_archive(app: Services, project: str, job_id: str) -> StreamingResponse:
    """The archive of a job's result, or 409 where there is none."""
    job = app.store.get_job(project, job_id)
    path = app.model_path(project, job.fine_tuned_model) if job.fine_tuned_model else None
    if path is None or not path.is_dir():
        why = "its model was deleted" if job.fine_tuned_model else f"its status is {job.status}"
        raise ApiError("result_not_ready", f"Job {job_id} has no result to download: {why}.")
    return StreamingResponse(
        tar_stream(path, job.id),
        media_type="application/x-tar",
        headers={
            "content-disposition": f'attachment; filename="{job.id}.tar"',
            "content-length": str(archive_size(path, job.id)),
        },
    )
