"""`/v1/fine_tuning/jobs/{id}/...` while a job runs and after: events, their stream, metrics, checkpoints and their pins."""

from contextlib import AsyncExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from api.auth import Caller, require_key
from api.deps import App, Services
from api.etags import IfNoneMatch, tagged
from api.schemas.jobs import Checkpoint, JobEvent, JobMetrics, finite
from api.schemas.lists import After, ListOf, Order
from api.schemas.problems import UNCHANGED, answers
from api.streams import EventStream, blocks
from jobs.csv_table import csv_table
from jobs.measures import STEP
from jobs.spec import CheckpointRecord

router = APIRouter(
    prefix="/v1/fine_tuning/jobs/{job_id}",
    tags=["fine-tuning"],
    dependencies=[Depends(require_key)],
)

Limit = Annotated[int, Query(ge=1, le=100)]
MAX_POINTS = 2000
CSV = "text/csv"


@router.get(
    "/events",
    operation_id="listFineTuningEvents",
    response_model=ListOf[JobEvent],
    responses=UNCHANGED | answers("job_not_found", "invalid_value", "invalid_cursor"),
)
def list_events(
    job_id: str,
    app: App,
    key: Caller,
    after: After = None,
    limit: Limit = 20,
    order: Order = "desc",
    if_none_match: IfNoneMatch = None,
) -> Response:
    """What was told of a job; with `If-None-Match` 304 while nothing has changed."""
    headers, same = _tag(app, key.project, job_id, if_none_match)
    if same:
        return Response(status_code=304, headers=headers)
    page = app.store.events(
        key.project, job_id, after=after, limit=limit, newest_first=order == "desc"
    )
    events = [JobEvent.of(e) for e in page.items]
    return _json(ListOf[JobEvent].of(events, has_more=page.has_more), headers)


@router.get(
    "/stream",
    operation_id="streamFineTuningJob",
    response_class=StreamingResponse,
    responses={
        **answers("job_not_found", "invalid_cursor", "too_many_streams"),
        200: {"content": {EventStream.media_type: {"schema": {"type": "string"}}}},
    },
)
async def stream_job(
    job_id: str,
    app: App,
    key: Caller,
    after: Annotated[
        str | None, Query(description="Id or number of the last event that is known.")
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="The same, as browsers send it when they come back.")
    ] = None,
) -> EventStream:
    """All that was told of a job and then what is told, as server-sent events; `[DONE]` once it has ended."""
    await run_in_threadpool(app.store.pulse, key.project, job_id)
    cursor = last_event_id or after
    number = await run_in_threadpool(app.store.event_number, job_id, cursor) if cursor else 0
    app.followers.take_seat(key.id)
    stack = AsyncExitStack()
    stack.callback(app.followers.leave_seat, key.id)
    return EventStream(blocks(app.followers, key, job_id, number), closed=stack.aclose)


