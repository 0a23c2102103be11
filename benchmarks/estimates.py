"""What the service says a job will take, beside what the job then takes: ten configurations that differ in what costs.

    python benchmarks/estimates.py [--json FILE] [--md FILE] [--work DIR] [--only NAME ...] [--seconds S]

Satune's own processes, as `satune up` starts them, on SQLite. One short run of each shape is what the estimator may learn
from; then, for each configuration, `POST /v1/fine_tuning/estimates`, the job itself, and its report. The learning runs are
other runs than those that are quoted: shorter, in part at other omission rates, on the data in another order.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arms import STEPS_ALONE, Shape, random_llama
from benchmarks.report import environment, figure, table, write
from benchmarks.servers import Server, satune
from cli.demo_material import Material, make

ESTIMATES, JOBS = "/v1/fine_tuning/estimates", "/v1/fine_tuning/jobs"
TIME_BAR, FLOPS_BAR, MEMORY_BAR = 15.0, 2.0, 10.0
LEARNING_STEPS = 50
FEWEST_STEPS, MOST_STEPS = 60, 2000
SECONDS = 12.0
SHAPES = {
    "demo": None,
    "wide": Shape(hidden=256, intermediate=1024, layers=4, heads=8, kv_heads=4),
    "deep": Shape(hidden=96, intermediate=384, layers=12, heads=6, kv_heads=3),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. `like` names the case whose learning run it shares, being of the same shape."""

    name: str
    model: str
    data: str = "documents"
    width: int = 128
    batch: int = 8
    sat: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    like: str | None = None


CASES = (
    Case(name="dense", model="demo", sat={"mode": "off"}, like="balanced"),
    Case(name="balanced", model="demo", sat={"mode": "on"}),
    Case(name="fast", model="demo", sat={"mode": "on", "preset": "fast"}, like="balanced"),
    Case(name="long sequences", model="demo", width=256, batch=4, sat={"mode": "on"}),
    Case(name="small micro-batches", model="demo", width=64, batch=16, sat={"mode": "on"}, train={"micro_batch_size": 4}),
    Case(name="LoRA", model="demo", sat={"mode": "off"}, train={"tuning": "lora"}),
    Case(name="uneven rows", model="demo", data="questions", sat={"mode": "on"}),
    Case(name="wide", model="wide", sat={"omission_rate": {"mlp": 0.6, "attention": 0.25}}),
    Case(name="wide, checkpointed", model="wide", batch=4, sat={"mode": "on"}, train={"gradient_checkpointing": True}),
    Case(name="deep, often chosen", model="deep", sat={"mode": "on", "importance": {"refresh_every": 20}}),
)  # fmt: skip


@dataclass
class Bench:
    """A running service with its models and files."""

    client: httpx.Client
    files: dict[str, str]
    models: dict[str, str]

    def body(self, case: Case, *, steps: int, seed: int) -> dict[str, Any]:
        """The create body of a case."""
        train = {"max_steps": steps, "max_seq_len": case.width, "learning_rate": 1e-3} | case.train
        return {
            "model": self.models[case.model],
            "training_file": self.files[case.data],
            "seed": seed,
            "hyperparameters": {"batch_size": case.batch},
            "sat": {**STEPS_ALONE, **case.sat, "train": train},
        }

    def estimate(self, body: dict[str, Any]) -> dict[str, Any]:
        """The estimate of a body, ready."""
        found = self._post(ESTIMATES, body)
        while found["status"] == "pending":
            found = self._get(f"{ESTIMATES}/{found['id']}", wait=20)
        if found["status"] != "ready":
            raise RuntimeError(found["error"])
        return found

    def run(self, body: dict[str, Any]) -> dict[str, Any]:
        """The report on a job of this body, once it has ended."""
        job = self._post(JOBS, body)
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            # What asks seldom takes no time from what is measured.
            job = self._get(f"{JOBS}/{job['id']}", wait=10, version=job["version"])
            time.sleep(1)
        if job["status"] != "succeeded":
            raise RuntimeError(job["error"])
        return self._get(f"{JOBS}/{job['id']}/report")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._checked(self.client.post(path, json=body))

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._checked(self.client.get(path, params=query))

    @staticmethod
    def _checked(answer: httpx.Response) -> dict[str, Any]:
        if answer.is_error:
            raise RuntimeError(answer.text)
        return dict(answer.json())


@contextmanager
def service(work: Path) -> Iterator[Bench]:
    """Models, files, and the processes that serve them."""
    material: Material = make(work)
    models = {"demo": material.model}
    for name, shape in SHAPES.items():
        if shape is not None:
            models[name] = f"local/{random_llama(shape, work).name}"
    environment = {"SATUNE_MODEL_ROOTS": os.pathsep.join((str(work / "models"), str(work)))}
    with (
        tempfile.TemporaryDirectory(dir=work) as folder,
        satune(Path(folder), worker=True, environment=environment) as server,
        server.client() as client,
    ):
        yield Bench(client, _upload(server, material), models)


def _upload(server: Server, material: Material) -> dict[str, str]:
    found = {}
    with server.client() as client:
        for name in ("documents", "questions"):
            with getattr(material, name)[0].open("rb") as file:
                answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": file})  # fmt: skip
            found[name] = answer.raise_for_status().json()["id"]
    return found


