"""What each choice of the method is worth: held-out loss at equal FLOPs, one factor at a time around the default.

    python benchmarks/ablation.py run  [--data ../shared/data] [--work DIR] [--only stories/far ...] [--threads N]
    python benchmarks/ablation.py table [--json docs/evidence/ablation.jsonl]

Two base models: a real one (karpathy's stories260K, where `--data` holds it) and the demo's, which is first trained here on
documentation of Python's standard library. Each is trained further on text near its own and on text far from it. FLOPs are
counted by the core, probes included, and the comparison is with dense training for fewer steps, its schedule fitted to
them. Dense and default SAT get a learning rate from the same four, each its best; every other cell has SAT's. Results are
appended to the JSON Lines file as they come, and a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import prepared, quietly
from benchmarks.report import Rows
from cli.demo_material import make
from sat_core.plan import quote
from sat_core.plan.config import TrainConfig
from sat_core.slicing import SlicedBlock, SlicedParameter
from sat_core.sparsity import Sparsity

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
DENSE_SHARES = (0.7, 0.8, 0.9)
BASE_STEPS = 800


@dataclass(frozen=True)
class Cell:
    """One arm: settings laid over the default's `sat` object, steps as a share of the full run, a variant of the code."""

    name: str
    sat: dict[str, Any] = field(default_factory=dict)
    steps_share: float = 1.0
    variant: str = ""


def rates(mlp: float, attention: float = 0.0) -> dict[str, Any]:
    return {"omission_rate": {"mlp": mlp, "attention": attention}}


DENSE = [Cell("dense", {"mode": "off"})] + [
    Cell(f"dense, {share:g} of the steps", {"mode": "off"}, share) for share in DENSE_SHARES
]
DEFAULT = Cell("default")
SAT = [
    DEFAULT,
    Cell("allotment by local error", variant="local"),
    Cell("probes of 256 tokens", variant="small probe"),
    Cell("allotment exempt", {"allotment": "exempt"}),
    Cell("allotment uniform", {"allotment": "uniform"}),
    *(
        Cell(f"metric {m}", {"importance": {"metric": m}})
        for m in ("uniform", "magnitude", "wanda", "maxip", "fluctuation", "taylor", "fisher")
    ),
    Cell("selector sample", {"importance": {"selector": "sample"}}),
    Cell("selector mixed", {"importance": {"selector": "mixed"}}),
    *(Cell(f"refresh {n}", {"importance": {"refresh_every": n}}) for n in (1, 10, 50)),
    Cell("rate .75 for .29", {**rates(0.75), "schedule": {"sparse_share": 0.293}}),
    Cell("rate .42 for .93", {**rates(0.42), "schedule": {"sparse_share": 0.933}}),
    Cell("rungs 1", {"schedule": {"rungs": 1, "sparse_share": 0.8125}}),
    Cell("rungs 8", {"schedule": {"rungs": 8, "sparse_share": 0.667}}),
    Cell("waking clears both moments", variant="clear"),
    Cell("waking keeps both moments", variant="keep"),
    Cell("compensation", {"compensation": True}),
    Cell("attention .25 too", rates(0.5, 0.25)),
]
FEW = (
    "default",
    "probes of 256 tokens",
    "allotment by local error",
    "allotment exempt",
    "allotment uniform",
    "metric uniform",
    "refresh 10",
)


@dataclass(frozen=True)
class Setting:
    """A base model and a text."""

    name: str
    model: Path
    text: Path
    steps: int
    seeds: tuple[int, ...]
    cells: tuple[str, ...] | None = None


def config_of(setting: Setting, cell: Cell, rate: float, seed: int, work: Path) -> TrainConfig:
    settings = {
        **rates(0.5),
        "eval": {"every": 0, "forgetting_sequences": 0},
        "checkpoints": {"every": 0},
        **cell.sat,
        "train": {
            "max_steps": round(setting.steps * cell.steps_share),
            "learning_rate": rate,
            "max_seq_len": 128,
        },
    }
    if cell.sat.get("mode") == "off":
        del settings["omission_rate"]
    return prepared(
        work, model=setting.model, training=setting.text, sat=settings, seed=seed, batch_size=8
    )


