"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume, result.

A create is one transaction; the bell rings after it, off the request's path. `api.once` makes sending it again safe.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api import once
from api.auth import Caller, require_key
from api.datasets import refuse_unusable
from api.deps import App, Services
from api.downloads import CODES as DOWNLOAD_CODES
from api.downloads import RESPONSES, FileList, Wanted, WantedFile, WantedPart, download, listing
from api.errors import ApiError
from api.etags import IfNoneMatch, tagged
from api.schemas.create import BODY_CODES, CreateJob, check, json_object, openapi_body
from api.schemas.jobs import FineTuningJob
from api.schemas.lists import After, ListOf
from api.schemas.problems import UNCHANGED, answers
from jobs.receipts import Receipt
from jobs.spec import JobRecord, NewJob
from jobs.states import Status

router = APIRouter(
    prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], dependencies=[Depends(require_key)]
)

JobLimit = Annotated[int, Query(ge=1, le=100)]
Compat = Annotated[
    Literal["strict"] | None,
    Header(
        alias="x-compat",
        description="`strict` tells `queued` for `paused`, which clients that check every answer do not know.",
    ),
]

CREATE_CODES = (*BODY_CODES, *once.CODES, "checkpoint_not_found")


@router.post(
    "",
    operation_id="createFineTuningJob",
    response_model=FineTuningJob,
    openapi_extra=openapi_body(),
    responses=answers(*CREATE_CODES),
)
async def create_job(request: Request, app: App, key: Caller, creating: once.Creating) -> Any:
    """Start a job. A key in `Idempotency-Key` makes sending it again safe."""
    create = check(await json_object(request))
    return await creating.run(
        create.fingerprint,
        lambda receipt: start_job(app, key.project, create, receipt),
        FineTuningJob.of,
        location=router.prefix,
        then=app.bell.ring,
    )


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
        integrations=create.integrations,
    )
    refuse_unusable(app, project, create)
    _refuse_unreachable(app, create)
    if found := app.store.unfinished_checkpoint(project, new.model):
        # Its run would tidy it away while this job waits.
        app.pinned(project, found)
    return app.store.create_job(project, new, receipt)


def _refuse_unreachable(app: Services, create: CreateJob) -> None:
    """Refuse a tracker that no living worker has the library for; where no worker lives, that is not known."""
    seen = app.queueing.snapshot()
    for number, entry in enumerate(create.integrations):
        if seen.workers and entry["type"] not in seen.integrations:
            has = ", ".join(sorted(seen.integrations)) or "none"
            raise ApiError(
                "unsupported_parameter",
                f"integrations.{number}.type is {entry['type']!r}, whose library no worker has (they have: {has}). "
                "Install it where the workers run: pip install mlflow-skinny tensorboard wandb.",
                f"integrations.{number}.type",
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
                "schema": {
                    "type": "object",
                    "propertyNames": {"minLength": 1},
                    "additionalProperties": {"type": "string"},
                },
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
    compat: Compat = None,
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
        [FineTuningJob.of(j, strict=compat == "strict") for j in page.items], has_more=page.has_more
    )


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """`metadata[k]=v` pairs, or {} for `metadata=null`: jobs without any. FastAPI knows no deepObject."""
    if request.query_params.get("metadata") == "null":
        return {}
    wanted = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata"):
            found = re.fullmatch(r"metadata\[(.+)\]", name, re.DOTALL)
            if found is None:
                raise ApiError(
                    "invalid_value",
                    f"{name}={value} is no filter; allowed: metadata[KEY]=VALUE, or metadata=null for jobs without any.",
                    "metadata",
                )
            wanted[found[1]] = value
    return wanted or None


@router.get(
    "/{job_id}",
    operation_id="retrieveFineTuningJob",
    response_model=FineTuningJob,
    responses=UNCHANGED | answers("job_not_found", "invalid_value"),
)
async def retrieve_job(
    job_id: str,
    app: App,
    key: Caller,
    wait: Annotated[
        float,
        Query(ge=0, le=50, description="Seconds to wait for another version than `version`."),
    ] = 0,
    version: Annotated[
        int | None, Query(ge=0, le=2**62, description="The version that is known.")
    ] = None,
    if_none_match: IfNoneMatch = None,
    compat: Compat = None,
) -> Response:
    """One job; with `If-None-Match` 304 while nothing has changed, with `wait` and `version` as soon as something has."""
    if wait and version is not None:
        async with app.followers.following(key.project, job_id) as followed:
            if not followed.pulse.ended:
                await followed.changed(version, wait)
    headers, text = await app.together.ask(
        _retrieved, app, key.project, job_id, if_none_match, compat == "strict"
    )
    if text is None:
        return Response(status_code=304, headers=headers)
    return Response(text, media_type="application/json", headers=headers)


