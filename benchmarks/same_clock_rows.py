"""What the rows of `same_clock` say: losses side by side, how far below dense training, a table and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import Rows, figure

DENSE_NAME = "dense"
SEEDS = (0, 1, 2)
DENSE_STEPS = 160


class Results(Rows):
    """Two kinds of rows: `clock` says how many steps of an arm fit, `run` what it ended with."""

    def tasks(self) -> list[str]:
        """Those that something ran of, in the order of the rows."""
        return list(dict.fromkeys(r["task"] for r in self.find(kind="run")))

    def best_rate(self, task: str, arm: str, seed: int) -> float:
        tried = {
            r["rate"]: r["after"] for r in self.find(kind="run", task=task, arm=arm, seed=seed)
        }
        return float(min(tried, key=lambda rate: tried[rate]))


def figures(results: Results) -> list[dict[str, Any]]:
    """How much lower than dense each arm ended; the bar is the noise, two standard errors over the seeds."""
    made = []
    for task in results.tasks():
        rows = {row["arm"]: row for row in judged(task, results)}
        for name, row in rows.items():
            if name != DENSE_NAME:
                noise = 2 * row["lower_sd"] / row["seeds"] ** 0.5
                bar = noise if name.startswith("SAT") else None
                made.append(
                    figure(f"{task}, {name}: below dense by", row["lower_than_dense"], "nats", bar)
                )
        lora = max(
            (r["lower_than_dense"] for n, r in rows.items() if n.startswith("LoRA")), default=None
        )
        if lora is not None and "SAT balanced" in rows:
            ahead = rows["SAT balanced"]["lower_than_dense"] - lora
            made.append(figure(f"{task}, SAT balanced: below LoRA by", ahead, "nats", 0.0))
    return made


def best_lora(task: str, results: Results) -> str:
    """The rank that ended lower on the first seed; empty where none ran."""
    ran = [
        r for r in results.find(kind="run", task=task, seed=SEEDS[0]) if r["arm"].startswith("LoRA")
    ]
    return str(min(ran, key=lambda r: float(r["after"]))["arm"]) if ran else ""


def judged(task: str, results: Results) -> list[dict[str, Any]]:
    """One row an arm: loss at its best learning rate, over seeds, and how much lower than dense of the same seed.

    `outside_noise` is true where the mean difference is more than two standard errors away from zero, all seeds agreeing.
    """
    ran = {r["arm"] for r in results.find(kind="run", task=task)}
    clock_rows = results.find(kind="clock", task=task)
    speedups = {r["arm"]: r["dense_seconds"] / r["seconds"] for r in clock_rows if r["arm"] in ran}
    tuned_at = {arm: results.best_rate(task, arm, SEEDS[0]) for arm in speedups}
    after = {
        arm: {r["seed"]: r for r in results.find(kind="run", task=task, arm=arm, rate=rate)}
        for arm, rate in tuned_at.items()
    }
    rows = []
    for arm, runs in after.items():
        shared = sorted(runs.keys() & after[DENSE_NAME].keys())
        lower = [after[DENSE_NAME][s]["after"] - runs[s]["after"] for s in shared]
        losses = [runs[s]["after"] for s in sorted(runs)]
        error = statistics.stdev(lower) / len(lower) ** 0.5 if len(lower) > 1 else float("inf")
        mean = statistics.mean(lower)
        rows.append(
            {
                "arm": arm,
                "rate": tuned_at[arm],
                "steps": next(iter(runs.values()))["steps"],
                "speedup": speedups[arm],
                "flops": statistics.mean(r["flops"] for r in runs.values()),
                "before": next(iter(runs.values()))["before"],
                "loss": statistics.mean(losses),
                "loss_sd": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "lower_than_dense": mean,
                "lower_sd": statistics.stdev(lower) if len(lower) > 1 else 0.0,
                "outside_noise": abs(mean) > 2 * error and len({d > 0 for d in lower}) == 1,
                "seeds": len(losses),
            }
        )
    return rows


def table(results: Results) -> None:
    """All tasks in Markdown."""
    for name in results.tasks():
        rows = judged(name, results)
        print(f"\n**{name}**: held-out loss {rows[0]['before']:.3f} before\n")
        print(
            "| arm | steps in the same time | step over dense step | learning rate | FLOPs | held-out loss | seeds | lower than dense by | outside noise |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        dense_flops = next(r["flops"] for r in rows if r["arm"] == DENSE_NAME)
        for r in rows:
            print(
                f"| {r['arm']} | {r['steps']} | {r['speedup']:.2f}x faster | {r['rate']:g} | {r['flops'] / dense_flops:.2f} | "
                f"{r['loss']:.4f} ± {r['loss_sd']:.4f} | {r['seeds']} | {r['lower_than_dense']:+.4f} ± {r['lower_sd']:.4f} | "
                f"{'yes' if r['outside_noise'] else 'no'} |"
            )


def plot(results: Results, path: Path) -> None:
    """One row of panels a task: loss against seconds, and against FLOPs; first seed, best learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = results.tasks()
    figure, axes = pyplot.subplots(len(names), 2, figsize=(11, 3.2 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        lora = best_lora(name, results)
        dense = results.find(kind="clock", task=name, arm=DENSE_NAME)[0]["seconds"]
        for clock_row in results.find(kind="clock", task=name):
            arm = clock_row["arm"]
            ran = results.find(kind="run", task=name, arm=arm)
            if not ran or (arm.startswith("LoRA") and arm != lora):
                continue
            rate = results.best_rate(name, arm, SEEDS[0])
            found = results.find(kind="run", task=name, arm=arm, rate=rate, seed=SEEDS[0])[0]
            share = clock_row["seconds"] / clock_row["dense_seconds"]
            step_seconds = share * dense / (DENSE_STEPS - 1)
            points = found["curve"]
            style = {"label": arm, "linewidth": 1.6, "marker": "."}
            row[0].plot([p[0] * step_seconds for p in points], [p[2] for p in points], **style)
            row[1].plot([p[1] for p in points], [p[2] for p in points], **style)
        row[0].set(title=name, xlabel="seconds of training", ylabel="held-out loss")
        row[1].set(title=name, xlabel="FLOPs")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
