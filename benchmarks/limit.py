"""How close a sparse step comes to what its arithmetic allows: efficiency = (S - 1) / (S_b - 1).

    python benchmarks/limit.py [--json FILE] [--plot FILE] [--steps N] [--batch 4x512] [--quick]

S is the measured speed-up over dense steps of the same run, S_b the one that counted FLOPs allow. Whole training steps
first, of two widths: real runs of the core, all that belongs to a step included, advancing in turn, each in a process of
its own, for in a common one the narrow step is given memory that the wide one has touched; where the time of a step goes;
then, in one process, one decoder layer over widths and numbers of tokens. The count itself is held against torch's own
counter, with the math attention backend, for torch counts nothing for the others on a CPU (and counts the whole square
of a causal mask).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arms import (
    STEPS_ALONE,
    SatuneApart,
    SatuneArm,
    Shape,
    Turn,
    in_turn,
    prepared,
    random_llama,
    serve,
)
from benchmarks.report import figure, table, write
from cli.demo_material import make
from sat_core import step as step_module
from sat_core.corpus import IGNORED_LABEL, Batch
from sat_core.loss import token_loss
from sat_core.plan.accounting import Cost, step_flops
from sat_core.plan.config import SatConfig, TrainConfig
from sat_core.plan.quote import probe_rows
from sat_core.progress import Counters
from sat_core.sparsity import sparsify

REFRESH_PERIODS = (1, 10, 50)
EFFICIENCY_BAR = 0.90
# A rate from the first step to the last, so that every step but the first is what is looked for.
CONSTANT = {"schedule": {"dense_start": 0.0, "sparse_share": 1.0}}
DENSE, MLP, BOTH = "dense", "MLP .5", "MLP .5, heads .5"
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"mode": "off"},
    MLP: {"omission_rate": {"mlp": 0.5}, **CONSTANT},
    BOTH: {"omission_rate": {"mlp": 0.5, "attention": 0.5}, **CONSTANT},
}
SHAPES = (Shape(layers=4), Shape(hidden=1024, intermediate=4096, heads=16, layers=4))
CHOICES = 3
GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")


def satune(pipe: Connection, config: TrainConfig, work: Path) -> None:
    """The process of an arm."""
    turn = Turn(pipe)
    arm = SatuneArm("Satune", config, work)
    turn.answers["breakdown"] = lambda: breakdown(arm, rounds=2)
    turn.answers |= {f"refresh {p}": partial(refresh_seconds, arm, p) for p in REFRESH_PERIODS}
    serve(turn, arm)


def apart(name: str, sat: dict[str, Any], shape: Shape, work: Path) -> SatuneApart:
    """An arm in a process of its own, warmed up. The plan is of a long run, so that a probe sees what it would see of one."""
    train = {"max_steps": 1000, "max_seq_len": shape.width, "learning_rate": 1e-4}
    config = prepared(
        work,
        model=random_llama(shape, work),
        training=make(work).documents[0],
        sat={**sat, **STEPS_ALONE, "train": train},
        batch_size=shape.rows,
    )
    arm = SatuneApart(name, satune, config, work)
    arm.advance()
    arm.advance()
    return arm


def whole_steps(
    shape: Shape, work: Path, steps: int, *, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figures of whole training steps, and unless `quick` the breakdown of one dense and one sparse step."""
    arms = {name: apart(name, sat, shape, work) for name, sat in ARMS.items()}
    seconds = in_turn(list(arms.values()), steps)
    bounds = {name: flop_bound(arms[name].ask("counters")) for name in (MLP, BOTH)}
    parts = {} if quick else {name: arms[name].ask("breakdown") for name in (DENSE, MLP)}
    periods = REFRESH_PERIODS[-1:] if quick else REFRESH_PERIODS
    refreshes = {n: {p: arms[n].ask(f"refresh {p}") for p in periods} for n in (MLP, BOTH)}
    for arm in arms.values():
        arm.close()
    figures = efficiencies(shape, bounds, seconds, refreshes)
    for arm_name, shares in parts.items():
        name = f"width {shape.hidden}, {arm_name}"
        figures += [figure(f"{name}: {part}", 100 * s, "%") for part, s in shares.items()]
    return figures, {"seconds": seconds, "refresh_seconds": refreshes, "breakdown": parts}


