"""`/v1/fine_tuning/estimates`: what a job would do and take, before there is one.

The data is rendered as a job's would be, by a worker, into the corpus that a later job finds ready; so the estimate counts
the very sequences of the run, and a job costs no second rendering. Nothing else is left behind.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import datasets
from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas.create import BODY_CODES, CreateJob, check, json_object, openapi_body
from api.schemas.estimates import (
    Estimate,
    EstimatedData,
    EstimatedEnergy,
    EstimatedMemory,
    EstimatedTime,
    EstimateError,
    Flops,
    PastError,
    PhaseSpeedup,
    Range,
    Span,
    Speedup,
)
from api.schemas.problems import answers
from jobs import quoting
from jobs.errors import NotFound
from jobs.spec import ChoreRecord

router = APIRouter(
    prefix="/v1/fine_tuning/estimates", tags=["fine-tuning"], dependencies=[Depends(require_key)]
)

KIND = "estimate"
Wait = Annotated[float, Query(ge=0, le=60, description="Seconds to wait for it to be ready.")]


@router.post(
    "",
    operation_id="createFineTuningEstimate",
    openapi_extra=openapi_body(),
    responses=answers("invalid_request", *BODY_CODES),
)
async def create_estimate(
    request: Request, response: Response, app: App, key: Caller, wait: Wait = 0
) -> Estimate:
    """Estimate a job from the body that would create it. The same body is the same estimate, and costs nothing twice."""
    create = check(await json_object(request))
    return _told(await estimate(app, key.project, create, wait), response)


@router.get(
    "/{estimate_id}",
    operation_id="retrieveFineTuningEstimate",
    responses=answers("estimate_not_found", "invalid_value", "queue_quota_exceeded"),
)
async def retrieve_estimate(
    estimate_id: str, response: Response, app: App, key: Caller, wait: Wait = 0
) -> Estimate:
    """One estimate; its time is that of the runs known now."""
    return _told(await estimate_again(app, key.project, estimate_id, wait), response)


async def estimate(app: Services, project: str, create: CreateJob, wait: float) -> Estimate:
    """The estimate of a create that was checked, as it stands after so many seconds at the most."""
    params = await run_in_threadpool(_params, app, project, create)
    chore = await datasets.ask(app, project, KIND, create.training_file, params, wait)
    return await run_in_threadpool(_answer, app, chore)


async def estimate_again(app: Services, project: str, estimate_id: str, wait: float) -> Estimate:
    """An estimate that was asked for, as it stands after so many seconds at the most."""
    chore = await run_in_threadpool(_found, app, project, estimate_id)
    if wait and chore.status not in datasets.ENDED:
        chore = await datasets.ask(app, project, KIND, chore.subject, chore.params, wait)
    return await run_in_threadpool(_answer, app, chore)


def _told(found: Estimate, response: Response) -> Estimate:
    if found.status == "pending":
        response.headers["retry-after"] = "1"
    return found


def _params(app: Services, project: str, create: CreateJob) -> dict[str, Any]:
    """All that decides the estimate besides the training file; refuses what a create refuses."""
    datasets.refuse_unusable(app, project, create)
    return {
        "request": create.run.to_dict(),
        "validation_file": create.validation_file,
        "model_version": datasets.model_version(app, create.run.model),
    }


def _found(app: Services, project: str, estimate_id: str) -> ChoreRecord:
    try:
        chore = app.store.get_chore(project, estimate_id)
    except NotFound as error:
        raise _unknown(estimate_id) from error
    if chore.kind != KIND:
        raise _unknown(estimate_id)
    return chore


def _unknown(estimate_id: str) -> ApiError:
    return ApiError("estimate_not_found", f"No estimate {estimate_id!r} exists.")


def _answer(app: Services, chore: ChoreRecord) -> Estimate:
    status = {"succeeded": "ready", "failed": "failed"}.get(chore.status, "pending")
    shown = {
        "id": chore.id,
        "created_at": int(chore.created_at),
        "status": status,
        "model": chore.params["request"]["model"],
        "training_file": chore.subject,
    }
    if chore.error is not None:
        shown["error"] = EstimateError.model_validate(chore.error)
    if chore.result is not None:
        shown |= _quoted(app, chore.project, chore.result)
    return Estimate.model_validate(shown)


def _quoted(app: Services, project: str, result: dict[str, Any]) -> dict[str, Any]:
    past = app.store.past_runs(project)
    quote, hardware = result["quote"], result["hardware"]
    time = quoting.timed(result, past)
    memory = _memory(result, *quoting.peak(result, past))
    warnings = list(result["warnings"])
    if memory.fits is False:
        warnings.append(
            f"{hardware['name']} has {memory.available} bytes and the run needs about {memory.peak.expected:.0f}: lower "
            "sat.train.micro_batch_size or max_seq_len, set sat.train.gradient_checkpointing, or tune with lora."
        )
    return {
        "hardware": hardware["name"],
        "hyperparameters": result["hyperparameters"],
        "data": _data(result),
        "flops": Flops.model_validate(quote["flops"]),
        "speedup": _speedup(quote, time.rates),
        "time": _time(time, app.queueing.newcomer()),
        "memory": memory,
        "energy": EstimatedEnergy(joules=quoting.joules(result, past, time)),
        "warnings": warnings,
    }


def _data(result: dict[str, Any]) -> EstimatedData:
    figures, config, quote = result["figures"], result["config"], result["quote"]
    real = figures["tokens"] / figures["sequences"] * config["batch_size"] * config["total_steps"]
    return EstimatedData(
        rows=figures["rows"],
        sequences=figures["sequences"],
        tokens=figures["tokens"],
        trained_tokens=quote["labels"],
        truncated_rows=figures.get("truncated_rows") or 0,
        truncated_tokens=figures.get("truncated_tokens") or 0,
        untrained_rows=figures.get("untrained_rows") or 0,
        duplicate_rows=figures.get("duplicate_rows") or 0,
        seq_len=figures["seq_len"],
        longest=figures["longest"],
        steps=config["total_steps"],
        padding_share=max(0.0, 1 - real / max(1, quote["tokens"])),
    )


def _speedup(quote: dict[str, Any], rates: quoting.Rates | None) -> Speedup:
    phases = quote["phases"]
    expected = quoting.phase_speedups(phases, rates)
    return Speedup(
        flop_bound=1 / quote["flops"]["ratio"],
        expected=quoting.whole_speedup(phases, rates),
        by_phase=[
            PhaseSpeedup.model_validate({**p, "flop_bound": 1 / p["ratio"], "expected": e})
            for p, e in zip(phases, expected, strict=True)
        ],
    )


def _time(time: quoting.Timed, queue: tuple[float, float] | None) -> EstimatedTime:
    error = None
    if time.errors:
        mean = sum(map(abs, time.errors)) / len(time.errors)
        error = PastError(quotes=len(time.errors), mean_absolute=mean, last=time.errors[0])
    return EstimatedTime(
        basis="calibrated" if time.calibrated else "analytic",
        seconds=Range.of(time.seconds) if time.seconds else None,
        queue_seconds=Span(low=queue[0], high=queue[1]) if queue else None,
        runs=time.runs,
        past_error=error,
    )


def _memory(result: dict[str, Any], measured: bool, span: quoting.Span) -> EstimatedMemory:
    available = result["hardware"]["memory_bytes"]
    fits = None
    if available is not None:
        fits = True if span[2] <= available else False if span[1] > available else None
    parts = {k: v for k, v in result["quote"]["memory_bytes"].items() if k != "peak"}
    return EstimatedMemory(
        basis="calibrated" if measured else "analytic",
        peak=Range.of(span),
        available=available,
        fits=fits,
        **parts,
    )
