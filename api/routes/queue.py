"""`/v1/sat/queue`: what waits, what runs, what is free. Of other projects it tells numbers only."""

from fastapi import APIRouter, Depends

from api.auth import Caller, require_key
from api.deps import App
from api.schemas.problems import answers
from api.schemas.queue import Queue, QueuedJob, QueueLine
from jobs.states import Stage

router = APIRouter(prefix="/v1/sat", tags=["queue"], dependencies=[Depends(require_key)])

MAX_SHOWN = 100


@router.get("/queue", operation_id="retrieveQueue", responses=answers())
def retrieve_queue(app: App, key: Caller) -> Queue:
    """The queue of each stage, and the places in it of this project's jobs (the first hundred)."""
    seen = app.queueing.snapshot()
    own = [
        (stage, i, waiter.job_id)
        for stage in Stage
        for i, waiter in enumerate(seen.lines[stage].waiting)
        if waiter.project == key.project
    ]
    return Queue(
        workers=seen.workers,
        stages={
            stage.value: QueueLine(
                waiting=len(seen.lines[stage].waiting),
                running=len(seen.lines[stage].left),
                slots=seen.slots[stage],
                slots_free=max(0, seen.slots[stage] - len(seen.lines[stage].left)),
            )
            for stage in Stage
        },
        jobs=[
            QueuedJob.of(job_id, app.queueing.place_of(seen, stage, i))
            for stage, i, job_id in own[:MAX_SHOWN]
        ],
        has_more=len(own) > MAX_SHOWN,
    )