def efficiencies(
    shape: Shape,
    bounds: dict[str, float],
    seconds: dict[str, list[float]],
    refreshes: dict[str, dict[int, float]],
) -> list[dict[str, Any]]:
    """Speed-up, bound and efficiency without refresh and at each refresh period; `refreshes` are the seconds of one."""
    dense = statistics.median(seconds[DENSE])
    figures = []
    for arm, bound in bounds.items():
        name = f"width {shape.hidden}, {arm}"
        low, speedup, high = ratio_quartiles(seconds[DENSE], seconds[arm])
        figures += [
            figure(f"speed-up of a step, {name}", speedup, "x", spread=(low, high)),
            figure(f"bound by counted FLOPs, {name}", bound, "x"),
        ]
        for period, taken in refreshes[arm].items():
            # Seconds for each second of a dense step, so that the three stand on one scale.
            share = taken / period / dense
            found = [(1 / (1 / s + share) - 1) / (bound - 1) for s in (low, speedup, high)]
            figures.append(
                figure(
                    f"efficiency, {name}, refresh {period}",
                    found[1],
                    "",
                    EFFICIENCY_BAR if period == 50 else None,
                    spread=(found[0], found[2]),
                )
            )
    return figures


def refresh_seconds(arm: SatuneArm, period: int) -> float:
    """Seconds of a refresh inside a stage, on as much as its probe looks at with this period."""
    run = arm.run
    sat = dataclasses.replace(run.config.sat, refresh_every=period)
    taken = []
    for _ in range(CHOICES):
        # Other weights and other sequences each time, so that units move.
        arm.advance()
        batch = run.stepper._micro_batches()[0]
        rows = probe_rows(sat, run.config.batch_size, batch.input_ids_BT.shape[1])
        started = time.perf_counter()
        made = run.parts.sparsity.choose(run.counters.step, batch.rows(0, rows), allot_anew=False)
        taken.append(time.perf_counter() - started)
        if not any(made.churn.values()):
            raise RuntimeError("a refresh moved nobody, which is not what is to be timed")
    return statistics.median(taken)


def flop_bound(counters: Counters) -> float:
    """Dense over sparse FLOPs, probes left out, of steps that all had one width."""
    return counters.dense_flops / (counters.flops - counters.probe_flops)


def ratio_quartiles(dense: list[float], sparse: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of steps that were made next to each other: what slows both leaves them as they are."""
    ratios = [d / s for d, s in zip(dense, sparse, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


@contextlib.contextmanager
def timed(spent: Counter[str], owner: Any, attribute: str, label: str) -> Iterator[None]:
    """Within, seconds spent in an attribute of an object are added up."""
    stock = getattr(owner, attribute)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - started

    setattr(owner, attribute, wrapper)
    try:
        yield
    finally:
        setattr(owner, attribute, stock)


def breakdown(arm: SatuneArm, rounds: int) -> dict[str, float]:
    """Shares of a step's time: by part of the step, and of that the matrix products and the attention core."""
    run, spent = arm.run, Counter[str]()
    with contextlib.ExitStack() as stack:
        for owner, attribute, label in (
            (step_module, "token_loss", "forward and loss"),
            (torch.autograd, "backward", "backward"),
            (run.parts.optimizer, "step", "optimizer"),
            (torch.nn.utils, "get_total_norm", "clipping"),
            (torch.nn.utils, "clip_grads_with_norm_", "clipping"),
            (run.stepper, "_choose", "probe and refresh"),
            (run.stepper, "_micro_batches", "data"),
            (run, "_report", "events"),
        ):
            stack.enter_context(timed(spent, owner, attribute, label))
        total = sum(arm.advance() for _ in range(rounds))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = arm.advance()
    shares = {label: value / total for label, value in spent.items()}
    shares["rest"] = 1 - sum(shares.values())
    rows = {row.key: row.self_cpu_time_total / 1e6 for row in profiler.key_averages()}
    shares["of which matrix products"] = sum(v for k, v in rows.items() if k in GEMMS) / profiled
    shares["of which attention core"] = (
        sum(v for k, v in rows.items() if "scaled_dot_product" in k or "flash_attention" in k)
        / profiled
    )
    return shares


def one_layer(
    tokens: tuple[int, ...], rates: tuple[float, ...], rounds: int
) -> list[dict[str, Any]]:
    """Speed-up of forward and backward of one decoder layer, its MLP channels asleep at a rate; no optimizer."""
    rows = []
    for hidden in (768, 1024):
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=1,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 256,
            vocab_size=64,
        )
        for count in tokens:
            layers = {rate: narrowed(config, rate) for rate in (0.0, *rates)}
            seconds: dict[float, list[float]] = {rate: [] for rate in layers}
            for turn in range(rounds + 1):
                for rate, (model, sparsity) in layers.items():
                    del sparsity
                    taken = forward_and_backward(model, count)
                    if turn:
                        seconds[rate].append(taken)
            for rate in rates:
                bound = layer_bound(*layers[rate], count)
                low, speedup, high = ratio_quartiles(seconds[0.0], seconds[rate])
                rows.append(
                    {
                        "hidden": hidden,
                        "tokens": count,
                        "rate": rate,
                        "speedup": speedup,
                        "bound": bound,
                        "efficiency": (speedup - 1) / (bound - 1),
                        "spread": [low, high],
                    }
                )
    return rows


