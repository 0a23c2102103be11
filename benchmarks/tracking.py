"""The same operations on Satune and on MLflow's tracking server, in turn, on the same database software.

Each thing is done by the road that each system's own users take: Satune's worker writes metrics through `jobs.store` inside
its process, from lines of events.jsonl which it parses; MLflow's clients post them to `runs/log-batch`. A row is one
training step: Satune keeps it as one row of columns, MLflow as one row a metric, and both are given the same numbers of a
real run. MLflow's server has its default four processes, Satune's API its one.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Outcome, Plan, press, request
from benchmarks.report import median
from benchmarks.servers import Server
from jobs.db import make_engine
from jobs.settings import Settings
from jobs.spec import Claim, NewJob
from jobs.states import Stage
from jobs.store import Store

CONNECTIONS = 8
PROJECT = "default"
# MLflow takes at most 1,000 metrics a request, which are 83 steps of twelve.
BATCHES = (1, 10, 80)
WRITERS = (1, 4)
# More bodies than MLflow takes in a second, so that none runs short of them.
BODIES_PER_SECOND = {1: 600, 10: 300, 80: 60}
WARM_SECONDS = 60.0
SUBMISSIONS = "job submissions (MLflow: runs created)"
Measure = Callable[[], float]


@dataclass(frozen=True)
class Material:
    """What jobs and rows are made of: a job's body, its frozen configuration, and lines that its run wrote."""

    body: dict[str, Any]
    prepared: dict[str, Any]
    lines: Sequence[str]


def claimed(store: Store, material: Material) -> Claim:
    """A new job, prepared, and claimed for training."""
    body = material.body
    new = NewJob(
        request=material.prepared["request"], model=body["model"], training_file=body["training_file"], seed=1
    )  # fmt: skip
    store.create_job(PROJECT, new)
    preparing = store.claim("benchmark", Stage.PREPARE)
    assert preparing is not None
    store.finish_prepare(preparing, material.prepared)
    training = store.claim("benchmark", Stage.TRAIN)
    assert training is not None
    return training


class OwnWriters:
    """Claimed jobs of a Satune database, into which threads record as the worker's do."""

    def __init__(self, server: Server, material: Material) -> None:
        settings = Settings(data_dir=server.folder, database_url=server.database_url)
        self.engine = make_engine(settings)
        self.store = Store(self.engine)
        self.lines = material.lines
        self.claims = [claimed(self.store, material) for _ in range(max(WRITERS))]
        self.steps = {claim.job_id: itertools.count(1) for claim in self.claims}

    def rows_per_second(self, seconds: float, batch: int, writers: int) -> float:
        """Rows that `writers` threads bring into the database in batches."""
        until = time.perf_counter() + seconds
        rows = [0] * writers
        failed: list[BaseException] = []

        def write(number: int) -> None:
            try:
                rows[number] = self._write(self.claims[number], batch, until)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
                failed.append(error)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return sum(rows) / (time.perf_counter() - started)

    def _write(self, claim: Claim, batch: int, until: float) -> int:
        lines, steps, written = itertools.cycle(self.lines), self.steps[claim.job_id], 0
        run = f"runs/{claim.job_id}/{claim.attempt}"
        while time.perf_counter() < until:
            events = [json.loads(line) for line in itertools.islice(lines, batch)]
            for event in events:
                event["step"] = event["seq"] = next(steps)
            self.store.record(claim, events, run=run, read_position=events[-1]["seq"])
            written += batch
        return written


class MlflowWriters:
    """Runs of a tracking server, into which connections post the same numbers."""

    def __init__(self, server: Server, material: Material, columns: Sequence[str]) -> None:
        self.server = server
        events = [json.loads(line) for line in material.lines]
        self.rows = [
            [(name, float(e[name])) for name in columns if e.get(name) is not None] for e in events
        ]
        with server.client() as client:
            self.runs = [self._run(client) for _ in range(max(WRITERS))]
        self.steps = [itertools.count(1) for _ in self.runs]

    def _run(self, client: Any) -> str:
        body = {"experiment_id": "0", "start_time": _milliseconds()}
        answer = client.post("/api/2.0/mlflow/runs/create", json=body)
        answer.raise_for_status()
        return str(answer.json()["run"]["info"]["run_id"])

    def rows_per_second(self, seconds: float, batch: int, writers: int) -> float:
        """Rows that `writers` connections bring into the database in batches, each into a run of its own."""
        count = max(4, round(BODIES_PER_SECOND[batch] * seconds))
        bodies = [tuple(itertools.islice(self._bodies(n, batch), count)) for n in range(writers)]
        outcome = press(
            Plan(
                port=self.server.port, requests=bodies, connections=writers, seconds=seconds, once=True
            )
        )  # fmt: skip
        return _checked(outcome).per_second * batch

    def _bodies(self, number: int, batch: int) -> Iterator[bytes]:
        rows = itertools.cycle(self.rows)
        while True:
            metrics = [
                {"key": name, "value": value, "timestamp": _milliseconds(), "step": step}
                for step, row in zip(
                    itertools.islice(self.steps[number], batch), rows, strict=False
                )
                for name, value in row
            ]
            body = json.dumps({"run_id": self.runs[number], "metrics": metrics}).encode()
            yield request("POST", "/api/2.0/mlflow/runs/log-batch", body=body)