@router.get(
    "/metrics",
    operation_id="listFineTuningJobMetrics",
    response_model=JobMetrics,
    responses={
        **answers("job_not_found", "invalid_value"),
        **UNCHANGED,
        200: {"content": {CSV: {"schema": {"type": "string"}}}},
    },
)
def list_metrics(
    job_id: str,
    app: App,
    key: Caller,
    after: Annotated[int, Query(ge=-1, le=2**62, description="Only steps above this one.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Rows of a page.")] = 1000,
    resolution: Annotated[
        int | None,
        Query(
            ge=2,
            le=MAX_POINTS,
            description="About so many rows instead of a page: of each stretch the lowest and the highest loss, "
            "beside all evaluations, changes of an omission rate, and both ends.",
        ),
    ] = None,
    format: Annotated[
        Literal["json", "csv"] | None,
        Query(
            description="csv gives every row, or as many as `resolution` says; so does `Accept: text/csv`."
        ),
    ] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Measured rows in order of steps; step 0 is the evaluation before training."""
    headers, same = _tag(app, key.project, job_id, if_none_match)
    headers["vary"] = "Accept"
    if same:
        return Response(status_code=304, headers=headers)
    wants_csv = format == "csv" or (format is None and accept.startswith(CSV))
    if wants_csv and resolution is None:
        lots = app.store.each_metric(key.project, job_id, after_step=after)
        return StreamingResponse(csv_table(lots), media_type=CSV, headers=headers)
    if resolution is not None:
        columns, rows, measured = app.store.thinned_metrics(
            key.project, job_id, after_step=after, max_rows=resolution
        )
        more = False
    else:
        columns, rows, more = app.store.metrics(key.project, job_id, after_step=after, limit=limit)
        measured = len(rows)
    if wants_csv:
        return Response("".join(csv_table([rows])), media_type=CSV, headers=headers)
    table = JobMetrics(
        columns=list(columns),
        rows=finite(rows),
        last_step=rows[-1][STEP] if rows else after,
        has_more=more,
        measured=measured,
    )
    return _json(table, headers)


@router.get(
    "/checkpoints",
    operation_id="listFineTuningJobCheckpoints",
    responses=answers("job_not_found", "invalid_value", "invalid_cursor"),
)
def list_checkpoints(
    job_id: str, app: App, key: Caller, after: After = None, limit: Limit = 10
) -> ListOf[Checkpoint]:
    """Checkpoints of a job, newest first."""
    job = app.store.get_job(key.project, job_id)
    page = app.store.checkpoints(key.project, job_id, after=after, limit=limit)
    return ListOf[Checkpoint].of(
        [Checkpoint.of(c, job) for c in page.items], has_more=page.has_more
    )


@router.get(
    "/checkpoints/{checkpoint_id}",
    operation_id="retrieveFineTuningJobCheckpoint",
    responses=answers("job_not_found", "checkpoint_not_found"),
)
def retrieve_checkpoint(job_id: str, checkpoint_id: str, app: App, key: Caller) -> Checkpoint:
    """One checkpoint."""
    return _shown(app, app.store.get_checkpoint(key.project, job_id, checkpoint_id), key.project)


@router.post(
    "/checkpoints/{checkpoint_id}/pin",
    operation_id="pinFineTuningJobCheckpoint",
    responses=answers("job_not_found", "checkpoint_not_found"),
)
def pin_checkpoint(job_id: str, checkpoint_id: str, app: App, key: Caller) -> Checkpoint:
    """Keep a checkpoint whatever its run tidies away. It costs no copy; a pinned one stays pinned."""
    found = app.store.get_checkpoint(key.project, job_id, checkpoint_id)
    return _shown(app, app.pinned(key.project, found), key.project)


@router.post(
    "/checkpoints/{checkpoint_id}/unpin",
    operation_id="unpinFineTuningJobCheckpoint",
    responses=answers("job_not_found", "checkpoint_not_found", "model_in_use"),
)
def unpin_checkpoint(job_id: str, checkpoint_id: str, app: App, key: Caller) -> Checkpoint:
    """Leave a checkpoint to its run again. One that the run has tidied away meanwhile is deleted: `available` is false."""
    found = app.store.get_checkpoint(key.project, job_id, checkpoint_id)
    available = True
    if found.pinned_from is not None:
        pinned = found.path
        available = app.artifacts.absolute(found.pinned_from).is_dir()
        found = app.store.unpin_checkpoint(key.project, found, still_there=available)
        app.artifacts.delete(pinned)
    return _shown(app, found, key.project).model_copy(update={"available": available})


def _shown(app: Services, found: CheckpointRecord, project: str) -> Checkpoint:
    return Checkpoint.of(found, app.store.get_job(project, found.job_id))


def _tag(
    app: Services, project: str, job_id: str, if_none_match: str | None
) -> tuple[dict[str, str], bool]:
    """Headers of an answer that changes only with its job, and whether the client has it. Raises NotFound."""
    return tagged(f"j{app.store.pulse(project, job_id).version}", if_none_match)


def _json(body: BaseModel, headers: dict[str, str]) -> Response:
    """The model as it is: FastAPI would check once more what was just made."""
    return Response(body.model_dump_json(), media_type="application/json", headers=headers)
