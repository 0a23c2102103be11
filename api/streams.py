"""A job's history and what happens to it, as server-sent events that every client can read.

OpenAI's Python client dispatches a block at each blank line once it has seen an id, and then wants JSON: so `retry` stands
in the first block that carries data, a heartbeat is one comment line without a blank line behind it, and no block is
without data. Ids are numbers of events, so a client that comes back with `Last-Event-ID` misses nothing, whichever process
it meets. Progress is not an event that is kept: it has no id. The road not taken is FastAPI's own EventSourceResponse,
whose heartbeats end with a blank line and break that client.
"""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import ApiError, error_body, translate
from api.followers import Followed, Followers
from api.schemas.jobs import JobEvent
from jobs.errors import StoreUnavailable
from jobs.pulses import Pulse
from jobs.spec import EventRecord, Key

HEARTBEAT_SECONDS = 15.0
PROGRESS_SECONDS = 1.0
RETRY = "retry: 3000\n"
PING = ": ping\n"
DONE = "data: [DONE]\n\n"
# Names of SSE's own for the kinds of `jobs.recording`.
_NAMES = {"state": "status", "evaluation": "metrics", "checkpoint": "checkpoint"}


class EventStream(StreamingResponse):
    """A stream; `closed` is awaited when it ends, whoever ended it."""

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncIterator[str], *, closed: Callable[[], Awaitable[None]]
    ) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(content, headers=headers)
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._closed()


async def blocks(followers: Followers, key: Key, job_id: str, after: int) -> AsyncIterator[str]:
    """All that was told after event number `after`, then what is told, until the job or the key has ended."""
    try:
        async with followers.following(key.project, job_id) as job:
            async for block in _blocks(followers, key.id, job_id, job, after):
                yield block
    except (ApiError, StoreUnavailable) as error:
        # The answer has begun, so the error is a block; whoever comes back with the last id misses nothing.
        body = error_body(translate(error), "")
        yield f"data: {json.dumps(body)}\n\n"


async def _blocks(
    followers: Followers, key_id: str, job_id: str, job: Followed, after: int
) -> AsyncIterator[str]:
    retry = RETRY
    shown, shown_at = None, 0.0
    while True:
        followers.check_key(key_id)
        pulse = job.pulse
        events = await followers.events_after(job_id, job, after)
        for event in events:
            yield retry + _block(event)
            retry, after = "", event.seq
        if events:
            continue
        if pulse.ended:
            yield retry + DONE
            return
        now = time.monotonic()
        if pulse.progress_step not in (None, shown) and now - shown_at >= PROGRESS_SECONDS:
            yield retry + _progress(job_id, pulse)
            retry, shown, shown_at = "", pulse.progress_step, now
        if not await job.changed(pulse.version, HEARTBEAT_SECONDS):
            yield PING


def _block(event: EventRecord) -> str:
    name = _NAMES.get(event.kind, "warning" if event.level == "warn" else "message")
    return f"id: {event.seq}\nevent: {name}\ndata: {JobEvent.of(event).model_dump_json()}\n\n"


def _progress(job_id: str, pulse: Pulse) -> str:
    step, total, loss = pulse.progress_step, pulse.total_steps, pulse.loss
    words = f"Step {step}/{total}" + ("" if loss is None else f": training loss={loss:.4f}")
    event = JobEvent(
        id=f"progress-{job_id}-{pulse.version}",
        created_at=int(time.time()),
        level="info",
        message=words,
        type="metrics",
        data={
            "kind": "progress",
            "step": step,
            "total_steps": total,
            "train_loss": loss,
            "tokens_per_second": pulse.tokens_per_second,
            "eta_seconds": pulse.eta_seconds,
            "omission_rate_mlp": pulse.omission_rate_mlp,
            "omission_rate_attention": pulse.omission_rate_attention,
        },
    )
    return f"event: progress\ndata: {event.model_dump_json()}\n\n"