def compare(
    ours: Server,
    theirs: Server | None,
    material: Material,
    *,
    database: str,
    rounds: int,
    seconds: float,
    whole: bool,
) -> list[dict[str, Any]]:
    """Figures of all operations; without MLflow only ours. `whole` takes all batches and numbers of writers."""
    writers = OwnWriters(ours, material)
    job = writers.claims[0].job_id
    writers.rows_per_second(0.5, 10, 1)
    columns, _, _ = writers.store.metrics(PROJECT, job, after_step=-1, limit=1)
    names = [c for c in columns if c not in ("job_id", "step", "attempt", "time")]
    path = f"/v1/fine_tuning/jobs/{job}"
    body = json.dumps(material.body).encode()
    create = request("POST", "/v1/fine_tuning/jobs", ours.headers, body)
    combinations = [(b, w) for b in BATCHES for w in WRITERS] if whole else [(1, 1), (10, 1)]

    pairs: dict[str, tuple[Measure, Measure | None]] = {
        "status polls, whole answers": (_rate(ours, request("GET", path, ours.headers), seconds), None),
        SUBMISSIONS: (_rate(ours, create, seconds), None),
    }  # fmt: skip
    for batch, count in combinations:
        pairs[_ingest(batch, count)] = (_writing(writers, seconds, batch, count), None)
    if theirs is not None:
        rival = MlflowWriters(theirs, material, names)
        rival.rows_per_second(0.5, 10, 1)
        get = request("GET", f"/api/2.0/mlflow/runs/get?run_id={rival.runs[0]}")
        _warm(theirs, get)
        run = json.dumps({"experiment_id": "0", "start_time": _milliseconds()}).encode()
        made = request("POST", "/api/2.0/mlflow/runs/create", body=run)
        others = [_rate(theirs, get, seconds), _rate(theirs, made, seconds)]
        others += [_writing(rival, seconds, batch, count) for batch, count in combinations]
        pairs = {
            name: (mine, other)
            for (name, (mine, _)), other in zip(pairs.items(), others, strict=True)
        }
    unchanged = _rate(ours, request("GET", path, ours.headers), seconds, etags=True)
    pairs["status polls, 304 where unchanged"] = (
        unchanged,
        pairs["status polls, whole answers"][1],
    )
    try:
        return _figures(database, pairs, rounds)
    finally:
        writers.engine.dispose()


def _figures(
    database: str, pairs: dict[str, tuple[Measure, Measure | None]], rounds: int
) -> list[dict[str, Any]]:
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in pairs}
    for number in range(rounds):
        for name, (mine, other) in pairs.items():
            if other is None:
                found[name].append((mine(), None))
            elif number % 2:
                late = other()
                found[name].append((mine(), late))
            else:
                found[name].append((mine(), other()))
        print(f"{database}: round {number + 1}/{rounds}", flush=True)
    figures = []
    for name, values in found.items():
        told = f"{database}: {name}"
        figures.append(median(f"{told}, Satune", [m for m, _ in values], "1/s"))
        others = [o for _, o in values if o is not None]
        if others:
            figures.append(median(f"{told}, MLflow", others, "1/s"))
            ratios = [m / o for m, o in values if o]
            # Submitting is shown, not held to a bar: a job is checked and costs hours, a run of MLflow is a name.
            bar = None if name == SUBMISSIONS else 1.0
            figures.append(median(f"{told}, Satune over MLflow", ratios, "x", bar))
    return figures


def _ingest(batch: int, writers: int) -> str:
    many = f"{writers} writer" + "s" * (writers > 1)
    return f"metric rows, {many}, {batch} a batch"


def _writing(
    writers: OwnWriters | MlflowWriters, seconds: float, batch: int, count: int
) -> Measure:
    return lambda: writers.rows_per_second(seconds, batch, count)


def _rate(server: Server, sent: bytes, seconds: float, *, etags: bool = False) -> Measure:
    plan = Plan(
        port=server.port, requests=[[sent]], connections=CONNECTIONS, seconds=seconds, etags=etags
    )
    return lambda: _checked(press(plan)).per_second


def _checked(outcome: Outcome) -> Outcome:
    """What was refused is a fault of this program; what was not answered only counts for nothing."""
    if any(outcome.failures.keys() - {0}):
        raise RuntimeError(f"answers by status, 0 for none: {outcome.statuses}")
    return outcome


def _warm(server: Server, sent: bytes) -> None:
    """Ask until each of its processes has opened the database, which it does at its first request and takes seconds."""
    plan = Plan(port=server.port, requests=[[sent]], connections=4 * CONNECTIONS, seconds=2)
    deadline = time.monotonic() + WARM_SECONDS
    while time.monotonic() < deadline:
        outcome = _checked(press(plan))
        if not outcome.failures and outcome.quantile(1) < 2:
            return


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def lines_of(events: Path) -> list[str]:
    """The metrics lines of a run's events.jsonl."""
    return [
        line for line in events.read_text().splitlines() if json.loads(line)["kind"] == "metrics"
    ]
