"""`/v1/fine_tuning/jobs/{id}/report`, `/config` and `/clone`: what became of a run, of what, and the same with changes."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from api import once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.routes.fine_tuning import CREATE_CODES, start_job
from api.schemas.create import check, json_object
from api.schemas.jobs import FineTuningJob
from api.schemas.problems import answers
from api.schemas.report import JobConfig, JobReport
from jobs.errors import NotFound
from jobs.library import files_of
from jobs.spec import FileRecord, JobRecord
from jobs.states import TERMINAL

router = APIRouter(
    prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], dependencies=[Depends(require_key)]
)


@router.get(
    "/{job_id}/report",
    operation_id="retrieveFineTuningJobReport",
    responses=answers("job_not_found", "not_finished"),
)
def retrieve_report(job_id: str, app: App, key: Caller) -> JobReport:
    """What a run cost and what sparsity saved, what became of the model; of a job that has ended, well or not."""
    run = app.store.get_run(key.project, job_id)
    if run.job.status not in TERMINAL:
        raise ApiError(
            "not_finished",
            f"Job {job_id} is {run.job.status}; there is a report once it has succeeded, failed or been cancelled.",
        )
    return JobReport.of(run)


@router.get(
    "/{job_id}/config",
    operation_id="retrieveFineTuningJobConfig",
    responses=answers("job_not_found"),
)
def retrieve_config(job_id: str, app: App, key: Caller) -> JobConfig:
    """What a job was told and what it resolved, at any time of its life."""
    run = app.store.get_run(key.project, job_id)
    job = run.job
    ids = files_of(job.training_file, job.validation_file, job.request)
    files = {id: _file(app, key.project, id) for id in ids}
    return JobConfig.of(run, create_body(job, by_method=True), files)


def _file(app: Services, project: str, file_id: str) -> FileRecord | None:
    try:
        return app.store.get_file(project, file_id)
    except NotFound:
        return None


@router.post(
    "/{job_id}/clone",
    operation_id="cloneFineTuningJob",
    response_model=FineTuningJob,
    responses=answers("job_not_found", "invalid_request", *CREATE_CODES),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "description": "Changes to the job's own create body, as a JSON Merge Patch (RFC 7396): "
                        "objects are merged, null takes a value back to its default.",
                    },
                    "examples": {"faster": {"value": {"sat": {"omission_rate": {"mlp": 0.6}}}}},
                }
            },
        }
    },
)
async def clone_job(
    job_id: str,
    request: Request,
    app: App,
    key: Caller,
    creating: once.Creating,
) -> Any:
    """Start a job like this one, with the changes that the body says; it is checked as any create is."""
    job = await run_in_threadpool(app.store.get_job, key.project, job_id)
    changes = await json_object(request)
    create = check(merge_patch(create_body(job, by_method="method" in changes), changes))
    return await creating.run(
        once.fingerprint(changes),
        lambda receipt: start_job(app, key.project, create, receipt),
        lambda made: FineTuningJob.of(made, app),
        location=router.prefix,
        then=app.bell.ring,
    )


def create_body(job: JobRecord, *, by_method: bool) -> dict[str, Any]:
    """A body that creates a job like this one; its hyperparameters stand where the changes speak of them."""
    asked = dict(job.request)
    hyper = asked.pop("hyperparameters", None)
    method = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    return {
        **asked,
        **({"method": method} if by_method else {"hyperparameters": hyper}),
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "suffix": job.suffix,
        "metadata": job.metadata,
        "integrations": job.integrations,
    }


def merge_patch(target: Any, patch: Any) -> Any:
    """The target changed as RFC 7396 says."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
