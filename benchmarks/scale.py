"""What a service that has been used for years asks of its API: long lists, a run of a million steps, many who listen.

Jobs and rows are written straight into their tables, as many and as wide as real ones, since no claim about writing them is
made here; the spans of the rows are made by the code that makes them while a job trains. All is asked over HTTP, one
request at a time. Listeners hold a stream of a job that runs and of which nothing is told.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import psutil
from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import Session

from benchmarks.load import request
from benchmarks.report import figure, median
from benchmarks.servers import API, Server
from benchmarks.tracking import Material, claimed
from jobs.db import make_engine
from jobs.measures import METRIC_COLUMNS
from jobs.models import JobRow, MetricRow
from jobs.settings import Settings
from jobs.spans import STEPS, span_of, span_row
from jobs.spec import Claim, new_id
from jobs.store import Store

JOBS, ROWS, LISTENERS = 10_000, 1_000_000, 500
EVALUATED_EVERY = 10_000
RESOLUTION = 1000
SUMMARISED = ("step", "loss", "omission_rate_mlp", "omission_rate_attention")
LIST_BAR_MS, METRICS_BAR_MS, LISTENERS_BAR_MB = 100.0, 300.0, 300.0
TIMES = 20
LOT = 10_000
# How long the listeners listen before they are counted.
HELD_SECONDS = 5.0
MB = 1e6
Figures = list[dict[str, Any]]


def measure(server: Server, material: Material, *, database: str) -> Figures:
    """Figures of listeners, lists and metrics on one server, whose API allows a key so many streams."""
    engine = make_engine(Settings(data_dir=server.folder, database_url=server.database_url))
    try:
        claim = claimed(Store(engine), material)
        figures = _listeners(server, claim.job_id, database)
        print(f"{database}, scale: listeners done", flush=True)
        _add_jobs(engine, claim.job_id)
        figures += _lists(server, engine, database)
        print(f"{database}, scale: lists done", flush=True)
        _add_rows(engine, claim, material)
        return figures + _metrics(server, claim.job_id, database)
    finally:
        engine.dispose()


# Who listens


def _listeners(server: Server, job_id: str, database: str) -> Figures:
    path = f"/v1/fine_tuning/jobs/{job_id}/stream"
    api = psutil.Process(server.pids[API])
    before = _resident(api)
    cpu, held = asyncio.run(_listen(server, path, api))
    told = f"{database}: {LISTENERS} idle listeners"
    return [
        figure(f"{told}, memory of the API", held, "MB", LISTENERS_BAR_MB, "lower"),
        figure(f"{told}, memory of the API before them", before, "MB", None, "lower"),
        figure(f"{told}, CPU of the API, of one core", cpu, "%", None, "lower"),
    ]


async def _listen(server: Server, path: str, api: psutil.Process) -> tuple[float, float]:
    """Percent of a core and resident megabytes while all listen."""
    connected = [await _connect(server, path) for _ in range(LISTENERS)]
    used, began = api.cpu_times(), time.perf_counter()
    await asyncio.sleep(HELD_SECONDS)
    now = api.cpu_times()
    cpu = 100 * (now.user + now.system - used.user - used.system) / (time.perf_counter() - began)
    held = _resident(api)
    for writer in connected:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in connected))
    return cpu, held


async def _connect(server: Server, path: str) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("GET", path, server.headers))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.splitlines()[0]:
        raise RuntimeError(head.decode())
    await reader.readuntil(b"\n\n")
    return writer


def _resident(process: psutil.Process) -> float:
    processes = (process, *process.children(recursive=True))
    return sum(p.memory_info().rss for p in processes) / MB


# Many jobs


def _add_jobs(engine: Engine, like: str) -> None:
    """Ended jobs with all that the row of `like` says."""
    with engine.begin() as connection:
        query = select(JobRow.__table__).where(JobRow.id == like)
        one = dict(connection.execute(query).one()._mapping)
        one |= {"status": "succeeded", "owner": None, "finished_at": one["created_at"]}
        del one["seq"]
        for _ in range(JOBS // LOT):
            rows = [one | {"id": new_id("ftjob-")} for _ in range(LOT)]
            connection.execute(insert(JobRow.__table__), rows)


def _lists(server: Server, engine: Engine, database: str) -> Figures:
    with engine.connect() as connection:
        deep = connection.execute(select(JobRow.id).order_by(JobRow.seq).offset(200)).scalar()
    told, path = f"{database}: {JOBS} jobs", "/v1/fine_tuning/jobs?limit=100"
    return [
        _asked(server, f"{told}, the first 100", path, LIST_BAR_MS),
        _asked(server, f"{told}, 100 of the last", f"{path}&after={deep}", LIST_BAR_MS),
        _asked(server, f"{told}, 100 that have ended", f"{path}&status=succeeded", LIST_BAR_MS),
    ]


# A long run


def _add_rows(engine: Engine, claim: Claim, material: Material) -> None:
    """Losses of a real run again and again, and its omission rates once, drawn out over all."""
    events = [json.loads(line) for line in material.lines]
    summary = [(0, None, None, None)]
    for first in range(1, ROWS + 1, LOT):
        rows = [_row(claim, step, events) for step in range(first, first + LOT)]
        summary += [tuple(row[name] for name in SUMMARISED) for row in rows]
        with engine.begin() as connection:
            connection.execute(insert(MetricRow.__table__), rows)
    with Session(engine) as session, session.begin():
        for span in range(span_of(ROWS) + 1):
            begin = max(0, span * STEPS - 1)
            session.add(span_row(claim.job_id, span, summary[begin : (span + 1) * STEPS]))


def _row(claim: Claim, step: int, events: list[dict[str, Any]]) -> dict[str, Any]:
    event, drawn_out = events[step % len(events)], events[(step - 1) * len(events) // ROWS]
    row = {name: event.get(name) for name in METRIC_COLUMNS}
    row |= {"job_id": claim.job_id, "attempt": claim.attempt, "step": step}
    row |= {name: drawn_out[name] for name in SUMMARISED if name.startswith("omission_rate")}
    return row | {"eval_loss": event["loss"] if step % EVALUATED_EVERY == 0 else None}


def _metrics(server: Server, job_id: str, database: str) -> Figures:
    path = f"/v1/fine_tuning/jobs/{job_id}/metrics"
    told = f"{database}: {ROWS} rows of metrics"
    late = ROWS - RESOLUTION
    return [
        _asked(server, f"{told}, as {RESOLUTION}", f"{path}?resolution={RESOLUTION}", METRICS_BAR_MS),
        _asked(server, f"{told}, as {RESOLUTION} of the second half", f"{path}?resolution={RESOLUTION}&after={ROWS // 2}", METRICS_BAR_MS),
        _asked(server, f"{told}, a page of the newest {RESOLUTION}", f"{path}?after={late}", None),
    ]  # fmt: skip


def _asked(server: Server, name: str, path: str, bar: float | None) -> dict[str, Any]:
    """Milliseconds of the whole answer; the first, which opens what is kept open, is not counted."""
    took = []
    with server.client() as client:
        client.get(path).raise_for_status()
        for _ in range(TIMES):
            began = time.perf_counter()
            client.get(path).raise_for_status()
            took.append(1000 * (time.perf_counter() - began))
    return median(name, took, "ms", bar, better="lower")
