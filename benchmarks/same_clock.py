"""Held-out loss after the same seconds: SAT, with and without its guard, dense, LoRA, a random and a fixed subset.

    python benchmarks/same_clock.py run   [--only demo/far ...] [--seeds 0 1 2] [--data ../shared/data]
    python benchmarks/same_clock.py table [--plot docs/evidence/same-clock.png]

Every arm gets the seconds that dense training needs for its steps, and as many steps of its own as fit into them, its
whole schedule fitted to that number. How many fit is found first, with all arms advancing alternately, step by step, over
a whole schedule, each in a process of its own: losses do not depend on how busy the machine is, seconds do, so the two are
measured apart. Learning rates are searched for each arm, by doubling and halving until it gets worse, on the first seed.

Three base models: the demo's, first trained here on one half of the documentation of Python's standard library; where
`--data` holds what they need, karpathy's stories260K, and a wide one, first trained here on stories and one half of some
novels. Three tasks each: text near what the base knows (the other half), text far from it, and instruction tuning
over several epochs. Rows are appended to the JSON Lines file as they come, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import (
    UNGUARDED,
    SatuneApart,
    SatuneArm,
    Shape,
    Turn,
    in_turn,
    prepared,
    quietly,
    random_llama,
    serve,
)
from benchmarks.report import write
from benchmarks.same_clock_rows import DENSE_NAME, DENSE_STEPS, SEEDS, Results, figures, plot, table
from cli.demo_material import make
from sat_core.plan.config import TrainConfig

FIRST_RATE = 2e-3
LORA_RANKS = (8, 32)
BASE_STEPS = 1000
WIDE = Shape(hidden=512, intermediate=2048, layers=4, heads=8, kv_heads=4)
CURVE_POINTS = 8


@dataclass(frozen=True)
class Way:
    """How an arm trains, as settings laid over the default's `sat` object."""

    name: str
    sat: dict[str, Any] = field(default_factory=dict)


DENSE = Way(DENSE_NAME, {"mode": "off"})
WAYS = (
    DENSE,
    Way("SAT balanced", {"mode": "on"}),
    Way("SAT fast", {"mode": "on", "preset": "fast"}),
    *(
        Way(f"LoRA rank {r}", {"mode": "off", "train": {"tuning": "lora", "lora_rank": r}})
        for r in LORA_RANKS
    ),
    Way(
        "random subset",
        {
            "mode": "on",
            "importance": {"metric": "uniform"},
            "allotment": "uniform",
            **UNGUARDED,
        },
    ),
    Way(
        "fixed subset",
        {"mode": "on", "schedule": {"sparse_share": 1.0}, **UNGUARDED},
    ),
    Way("balanced, no guard", {"mode": "on", **UNGUARDED}),
)