def measure(bench: Bench, cases: tuple[Case, ...], seconds: float) -> list[dict[str, Any]]:
    """A row for each case: what was said, what came, how far off it was."""
    learned: dict[str, dict[str, Any]] = {}
    by_name = {case.name: case for case in CASES}
    for name in dict.fromkeys(case.like or case.name for case in cases):
        body = bench.body(by_name[name], steps=LEARNING_STEPS, seed=1)
        learned[name] = bench.run(body)
        print(f"learned {name}: {learned[name]['time']['training_seconds']:.1f} s", flush=True)
    return [_compared(bench, case, learned[case.like or case.name], seconds) for case in cases]


def _compared(bench: Bench, case: Case, learned: dict[str, Any], seconds: float) -> dict[str, Any]:
    steps = round(seconds * LEARNING_STEPS / learned["time"]["training_seconds"])
    steps = max(FEWEST_STEPS, min(MOST_STEPS, steps))
    body = bench.body(case, steps=steps, seed=2)
    said, came = bench.estimate(body), bench.run(body)
    span = said["time"]["seconds"]
    row = {
        "case": case.name,
        "steps": steps,
        "seconds": came["time"]["training_seconds"],
        "seconds_quoted": span,
        "flops": came["flops"]["spent"],
        "flops_quoted": said["flops"]["sat"],
        "memory_bytes": came["memory"]["peak_bytes"],
        "memory_bytes_quoted": said["memory"]["peak"]["expected"],
        # What was said of the learning run, before any of its shape.
        "memory_bytes_counted": learned["memory"]["quoted_bytes"]["expected"],
        "speed_up": came["time"]["speed_up"],
        "speed_up_quoted": said["speedup"]["expected"],
    }
    row["seconds_error"] = _error(span["expected"], row["seconds"])
    row["flops_error"] = _error(row["flops_quoted"], row["flops"])
    row["memory_error"] = _error(row["memory_bytes_quoted"], row["memory_bytes"])
    row["counted_error"] = _error(row["memory_bytes_counted"], row["memory_bytes"])
    print(f"{case.name}: time {row['seconds_error']:+.1f} %, memory {row['memory_error']:+.1f} %", flush=True)  # fmt: skip
    return row


def _error(said: float, came: float) -> float:
    return 100 * (said / came - 1)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst of each kind, with its bar."""
    found = []
    for name, key, bar in (
        ("time", "seconds_error", TIME_BAR),
        ("FLOPs", "flops_error", FLOPS_BAR),
        ("peak memory", "memory_error", MEMORY_BAR),
        ("peak memory before any run", "counted_error", None),
    ):
        errors = [row[key] for row in rows]
        worst = max(map(abs, errors))
        found.append(figure(f"estimates: {name}, largest error of {len(rows)}", worst, "%", bar, "lower", (min(errors), max(errors))))  # fmt: skip
    return found


PAGE = """# What is said before a run, beside what the run then takes, {date}

    python benchmarks/estimates.py --json docs/evidence/estimates.json --md docs/evidence/estimates.md

on {cores} cores ({cpu}), Python {python}, torch {torch}, transformers {transformers}, SQLite; commit {commit}. This page is
written by the program.

{figures}

Ten configurations, each estimated by `POST /v1/fine_tuning/estimates` and then run as a job. The estimator may know one run of
{learning} steps of the same shape, with other data order and in part at other omission rates; `dense` and `fast` share that of
`balanced`. Errors are (said / came - 1).

{rows}

Seconds are of training steps. FLOPs are counted by the run from what it really did, by the estimator from lengths and the plan. Memory is the
highest resident size of the training process; "counted" is what is said of it before any run of that shape.
"""


def page(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """The evidence as Markdown."""
    here = environment()
    head = ("case", "steps", "seconds said (low to high)", "came", "error", "FLOPs", "memory said, MiB", "came", "error", "counted")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        span, mib = row["seconds_quoted"], 2**20
        cells = (
            row["case"],
            f"{row['steps']:,}",
            f"{span['expected']:.1f} ({span['low']:.1f} to {span['high']:.1f})",
            f"{row['seconds']:.1f}",
            f"{row['seconds_error']:+.1f} %",
            f"{row['flops_error']:+.2f} %",
            f"{row['memory_bytes_quoted'] / mib:.0f}",
            f"{row['memory_bytes'] / mib:.0f}",
            f"{row['memory_error']:+.1f} %",
            f"{row['counted_error']:+.0f} %",
        )
        lines.append("| " + " | ".join(cells) + " |")
    hardware, versions = here["hardware"], here["versions"]
    return PAGE.format(
        date=here["date"], cores=hardware["cores"], cpu=hardware["cpu"], commit=here["commit"][:12],
        learning=LEARNING_STEPS, figures=table(found), rows="\n".join(lines),
        **{name: versions[name] for name in ("python", "torch", "transformers")},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    parser.add_argument("--work", type=Path, help="models and texts, kept between runs")
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each quoted run")
    args = parser.parse_args()
    cases = tuple(case for case in CASES if not args.only or case.name in args.only)
    with tempfile.TemporaryDirectory(prefix="satune-estimates-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        with service(work.absolute()) as bench:
            rows = measure(bench, cases, args.seconds)
    found = figures(rows)
    print(table(found))
    if args.json:
        write(args.json, "estimates", found, rows=rows)
    if args.md:
        args.md.write_text(page(rows, found))


if __name__ == "__main__":
    main()