def run_cell(setting: Setting, cell: Cell, rate: float, seed: int, work: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=work, prefix="run-"))
    config = config_of(setting, cell, rate, seed, work)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with variant(cell.variant):
        quietly("train", folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    summary = events[-1]["summary"]
    shutil.rmtree(folder)
    return {
        "setting": setting.name,
        "cell": cell.name,
        "rate": rate,
        "seed": seed,
        "steps": summary["steps"],
        "before": summary["eval_loss_before"],
        "after": summary["eval_loss_after"],
        "flops": summary["flops"],
        "probe_flops": summary["probe_flops"],
        "seconds": summary["training_seconds"],
        "mlp_rate": summary["mean_omission_rate_mlp"],
    }


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Another rule in the place of the method's own, for as long as a cell runs."""
    rules: dict[str, tuple[Any, str, Any]] = {
        "clear": (SlicedBlock, "_move_moments", _clear_both),
        "keep": (SlicedBlock, "_move_moments", _keep_both),
        "small probe": (quote, "MAX_PROBE_TOKENS", 256),
        "local": (Sparsity, "whole", property(lambda _: False)),
    }
    if not name:
        yield
        return
    owner, attribute, rule = rules[name]
    stock = vars(owner)[attribute]
    setattr(owner, attribute, rule)
    try:
        yield
    finally:
        setattr(owner, attribute, stock)


def _clear_both(
    block: SlicedBlock, part: SlicedParameter, state: dict[str, Any], awake: Tensor, _: Tensor
) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        asleep = None if part.asleep is None else torch.zeros_like(part.asleep)
        state[key] = part.take(block._merge(part, state[key], asleep), awake)


def _keep_both(
    block: SlicedBlock,
    part: SlicedParameter,
    state: dict[str, Any],
    awake: Tensor,
    sleepers: Tensor,
) -> None:
    kept = vars(part).setdefault("kept", {})
    for key in ("exp_avg", "exp_avg_sq"):
        full = block._merge(part, state[key], kept.get(key))
        state[key] = part.take(full, awake)
        kept[key] = part.take(full, sleepers) if len(sleepers) else None


class Results(Rows):
    """One row a cell, learning rate and seed."""

    def get(self, setting: str, cell: str, rate: float, seed: int) -> dict[str, Any] | None:
        return next(iter(self.find(setting=setting, cell=cell, rate=rate, seed=seed)), None)

    def run(self, setting: Setting, cell: Cell, rate: float, seed: int, work: Path) -> float:
        row = self.get(setting.name, cell.name, rate, seed)
        if row is None:
            row = self.add(run_cell(setting, cell, rate, seed, work))
            print(
                f"{setting.name:14} {cell.name:28} rate {rate:g} seed {seed}: {row['after']:.4f}  {row['seconds']:.0f} s",
                flush=True,
            )
        return float(row["after"])

    def best_rate(self, setting: str, cell: str) -> float:
        tried = {
            r["rate"]: r["after"]
            for r in self.rows
            if (r["setting"], r["cell"], r["seed"]) == (setting, cell, SEEDS[0])
        }
        return min(tried, key=lambda rate: tried[rate])


def demo_base(work: Path) -> tuple[Path, Path, Path]:
    """The demo's model after training on documentation; its text near and far."""
    material = make(work)
    trained = work / "demo-trained"
    start = work / "models" / material.model.removeprefix("local/")
    if not trained.exists():
        setting = Setting("base", start, material.documents[0], BASE_STEPS, (0,))
        folder = Path(tempfile.mkdtemp(dir=work, prefix="base-"))
        config = config_of(setting, DENSE[0], 2e-3, 0, work)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        quietly("train", folder)
        (folder / "model").rename(trained)
        shutil.rmtree(folder)
    return trained, material.documents[0], material.sources[0]


def settings(data: Path, work: Path) -> list[Setting]:
    model, near, far = demo_base(work)
    found = [
        Setting("demo/near", model, near, 120, SEEDS, FEW),
        Setting("demo/far", model, far, 120, SEEDS, FEW),
    ]
    stories = data / "models" / "stories260k-llama"
    if not stories.exists():
        print(f"{stories} is not there: only the demo's model is trained")
        return found
    texts = data / "datasets" / "pretrain"
    return [
        *found,
        Setting("stories/far", stories, texts / "tinyshakespeare.txt", 200, SEEDS),
        Setting("stories/near", stories, texts / "tinystories_val.txt", 200, SEEDS, FEW),
    ]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.json)
    for setting in settings(args.data, args.work):
        if args.only and setting.name not in args.only:
            continue
        for cell in (DENSE[0], DEFAULT):
            for rate in RATES:
                results.run(setting, cell, rate, SEEDS[0], args.work)
        dense_rate = results.best_rate(setting.name, DENSE[0].name)
        sat_rate = results.best_rate(setting.name, DEFAULT.name)
        for seed in setting.seeds:
            for cell in DENSE:
                results.run(setting, cell, dense_rate, seed, args.work)
            for cell in SAT:
                if setting.cells is None or cell.name in setting.cells:
                    results.run(setting, cell, sat_rate, seed, args.work)