def _retrieved(
    app: Services, project: str, job_id: str, if_none_match: str | None, strict: bool
) -> tuple[dict[str, str], str | None]:
    """Headers of the answer, and its body where the client has it not yet."""
    job = app.store.get_job(project, job_id)
    place = app.queueing.place(job)
    # A place in the queue changes without the job.
    queued = f"-{place.position}-{place.reason}" if place else ""
    headers, same = tagged(f"j{job.version}{queued}", if_none_match)
    return headers, None if same else FineTuningJob.of(job, app, strict=strict).model_dump_json()


@router.post(
    "/{job_id}/cancel",
    operation_id="cancelFineTuningJob",
    responses=answers("job_not_found", "job_terminal"),
)
def cancel_job(
    job_id: str, background: BackgroundTasks, app: App, key: Caller, compat: Compat = None
) -> FineTuningJob:
    """Cancel: at once where the job waits, after its current step and a checkpoint where it runs."""
    job = app.store.cancel_job(key.project, job_id)
    background.add_task(app.bell.ring)
    return FineTuningJob.of(job, app, strict=compat == "strict")


@router.post(
    "/{job_id}/pause",
    operation_id="pauseFineTuningJob",
    responses=answers("job_not_found", "job_terminal", "job_not_pausable"),
)
def pause_job(job_id: str, app: App, key: Caller, compat: Compat = None) -> FineTuningJob:
    """Pause: at once where the job waits, after its current step and a checkpoint where it runs. Its slot is free then."""
    job = app.store.pause_job(key.project, job_id)
    return FineTuningJob.of(job, app, strict=compat == "strict")


@router.post(
    "/{job_id}/resume",
    operation_id="resumeFineTuningJob",
    responses=answers("job_not_found", "job_terminal", "job_not_pausable"),
)
def resume_job(
    job_id: str, background: BackgroundTasks, app: App, key: Caller, compat: Compat = None
) -> FineTuningJob:
    """Resume: the job waits for a slot and goes on from its newest checkpoint; one that is not paused stays as it is."""
    job = app.store.resume_job(key.project, job_id)
    background.add_task(app.bell.ring)
    return FineTuningJob.of(job, app, strict=compat == "strict")


@router.get(
    "/{job_id}/result",
    operation_id="downloadFineTuningJobResult",
    response_class=StreamingResponse,
    responses=RESPONSES
    | answers("job_not_found", "result_not_ready", "invalid_value", *DOWNLOAD_CODES),
)
def download_result(
    job_id: str, app: App, key: Caller, wanted: WantedPart, file: WantedFile = None
) -> StreamingResponse:
    """The model folder as a tar archive, or one of its files: what `from_pretrained` loads. Ranges are served."""
    return download(_result(app, key.project, job_id), job_id, file, wanted)


@router.get(
    "/{job_id}/result/files",
    operation_id="listFineTuningJobResultFiles",
    responses=answers("job_not_found", "result_not_ready"),
)
def list_result_files(job_id: str, app: App, key: Caller) -> FileList:
    """The files of the model folder with sizes and hashes."""
    return listing(_result(app, key.project, job_id))


def result_archive(app: Services, project: str, job_id: str) -> StreamingResponse:
    """The archive of a job's result, or 409 where there is none."""
    return download(_result(app, project, job_id), job_id, None, Wanted())


def _result(app: Services, project: str, job_id: str) -> Path:
    job = app.store.get_job(project, job_id)
    path = app.model_path(project, job.fine_tuned_model) if job.fine_tuned_model else None
    if path is None or not path.is_dir():
        why = "its model was deleted" if job.fine_tuned_model else f"its status is {job.status}"
        raise ApiError("result_not_ready", f"Job {job_id} has no result to download: {why}.")
    return path