def narrowed(config: LlamaConfig, rate: float) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    sparsity = sparsify(
        model,
        None,
        SatConfig(total_steps=1, mlp_rate=rate, metric="magnitude", allotment="uniform", max_gap=0),
    )
    if rate:
        sparsity.choose(0, {})
    return model, sparsity


def forward_and_backward(model: Any, tokens: int) -> float:
    layer, rope = model.model.layers[0], model.model.rotary_emb
    hidden = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    places = torch.arange(tokens)[None]
    around = rope(hidden, places)
    started = time.perf_counter()
    out = layer(hidden, position_embeddings=around, position_ids=places)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    taken = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return taken


def layer_bound(_: Any, sparsity: Any, tokens: int) -> float:
    cost = Cost(tokens=tokens, attended_pairs=tokens * (tokens + 1) // 2, labels=0)
    dense = type(sparsity.widths).dense(sparsity.shape)
    return step_flops(sparsity.shape, dense, cost) / step_flops(
        sparsity.shape, sparsity.widths, cost
    )


def count_check(work: Path) -> float:
    """Counted FLOPs of a narrow step over torch's own count of it."""
    shape = Shape(hidden=256, intermediate=1024, layers=2, heads=4, kv_heads=2)
    model = LlamaForCausalLM.from_pretrained(random_llama(shape, work)).train()
    sparsity = sparsify(model, None, SatConfig(total_steps=1, mlp_rate=0.5, attention_rate=0.5))
    ids = torch.randint(0, 256, (2, 128))
    batch = Batch(ids, ids.clone(), torch.full((2,), 128))
    sparsity.choose(0, batch)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        token_loss(model, batch).total.backward()
    labels = int((batch.labels_BT[:, 1:] != IGNORED_LABEL).sum())
    whole_square = Cost(tokens=256, attended_pairs=2 * 128 * 128, labels=labels)
    return step_flops(sparsity.shape, sparsity.widths, whole_square) / counter.get_total_flops()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured speed-up of a layer against its bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axis = pyplot.subplots(figsize=(6, 5))
    for hidden in sorted({r["hidden"] for r in rows}):
        for tokens in sorted({r["tokens"] for r in rows}):
            points = [(r["bound"], r["speedup"]) for r in rows if (r["hidden"], r["tokens"]) == (hidden, tokens)]  # fmt: skip
            axis.plot(
                *zip(*points, strict=True), marker="o", label=f"width {hidden}, {tokens} tokens"
            )
    top = max(r["bound"] for r in rows)
    axis.plot([1, top], [1, top], color="gray", linestyle=":", label="all that FLOPs allow")
    axis.set(xlabel="bound by counted FLOPs", ylabel="measured speed-up of a layer")
    axis.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    parser.add_argument("--steps", type=int, default=12, help="steps of each arm")
    parser.add_argument("--batch", default="4x512", help="sequences of a step, and their tokens")
    parser.add_argument("--quick", action="store_true", help="efficiencies of whole steps alone")
    args = parser.parse_args()
    rows, width = map(int, args.batch.split("x"))
    shapes = [dataclasses.replace(shape, rows=rows, width=width) for shape in SHAPES]
    figures, details = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checked = count_check(work)
        for shape in shapes:
            found, details[shape.hidden] = whole_steps(shape, work, args.steps, quick=args.quick)
            figures += found
    layers = [] if args.quick else one_layer((512, 2048), (0.25, 0.5, 0.75), rounds=5)
    figures.append(figure("counted FLOPs over torch's own count", checked, "x"))
    print(table(figures))
    if layers:
        print(
            "\n| width | tokens | rate | speed-up of a layer | bound | efficiency |\n|---|---|---|---|---|---|"
        )
    for r in layers:
        print(f"| {r['hidden']} | {r['tokens']} | {r['rate']} | {r['speedup']:.2f}x | {r['bound']:.2f}x | {r['efficiency']:.2f} |")  # fmt: skip
    if args.json:
        write(
            args.json,
            "limit",
            figures,
            shapes=[vars(s) for s in shapes],
            layers=layers,
            steps=details,
        )
    if args.plot and layers:
        plot(layers, args.plot)


if __name__ == "__main__":
    main()