def table(args: argparse.Namespace) -> None:
    """Markdown: loss, FLOPs share, and the advantage over dense training at the same FLOPs, by linear interpolation."""
    results = Results(args.json)
    for name in dict.fromkeys(r["setting"] for r in results.rows):
        dense_rate = results.best_rate(name, DENSE[0].name)
        sat_rate = results.best_rate(name, DEFAULT.name)
        rows = [r for r in results.rows if r["setting"] == name]
        full = next(r for r in rows if r["cell"] == "dense")["flops"]
        print(
            f"\n**{name}**: before {rows[0]['before']:.3f}; learning rates dense {dense_rate:g}, SAT {sat_rate:g}\n"
        )
        print(
            "| cell | held-out loss | seeds | FLOPs | probes | better than dense at equal FLOPs by |"
        )
        print("|---|---|---|---|---|---|")
        for cell in dict.fromkeys(r["cell"] for r in sorted(rows, key=lambda r: r["seed"])):
            is_dense = cell.startswith("dense")
            rate = dense_rate if is_dense else sat_rate
            mine = [r for r in rows if r["cell"] == cell and r["rate"] == rate]
            losses = [r["after"] for r in mine]
            gains = [_dense_at(rows, dense_rate, r) - r["after"] for r in mine]
            flops = statistics.mean(r["flops"] for r in mine) / full
            probes = statistics.mean(r["probe_flops"] / r["flops"] for r in mine)
            print(
                f"| {cell} | {_spread(losses)} | {len(mine)} | {flops:.3f} | {probes:.1%} | "
                f"{'' if is_dense else _spread(gains)} |"
            )


def _dense_at(rows: list[dict[str, Any]], rate: float, row: dict[str, Any]) -> float:
    """Held-out loss of dense training with the row's FLOPs and seed."""
    points = sorted(
        (r["flops"], r["after"])
        for r in rows
        if r["cell"].startswith("dense") and r["rate"] == rate and r["seed"] == row["seed"]
    )
    for (f0, l0), (f1, l1) in itertools.pairwise(points):
        if row["flops"] <= f1 or f1 == points[-1][0]:
            return float(l0 + (l1 - l0) * (row["flops"] - f0) / (f1 - f0))
    return float("nan")


def _spread(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.4f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("var/ablation"))
    parser.add_argument("--json", type=Path, default=Path("docs/evidence/ablation.jsonl"))
    parser.add_argument("--only", nargs="*", help="settings to run, as in stories/far")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