@dataclass(frozen=True)
class Task:
    """A base model, made where it is first asked for, and what it is trained on; `steps` are dense training's."""

    name: str
    base: Callable[[], Path]
    training: Path
    held_out: Path | None
    steps: int = DENSE_STEPS

    def config(
        self, way: Way, *, steps: int, rate: float, seed: int, work: Path, curve: int = CURVE_POINTS
    ) -> TrainConfig:
        train = {"max_steps": steps, "learning_rate": rate, "max_seq_len": 128}
        return prepared(
            work,
            model=self.base(),
            training=self.training,
            validation=self.held_out,
            seed=seed,
            batch_size=8,
            sat={
                **way.sat,
                "train": {**way.sat.get("train", {}), **train},
                "eval": {"every": -(-steps // curve) if curve else 0, "forgetting_sequences": 0},
                "checkpoints": {"every": 0},
            },
        )


def satune(pipe: Connection, config: TrainConfig, work: Path, threads: int) -> None:
    """The process of an arm whose clock is taken."""
    torch.set_num_threads(threads)
    serve(Turn(pipe), SatuneArm("Satune", config, work))


def clock(task: Task, ways: list[Way], work: Path, results: Results) -> dict[str, int]:
    """Steps of each arm that take as long as all of dense training's, measured beside it, which a later arm's clock is too."""
    measured = {r["arm"] for r in results.find(kind="clock", task=task.name)}
    if missing := [way for way in ways if way.name not in measured]:
        arms = [
            SatuneApart(
                way.name,
                satune,
                task.config(way, steps=task.steps, rate=FIRST_RATE, seed=0, work=work, curve=0),
                work,
                torch.get_num_threads(),
            )
            for way in (DENSE, *(way for way in missing if way != DENSE))
        ]
        seconds = in_turn(arms, task.steps)
        for arm in arms:
            arm.close()
        # The first step of an arm pays for warming up.
        sums = {name: sum(taken[1:]) for name, taken in seconds.items()}
        for way in missing:
            row = {"seconds": sums[way.name], "dense_seconds": sums[DENSE.name]}
            results.add({"kind": "clock", "task": task.name, "arm": way.name, **row})
    return {
        r["arm"]: round(task.steps * r["dense_seconds"] / r["seconds"])
        for r in results.find(kind="clock", task=task.name)
    }


def run_once(
    task: Task, way: Way, *, steps: int, rate: float, seed: int, work: Path, results: Results
) -> float:
    """Held-out loss at the end; found, or run now."""
    key = {"kind": "run", "task": task.name, "arm": way.name, "rate": rate, "seed": seed}
    if found := results.find(**key):
        return float(found[0]["after"])
    folder = Path(tempfile.mkdtemp(dir=work, prefix="run-"))
    config = task.config(way, steps=steps, rate=rate, seed=seed, work=work)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    quietly("train", folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    summary = events[-1]["summary"]
    flops = {e["step"]: e["flops"] for e in events if e["kind"] == "metrics"}
    row = results.add(
        {
            **key,
            "steps": steps,
            "before": summary["eval_loss_before"],
            "after": summary["eval_loss_after"],
            "flops": summary["flops"],
            "probe_flops": summary["probe_flops"],
            "curve": [
                [e["step"], flops.get(e["step"], 0), e["eval_loss"]]
                for e in events
                if e["kind"] == "evaluation"
            ],
        }
    )
    print(
        f"{task.name:17} {way.name:14} {steps:4} steps, rate {rate:g}, seed {seed}: "
        f"{row['before']:.4f} -> {row['after']:.4f}",
        flush=True,
    )
    return float(row["after"])


def tuned(task: Task, way: Way, *, steps: int, seed: int, work: Path, results: Results) -> float:
    """The best learning rate by doubling and halving from the first until it gets worse."""

    def loss(rate: float) -> float:
        return run_once(task, way, steps=steps, rate=rate, seed=seed, work=work, results=results)

    best = FIRST_RATE
    for factor in (2.0, 0.5):
        while loss(best * factor) < loss(best):
            best *= factor
    return best


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.jsonl)
    stored = Results(args.rates) if args.rates else None
    ways = [way for way in WAYS if not args.arms or way.name in args.arms]
    for task in tasks(args.data, args.work):
        if args.only and task.name not in args.only:
            continue
        steps = clock(task, ways, args.work, results)
        print(f"{task.name}: steps in the same time: {steps}", flush=True)
        common: dict[str, Any] = {"work": args.work, "results": results}
        rates = {
            way.name: stored.best_rate(task.name, way.name, SEEDS[0])
            if stored
            else tuned(task, way, steps=steps[way.name], seed=SEEDS[0], **common)
            for way in ways
        }
        for seed in args.seeds:
            for way in ways:
                run_once(
                    task, way, steps=steps[way.name], rate=rates[way.name], seed=seed, **common
                )
    if args.json:
        write(args.json, "same_clock", figures(results))


def tasks(data: Path, work: Path) -> list[Task]:
    """The demo's three tasks, and those of the real small model and of the wide one where their material is."""
    material = make(work)
    demo = work / "models" / material.model.removeprefix("local/")
    half, other_half = halves(material.documents[0].read_text().splitlines(), work, "documents")

    def demo_base() -> Path:
        return trained("demo-trained-on-half", demo, half, material.documents[1], work)

    found = [
        Task("demo/near", demo_base, other_half, material.documents[1]),
        Task("demo/far", demo_base, *material.sources),
        Task("demo/instruct", demo_base, *material.questions),
    ]
    texts, rows = data / "datasets" / "pretrain", data / "datasets" / "instruct"
    stories = data / "models" / "stories260k-llama"
    if not stories.exists():
        print(f"{stories} is not there: only the demo's model is trained")
        return found
    novels = (texts / "public_domain_books.jsonl").read_text().splitlines()
    half_novels, other_novels = halves(novels, work, "novels")
    tales = (texts / "tinystories_train.txt").read_text().split("<|endoftext|>")
    rows_of_tales = "".join(json.dumps({"text": t}) + "\n" for t in tales if t.strip())
    prose = work / "prose.jsonl"
    prose.write_text(half_novels.read_text() + rows_of_tales)

    def wide_base() -> Path:
        return trained("wide-trained-on-prose", random_llama(WIDE, work), prose, None, work)

    return [
        *found,
        Task("stories/near", lambda: stories, texts / "tinystories_train.txt", None),
        Task("stories/far", lambda: stories, texts / "tinyshakespeare.txt", None),
        Task("stories/instruct", lambda: stories, rows / "gsm8k_train_512_messages.jsonl", None),
        Task("wide/near", wide_base, other_novels, None),
        Task("wide/far", wide_base, *material.sources),
        Task("wide/instruct", wide_base, *material.questions),
    ]


def halves(rows: list[str], work: Path, name: str) -> tuple[Path, Path]:
    """Files of every other row."""
    paths = (work / f"{name}-0.jsonl", work / f"{name}-1.jsonl")
    for i, path in enumerate(paths):
        path.write_text("".join(row + "\n" for row in rows[i::2]))
    return paths


def trained(name: str, start: Path, text: Path, held_out: Path | None, work: Path) -> Path:
    """A model folder, `start` trained dense on a text; made once."""
    made = work / name
    if not made.exists():
        task = Task(name, lambda: start, text, held_out)
        folder = Path(tempfile.mkdtemp(dir=work, prefix="base-"))
        config = task.config(DENSE, steps=BASE_STEPS, rate=FIRST_RATE, seed=0, work=work)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        quietly("train", folder)
        (folder / "model").rename(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("var/same-clock"))
    parser.add_argument("--jsonl", type=Path, default=Path("docs/evidence/same-clock.jsonl"))
    parser.add_argument("--json", type=Path, help="write figures here, after a run")
    parser.add_argument("--arms", nargs="*", help="arms to run; dense must be among them")
    parser.add_argument("--rates", type=Path, help="take learning rates from this file of rows")
    parser.add_argument("--only", nargs="*", help="tasks to run, as in demo/far")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, help="write a plot here")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
        return
    results = Results(args.jsonl)
    table(results)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
