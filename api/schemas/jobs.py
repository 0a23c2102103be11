"""OpenAI's FineTuningJob, event and checkpoint. Ours are extra keys at the top level, where every client keeps them.

`hyperparameters` shows "auto" until a number is resolved, then the number. `sat` is the request with every default
filled in. The road not taken is a `method.type` of our own: clients that validate would refuse the whole answer.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel

from api.deps import Services
from api.queueing import Place
from jobs.names import checkpoint_name
from jobs.spec import CheckpointRecord, EventRecord, JobRecord

HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


class JobFailure(BaseModel):
    """Why a job failed; null where it did not."""

    code: str
    message: str
    param: str | None = None
    log_excerpt: str | None = None


class StatusDetail(BaseModel):
    """More than `status` may say: one state with its message, and since when.

    Of a job that waits, also its place in the queue, why it waits (no_worker, no_slot, no_fitting_worker, slots_busy,
    jobs_before, project_limit, retry_wait, starting), and between which Unix seconds it may start, where past runs let
    that be told.
    """

    state: str
    message: str
    since: float
    position: int | None = None
    reason: str | None = None
    starts_after: float | None = None
    starts_before: float | None = None

    @classmethod
    def of(cls, job: JobRecord, place: Place | None) -> Self:
        """What the row says, and what the queue says of it now."""
        if place is None:
            return cls(state=job.detail_state, message=job.detail_message, since=job.detail_since)
        after, before = place.starts or (None, None)
        return cls(
            state=job.detail_state,
            message=f"{job.detail_message}. {place.message}",
            since=job.detail_since,
            position=place.position,
            reason=place.reason,
            starts_after=after,
            starts_before=before,
        )


class Progress(BaseModel):
    """Where training stands."""

    step: int
    total_steps: int | None
    percent: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    loss: float | None
    omission_rate_mlp: float | None
    omission_rate_attention: float | None


class FineTuningJob(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    error: JobFailure | None
    fine_tuned_model: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str] = []
    integrations: list[dict[str, Any]] = []
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    metadata: dict[str, str]
    user_provided_suffix: str | None
    version: int
    status_detail: StatusDetail
    progress: Progress | None
    sat: dict[str, Any]
    figures: dict[str, Any] | None
    warnings: list[str]
    attempt: int
    failures: int
    started_at: float | None
    report: dict[str, Any] | None

    @classmethod
    def of(cls, job: JobRecord, app: Services | None = None, *, strict: bool = False) -> Self:
        """The job as a client sees it.

        With `app` its report also says where the model lies, and its status why it waits. A `strict` client knows no
        status `paused` and is told `queued`; `status_detail` says more.
        """
        hyper = _hyperparameters(job)
        eta = job.eta_seconds if job.status == "running" else None
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            finished_at=_seconds(job.finished_at),
            estimated_finish=int(time.time() + eta) if eta is not None else None,
            error=JobFailure(**_failure(job.error)) if job.error else None,
            fine_tuned_model=job.fine_tuned_model,
            hyperparameters=hyper,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
            model=job.model,
            organization_id=job.project,
            result_files=[job.result_file] if job.result_file else [],
            # Clients that check every answer know no other type; all stand in .../integrations.
            integrations=[i for i in job.integrations or [] if i["type"] == "wandb"],
            seed=job.seed or 0,
            status="queued" if strict and job.status == "paused" else job.status,
            trained_tokens=job.trained_tokens,
            training_file=job.training_file,
            validation_file=job.validation_file,
            metadata=job.metadata,
            user_provided_suffix=job.suffix,
            version=job.version,
            status_detail=StatusDetail.of(job, app.queueing.place(job) if app else None),
            progress=_progress(job),
            sat=job.request.get("sat") or {},
            figures=job.figures,
            warnings=list(job.warnings),
            attempt=job.attempt,
            failures=job.failures,
            started_at=job.started_at,
            report=report(job, app),
        )


class JobEvent(BaseModel):
    """Something told of a job; the finer kind stands in `data.kind`."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]

    @classmethod
    def of(cls, event: EventRecord) -> Self:
        """The event as a client sees it."""
        return cls.model_validate(
            {
                "id": event.id,
                "created_at": int(event.created_at),
                "level": event.level,
                "message": event.message,
                "type": event.type,
                "data": {"kind": event.kind, **(event.data or {})},
            }
        )


class Checkpoint(BaseModel):
    """A checkpoint that training can go on from."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float | None]
    step_number: int
    size_bytes: int
    pinned: bool
    available: bool = True

    @classmethod
    def of(cls, record: CheckpointRecord, job: JobRecord) -> Self:
        """The checkpoint as a client sees it, with OpenAI's names for the metrics."""
        metrics = record.metrics
        return cls(
            id=record.id,
            created_at=int(record.created_at),
            fine_tuned_model_checkpoint=checkpoint_name(job, record.step),
            fine_tuning_job_id=job.id,
            metrics={
                "step": float(record.step),
                "train_loss": metrics.get("loss"),
                "train_mean_token_accuracy": metrics.get("token_accuracy"),
                "full_valid_loss": metrics.get("eval_loss"),
                "full_valid_mean_token_accuracy": metrics.get("eval_token_accuracy"),
            },
            step_number=record.step,
            size_bytes=record.size_bytes,
            pinned=record.pinned_from is not None,
        )


class JobMetrics(BaseModel):
    """Measured rows after a step, column by column names; the next page is the same query with `after` = `last_step`.

    While the job goes on, an evaluation may yet join the newest row: ask again from the row before it. `measured` is how
    many rows they stand for, where they were thinned.
    """

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    columns: list[str]
    rows: list[list[Any]]
    last_step: int
    has_more: bool
    measured: int


def finite(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The rows with null for NaN and infinity, which JSON does not know."""
    return [
        [None if isinstance(v, float) and not math.isfinite(v) else v for v in row] for row in rows
    ]


def report(job: JobRecord, app: Services | None) -> dict[str, Any] | None:
    """What the run measured, with the folder of the model for those who sit at this machine."""
    if job.summary is None:
        return None
    path = None
    if app and job.fine_tuned_model:
        found = app.model_path(job.project, job.fine_tuned_model)
        path = str(found) if found else None
    return {**job.summary, "model_path": path}


def _hyperparameters(job: JobRecord) -> dict[str, Any]:
    asked = job.request.get("hyperparameters") or {}
    resolved = job.hyperparameters or {}
    return {name: resolved.get(name) or asked.get(name) or "auto" for name in HYPERPARAMETERS}


def _failure(error: dict[str, Any]) -> dict[str, Any]:
    return {
        "code": str(error.get("code") or "internal_error"),
        "message": str(error.get("message") or "The job failed."),
        "param": error.get("param"),
        "log_excerpt": error.get("log_excerpt"),
    }


def _progress(job: JobRecord) -> Progress | None:
    if job.progress_step is None:
        return None
    total = job.total_steps
    return Progress(
        step=job.progress_step,
        total_steps=total,
        percent=round(100 * job.progress_step / total, 2) if total else None,
        tokens_per_second=job.tokens_per_second,
        eta_seconds=job.eta_seconds if job.status == "running" else None,
        loss=job.loss,
        omission_rate_mlp=job.omission_rate_mlp,
        omission_rate_attention=job.omission_rate_attention,
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
