"""What the service takes and what it costs: polls while a job trains, rows, submissions, and the time training loses to it.

    python benchmarks/service.py [--quick] [--json FILE] [--work DIR] [--only polls overhead scale tracking]

Satune's own processes, as `satune up` starts them, on SQLite and on PostgreSQL; MLflow's tracking server beside them in the
same run, in a virtual environment that is made in the work folder. Arms take turns, and figures are medians with their
smallest and largest values. `overhead` trains the same frozen configuration through the service and alone, A B A B; both at
nice 10, as the worker starts its children, so that the difference is the service and not the priority.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import scale, tracking
from benchmarks.load import trivial_server
from benchmarks.polls import measure
from benchmarks.report import figure, median, table, write
from benchmarks.servers import (
    MLFLOW,
    NotStartedError,
    Server,
    mlflow,
    mlflow_environment,
    postgresql,
    satune,
)
from cli.demo_material import Material, make
from jobs.db import make_engine
from jobs.settings import Settings
from jobs.store import Store
from worker.child import NICENESS

PARTS = ("polls", "overhead", "scale", "tracking")
OVERHEAD_BAR = 1.0
TRACKING_SECONDS = 1.5
TERMINAL = ("succeeded", "failed", "cancelled")
BOTH = ("SQLite", "PostgreSQL")
Figures = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: what `--quick` shortens."""

    rounds: int
    poll_seconds: float
    pairs: int
    training_seconds: float
    # Of those that are there: where polls are measured, where MLflow stands beside, and where lists and rows are long.
    polled: tuple[str, ...]
    rivalled: tuple[str, ...]
    scaled: tuple[str, ...]
    whole: bool


# Meant for twelve minutes and six on two quiet cores.
FULL = Size(rounds=3, poll_seconds=3, pairs=3, training_seconds=18, polled=BOTH, rivalled=BOTH, scaled=BOTH, whole=True)  # fmt: skip
QUICK = Size(rounds=2, poll_seconds=2, pairs=2, training_seconds=14, polled=BOTH[:1], rivalled=BOTH[:1], scaled=(), whole=False)  # fmt: skip


@dataclass(eq=False)
class Bench:
    """Where things lie, and the material that all parts share."""

    work: Path
    scratch: Path
    size: Size
    material: Material
    databases: dict[str, Callable[[str], str]]

    @contextmanager
    def server(
        self,
        name: str,
        database: str,
        *,
        worker: bool,
        threads: int | None = None,
        streams: int = 20,
    ) -> Iterator[Server]:
        """Satune on a data folder `name`, kept until the end of the benchmark."""
        models = str(self.scratch / "material" / "models")
        environment = {"SATUNE_MODEL_ROOTS": models, "SATUNE_STREAMS_PER_KEY": str(streams)}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        url = self.databases[database](f"satune_{name}")
        with satune(self.scratch / name, database_url=url, worker=worker, environment=environment) as found:  # fmt: skip
            yield found

    def body(self, server: Server, steps: int) -> dict[str, Any]:
        """A job on the demo's model, half of the MLP channels asleep; its file is uploaded."""
        text = self.material.documents[0]
        with server.client() as client, text.open("rb") as file:
            answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": file})
            answer.raise_for_status()
        train = {"max_steps": steps, "learning_rate": 2e-3, "max_seq_len": 128}
        return {
            "model": self.material.model,
            "training_file": answer.json()["id"],
            "seed": 1,
            "hyperparameters": {"batch_size": 8},
            "sat": {"omission_rate": {"mlp": 0.5, "attention": 0.0}, "train": train},
        }


def submit(server: Server, body: dict[str, Any]) -> str:
    with server.client() as client:
        answer = client.post("/v1/fine_tuning/jobs", json=body)
        if answer.is_error:
            raise RuntimeError(answer.text)
        return str(answer.json()["id"])


