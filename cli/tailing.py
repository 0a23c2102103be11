"""A job as it changes, and what is told of it: long polls that a server which is started again does not end.

The road not taken is the stream of server-sent events: it would need a parser of its own here, holds a seat of its key, and
does not pass every proxy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from cli.client import TERMINAL, TIMED_OUT, UNREACHABLE, WAIT_SECONDS, Client, CliError

T = TypeVar("T")

# Between two looks at a job that changes all the time.
PAUSE_S = 0.5
# A server that is started again is back within this.
AWAY_S = 60.0


def looks(
    client: Client, job_id: str, *, wait_s: float = WAIT_SECONDS, until: float | None = None
) -> Iterator[dict[str, Any]]:
    """The job now, at each change, and at least every `wait_s` seconds; ends once it has ended.

    Raises:
        CliError: TIMED_OUT where it goes on beyond `until`, a moment of `time.monotonic`.
    """
    job = client.job(job_id)
    while True:
        yield job
        if job["status"] in TERMINAL:
            return
        left = wait_s if until is None else until - time.monotonic()
        if left <= 0:
            raise CliError(
                f"{job_id} has not ended in time: {job['status_detail']['message']}.", TIMED_OUT
            )
        time.sleep(min(PAUSE_S, left))
        known = {"version": job["version"], "wait": min(wait_s, left)}
        job = patiently(partial(client.job, job_id, **known))


def events(
    client: Client, job_id: str, *, tail: int | None, follow: bool
) -> Iterator[dict[str, Any]]:
    """What was told of a job, oldest first, or the last `tail` of it; with `follow` also what is told until it ends."""
    after: dict[str, Any] = {}
    if tail is not None:
        newest = client.events(job_id, limit=tail, order="desc")["data"]
        yield from reversed(newest)
        after = {"after": newest[0]["id"]} if newest else {}
    for _ in looks(client, job_id):
        more = tail is None or follow
        while more:
            page = patiently(partial(client.events, job_id, order="asc", limit=100, **after))
            yield from page["data"]
            if page["data"]:
                after = {"after": page["data"][-1]["id"]}
            more = page["has_more"]
        if not follow:
            return


def metrics(client: Client, job_id: str, *, after: int, follow: bool) -> Iterator[dict[str, Any]]:
    """Measured rows above step `after` by their columns' names; with `follow` also what is measured until the job ends.

    The newest row of a job that goes on is held back: an evaluation at its step would still be added to it.
    """
    for job in looks(client, job_id):
        more = True
        while more:
            page = patiently(partial(client.metrics, job_id, after=after))
            more = page["has_more"]
            rows = page["rows"]
            if follow and not more and job["status"] not in TERMINAL:
                rows = rows[:-1]
            for row in rows:
                found = dict(zip(page["columns"], row, strict=True))
                yield found
                after = found["step"]
        if not follow:
            return


def patiently(ask: Callable[[], T]) -> T:
    """The answer, waiting for a server that is away: what trains goes on meanwhile."""
    limit = time.monotonic() + AWAY_S
    while True:
        try:
            return ask()
        except CliError as error:
            if error.exit_code != UNREACHABLE or time.monotonic() > limit:
                raise
        time.sleep(1)
