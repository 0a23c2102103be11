"""What each choice of the method is worth: held-out loss at equal FLOPs, one factor at a time around the default.

    python benchmarks/ablation.py run  [--data ../shared/data] [--work DIR] [--only stories/far ...] [--threads N]
    python benchmarks/ablation.py table [--json docs/evidence/ablation.jsonl]

Two base models: a real one (karpathy's stories260K, where `--data` holds it) and the demo's, which is first trained here on
documentation of Python's standard library. Each is trained further on text near its own and on text far from it. FLOPs are
counted by the core, probes included, and the comparison is with dense training for fewer steps, its schedule fitted to
them. Every arm has a learning rate of its own, the best on the first seed: dense
and default SAT from the same four, every other cell from three around the default's. The guard is off in all
cells but its own, for where it makes a run dense the cells do not differ. Results are
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

from benchmarks.arms import STEPS_ALONE, prepared, quietly
from benchmarks.report import Rows
from cli.demo_material import make
from sat_core.plan.config import TrainConfig
from sat_core.slicing import SlicedBlock, SlicedParameter

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
    Cell("allotment uniform", {"allotment": "uniform"}),
    Cell("allotment exempt", {"allotment": "exempt"}),
    Cell("metric uniform", {"importance": {"metric": "uniform"}}),
    Cell("metric maxip", {"importance": {"metric": "maxip"}}),
    Cell("selector sample", {"importance": {"selector": "sample"}}),
    *(Cell(f"refresh {n}", {"importance": {"refresh_every": n}}) for n in (1, 10, 50)),
    Cell("rate .75 for .29", {**rates(0.75), "schedule": {"sparse_share": 0.293}}),
    Cell("rate .42 for .93", {**rates(0.42), "schedule": {"sparse_share": 0.933}}),
    Cell("rungs 1", {"schedule": {"rungs": 1, "sparse_share": 0.8125}}),
    Cell("rungs 8", {"schedule": {"rungs": 8, "sparse_share": 0.667}}),
    Cell("waking clears both moments", variant="clear"),
    Cell("waking keeps both moments", variant="keep"),
    Cell("guard .05", {"guard": {"max_gap": 0.05}}),
]


@dataclass(frozen=True)
class Setting:
    """A base model and a text."""

    name: str
    model: Path
    text: Path
    steps: int


def config_of(setting: Setting, cell: Cell, rate: float, seed: int, work: Path) -> TrainConfig:
    settings = {
        **rates(0.5),
        **STEPS_ALONE,
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

    def rate(self, setting: str, cell: str) -> float:
        """The best learning rate of a cell, as far as it was tried on the first seed."""
        tried = {
            r["rate"]: r["after"] for r in self.find(setting=setting, cell=cell, seed=SEEDS[0])
        }
        return min(tried, key=lambda rate: tried[rate])


def demo_base(work: Path) -> tuple[Path, Path, Path]:
    """The demo's model after training on documentation; its text near and far."""
    material = make(work)
    trained = work / "demo-trained"
    start = work / "models" / material.model.removeprefix("local/")
    if not trained.exists():
        setting = Setting("base", start, material.documents[0], BASE_STEPS)
        folder = Path(tempfile.mkdtemp(dir=work, prefix="base-"))
        config = config_of(setting, DENSE[0], 2e-3, 0, work)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        quietly("train", folder)
        (folder / "model").rename(trained)
        shutil.rmtree(folder)
    return trained, material.documents[0], material.sources[0]


def settings(data: Path, work: Path) -> list[Setting]:
    model, near, far = demo_base(work)
    found = [Setting("demo/near", model, near, 120), Setting("demo/far", model, far, 120)]
    stories = data / "models" / "stories260k-llama"
    if not stories.exists():
        print(f"{stories} is not there: only the demo's model is trained")
        return found
    texts = data / "datasets" / "pretrain"
    return [
        *found,
        Setting("stories/near", stories, texts / "tinystories_train.txt", 200),
        Setting("stories/far", stories, texts / "tinyshakespeare.txt", 200),
    ]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.json)
    for setting in settings(args.data, args.work):
        if args.only and setting.name not in args.only:
            continue
        seed = SEEDS[0]
        for cell in (DENSE[0], DEFAULT):
            for rate in RATES:
                results.run(setting, cell, rate, seed, args.work)
        # Dense training that is cut short has the rate of the whole, every other arm the best of three around the default's.
        dense_rate = results.rate(setting.name, DENSE[0].name)
        middle = results.rate(setting.name, DEFAULT.name)
        for cell in SAT[1:]:
            for rate in (middle, middle / 2, middle * 2) if args.tune else (middle,):
                results.run(setting, cell, rate, seed, args.work)
        for seed in SEEDS:
            for cell in DENSE:
                results.run(setting, cell, dense_rate, seed, args.work)
            for cell in SAT:
                rate = results.rate(setting.name, cell.name)
                results.run(setting, cell, rate, seed, args.work)


def table(args: argparse.Namespace) -> None:
    """Markdown: loss, FLOPs share, and the advantage over dense training at the same FLOPs, by linear interpolation."""
    results = Results(args.json)
    for name in dict.fromkeys(r["setting"] for r in results.rows):
        rows = results.find(setting=name)
        dense_rate = results.rate(name, DENSE[0].name)
        full = results.find(setting=name, cell=DENSE[0].name)[0]["flops"]
        print(f"\n**{name}**: before {rows[0]['before']:.3f}\n")
        print("| cell | learning rate | held-out loss | seeds | FLOPs | probes | better than dense at equal FLOPs by |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for cell in [c.name for c in (*DENSE, *SAT)]:
            if not results.find(setting=name, cell=cell):
                continue
            is_dense = cell.startswith("dense")
            rate = dense_rate if is_dense else results.rate(name, cell)
            mine = results.find(setting=name, cell=cell, rate=rate)
            losses = [r["after"] for r in mine]
            gains = [_dense_at(rows, dense_rate, r) - r["after"] for r in mine]
            flops = statistics.mean(r["flops"] for r in mine) / full
            probes = statistics.mean(r["probe_flops"] / r["flops"] for r in mine)
            print(
                f"| {cell} | {rate:g} | {_spread(losses)} | {len(mine)} | {flops:.3f} | {probes:.1%} | "
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
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help="a learning rate for each cell, not the default's")  # fmt: skip
    parser.add_argument("--only", nargs="*", help="settings to run, as in stories/far")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