def until(server: Server, job_id: str, question: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:  # fmt: skip
    """The job once `question` is true of it, asked every two seconds: what asks is not what is measured."""
    with server.client() as client:
        while True:
            job: dict[str, Any] = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
            if question(job):
                return job
            if job["status"] in TERMINAL:
                raise RuntimeError(f"{job_id} has {job['status']}: {job['error']}")
            time.sleep(2)


# Polls while a job trains


def polls(bench: Bench, database: str) -> Figures:
    name = f"polls_{database.lower()}"
    with trivial_server() as trivial, bench.server(name, database, worker=True) as server:
        job_id = submit(server, bench.body(server, steps=100_000))
        job = until(server, job_id, lambda j: bool(j["progress"]) and j["progress"]["step"] > 5)
        events = server.folder / "runs" / job_id / str(job["attempt"]) / "events.jsonl"
        figures = measure(
            server, trivial, job_id, events,
            database=database, rounds=bench.size.rounds, seconds=bench.size.poll_seconds,
        )  # fmt: skip
        with server.client() as client:
            client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
        until(server, job_id, lambda j: j["status"] == "cancelled")
    return figures


# What training loses to the service


def overhead(bench: Bench) -> Figures:
    """Through the service and alone in turn; one thread, so that both have a core and the other core has the service."""
    steps = round(bench.size.training_seconds / _step_seconds(bench))
    walls: list[tuple[float, float]] = []
    trained: list[tuple[float, float]] = []
    shares = []
    for number in range(bench.size.pairs):
        passed = _through_service(bench, steps)
        wall, alone = _alone(bench, passed.config)
        if passed.summary["eval_loss_after"] != alone["eval_loss_after"]:
            raise RuntimeError(f"two trainings, not one: {passed.summary} and {alone}")
        walls.append((passed.wall, wall))
        trained.append((passed.summary["training_seconds"], alone["training_seconds"]))
        shares.append(passed.cpu_percent)
        print(f"overhead: pair {number + 1}/{bench.size.pairs}", flush=True)
    figures = []
    for name, pairs in (("wall", walls), ("training seconds", trained)):
        figures += [
            median(f"overhead: {name} through the service", [a for a, _ in pairs], "s", better="lower"),
            median(f"overhead: {name} alone", [b for _, b in pairs], "s", better="lower"),
            median(
                f"overhead: {name}, of the service", [100 * (a / b - 1) for a, b in pairs], "%",
                OVERHEAD_BAR, better="lower",
            ),
        ]  # fmt: skip
    by_alone = [b for _, b in trained]
    noise = 100 * (max(by_alone) / min(by_alone) - 1)
    return [
        *figures,
        median("overhead: CPU of API, worker and broker while it runs, of one core", shares, "%", better="lower"),
        figure("overhead: noise, largest over smallest training seconds alone", noise, "%", better="lower"),
    ]  # fmt: skip


def _step_seconds(bench: Bench) -> float:
    """Median step of a short job, which says how many steps fill the time that is asked for."""
    _through_service(bench, steps=60)
    folder = max((bench.scratch / "overhead" / "runs").glob("*/*"), key=lambda p: p.stat().st_mtime)
    lines = tracking.lines_of(folder / "events.jsonl")
    seconds: list[float] = [json.loads(line)["step_seconds"] for line in lines]
    return statistics.median(seconds)


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A job that went through the service: seconds from the claim for training to its end; CPU of API, worker and broker."""

    wall: float
    cpu_percent: float
    summary: dict[str, Any]
    config: dict[str, Any]


def _through_service(bench: Bench, steps: int) -> Passed:
    with bench.server("overhead", "SQLite", worker=True, threads=1) as server:
        job_id = submit(server, bench.body(server, steps))
        until(server, job_id, lambda j: j["status"] == "running")
        began, used = time.perf_counter(), _cpu_seconds(server)
        job = until(server, job_id, lambda j: j["status"] == "succeeded")
        share = 100 * (_cpu_seconds(server) - used) / (time.perf_counter() - began)
    folder = server.folder / "runs" / job_id / str(job["attempt"])
    engine = make_engine(Settings(data_dir=server.folder))
    told = Store(engine).events(job["organization_id"], job_id, after=None, limit=100, newest_first=False)  # fmt: skip
    engine.dispose()
    states = [(e.data or {}).get("state") for e in told.items]
    started = max(n for n, state in enumerate(states) if state == "starting")
    wall = told.items[states.index("done")].created_at - told.items[started].created_at
    config = json.loads((folder / "config.json").read_text())
    return Passed(wall=wall, cpu_percent=share, summary=job["report"], config=config)


def _cpu_seconds(server: Server) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in server.pids]
    return sum(t.user + t.system for t in times)


def _alone(bench: Bench, config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The same for `python -P -m sat_core train FOLDER`, with no service anywhere."""
    folder = Path(tempfile.mkdtemp(dir=bench.scratch, prefix="alone-"))
    (folder / "config.json").write_text(json.dumps(config))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    command = [sys.executable, "-P", "-m", "sat_core", "train", str(folder)]
    with (folder / "log.txt").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # fmt: skip
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        code = process.wait()
        wall = time.perf_counter() - started
    if code:
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    last = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(folder)
    return wall, last["summary"]


# Long lists, a long run, many who listen


def scaled(bench: Bench, database: str) -> Figures:
    name = f"scale_{database.lower()}"
    with bench.server(name, database, worker=False, streams=scale.LISTENERS) as server:
        prepared, lines, _ = _a_run(bench)
        material = tracking.Material(bench.body(server, steps=200), prepared, lines)
        return scale.measure(server, material, database=database)


# Beside MLflow


def beside_mlflow(bench: Bench) -> Figures:
    try:
        python: Path | None = mlflow_environment(bench.work / "mlflow")
    except NotStartedError as error:
        print(f"MLFLOW IS LEFT OUT: {error}", flush=True)
        python = None
    prepared, lines, batch = _a_run(bench)
    figures = [figure("rows a write of the worker, 200 steps of a real run", batch, "")]
    for database in (d for d in bench.size.rivalled if d in bench.databases):
        name = f"tracking_{database.lower()}"
        with ExitStack() as stack:
            ours = stack.enter_context(bench.server(name, database, worker=False))
            theirs = None
            try:
                if python:
                    name = f"mlflow_{database.lower()}"
                    there = mlflow(
                        python, bench.scratch / name, database_url=bench.databases[database](name)
                    )
                    theirs = stack.enter_context(there)
            except NotStartedError as error:
                print(f"MLFLOW ON {database.upper()} IS LEFT OUT: {error}", flush=True)
            material = tracking.Material(bench.body(ours, steps=200), prepared, lines)
            figures += tracking.compare(
                ours, theirs, material, database=database, rounds=bench.size.rounds,
                seconds=TRACKING_SECONDS, whole=bench.size.whole,
            )  # fmt: skip
    return figures


@functools.cache
def _a_run(bench: Bench) -> tuple[dict[str, Any], list[str], float]:
    """What `prepare` made of a job, the metrics lines of its training, and how many the worker wrote at a time."""
    with bench.server("rows", "SQLite", worker=True) as server:
        job_id = submit(server, bench.body(server, steps=200))
        job = until(server, job_id, lambda j: j["status"] == "succeeded")
        runs = server.folder / "runs" / job_id
    asked = json.loads((runs / "1" / "config.json").read_text())["request"]
    prepared = json.loads((runs / "1" / "train.json").read_text())
    lines = tracking.lines_of(runs / "2" / "events.jsonl")
    # The version rises by one a write; the few that were no rows make this a lower bound.
    return {**prepared, "request": asked}, lines, len(lines) / job["version"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="in under six minutes")
    parser.add_argument("--work", type=Path, default=Path("var/service"), help="keeps MLflow's environment")  # fmt: skip
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to run")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    figures: Figures = []
    started = time.monotonic()
    with ExitStack() as stack:
        # Not below --work: PostgreSQL's folder must be reachable for the user it runs as.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="satune-service-")))
        scratch.chmod(0o711)
        databases: dict[str, Callable[[str], str]] = {"SQLite": lambda _: ""}
        try:
            databases["PostgreSQL"] = stack.enter_context(postgresql(scratch / "postgresql"))
        except NotStartedError as error:
            print(f"POSTGRESQL IS LEFT OUT: {error}", flush=True)
        bench = Bench(args.work.absolute(), scratch, size, make(scratch / "material"), databases)
        if "polls" in args.only:
            for database in size.polled:
                if database in databases:
                    figures += polls(bench, database)
        if "overhead" in args.only:
            figures += overhead(bench)
        if "scale" in args.only:
            for database in size.scaled:
                if database in databases:
                    figures += scaled(bench, database)
        if "tracking" in args.only:
            figures += beside_mlflow(bench)
        disk = max((p for p in psutil.disk_partitions(all=True) if scratch.is_relative_to(p.mountpoint)), key=lambda p: len(p.mountpoint))  # fmt: skip
    print(f"\n{table(figures)}\n\n{time.monotonic() - started:.0f} s, databases on {disk.fstype}")
    if args.json:
        write(args.json, "service", figures, versions={"mlflow": MLFLOW.partition("==")[2]}, quick=args.quick, databases_on=disk.fstype)  # fmt: skip


if __name__ == "__main__":
    main()
