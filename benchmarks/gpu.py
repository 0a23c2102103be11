"""Step time, use of the hardware and memory on one GPU, for shapes of real models.

    python benchmarks/gpu.py [--shapes tinyllama-1.1b llama-3.1-8b ...] [--compile] [--json FILE] [--seconds N]

Random weights serve for speed. bfloat16 over fp32 parameters, sequences of 2,048, attention by SDPA. A shape whose fp32
weights, gradients and moments do not fit is cut to eight of its layers and its head, and is labelled so. Arms run one after
the other, for two do not fit side by side; a GPU that nobody else uses is steady enough. MFU is FLOPs done over what the
card could do; for sparse arms those really computed, never those of the dense model.

`--shapes tiny` shows on any machine that the program works.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import STEPS_ALONE, SatuneArm, Shape, prepared, random_llama
from benchmarks.report import figure, table, write
from cli.demo_material import make

SHAPES = {
    "tiny": Shape(256, 1024, 2, 4, 2, rows=2, width=256),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, rows=4, width=2048, vocab=32_000),
    "llama-2-7b": Shape(4096, 11_008, 32, 32, 32, rows=4, width=2048, vocab=32_000),
    "llama-3.1-8b": Shape(4096, 14_336, 32, 32, 8, rows=4, width=2048, vocab=128_256),
    "qwen2.5-7b": Shape(3584, 18_944, 28, 28, 4, rows=4, width=2048, vocab=152_064),
}
# Dense bfloat16 products, as the makers state them.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
STATE_BYTES = 16  # of a parameter: fp32 weight, gradient, two moments
CUT_LAYERS = 8
CONSTANT = {"dense_start": 0.0, "sparse_share": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "off"},
    "MLP .5": {"omission_rate": {"mlp": 0.5}, "schedule": CONSTANT},
    "MLP .5, heads .5": {"omission_rate": {"mlp": 0.5, "attention": 0.5}, "schedule": CONSTANT},
}
WHOLE_RUN_STEPS = 60
PLANNED_STEPS = 1000
WARM_STEPS = 3


def parameters(shape: Shape) -> int:
    heads = shape.hidden // shape.heads * 2 * (shape.heads + shape.kv_heads)
    layer = shape.hidden * (heads + 3 * shape.intermediate)
    return shape.layers * layer + 2 * shape.hidden * (shape.vocab or 2048)


def fitted(name: str, shape: Shape, memory: int) -> tuple[str, Shape]:
    """The shape, or eight of its layers where the state alone would take more than two thirds of the memory."""
    if parameters(shape) * STATE_BYTES < memory * 2 / 3:
        return name, shape
    return f"{name}, {CUT_LAYERS} layers", dataclasses.replace(shape, layers=CUT_LAYERS)


def arm_of(
    name: str,
    sat: dict[str, Any],
    shape: Shape,
    work: Path,
    *,
    compiled: bool,
    steps: int = PLANNED_STEPS,
) -> SatuneArm:
    settings = {
        **sat,
        **STEPS_ALONE,
        "train": {
            "max_steps": steps,
            "max_seq_len": shape.width,
            "micro_batch_size": shape.rows,
            "learning_rate": 1e-5,
            "compile": compiled,
        },
    }
    config = prepared(
        work,
        model=random_llama(shape, work),
        training=make(work).documents[0],
        sat=settings,
        batch_size=shape.rows,
    )
    return SatuneArm(name, config, work)


def measured(arm: SatuneArm, seconds: float) -> dict[str, Any]:
    """Median step, FLOPs of a step, and peak memory after the first steps."""
    for _ in range(WARM_STEPS):
        arm.advance()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    counters = arm.run.counters
    flops, dense_flops = counters.flops, counters.dense_flops
    taken: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken) < 3:
        taken.append(arm.advance())
    return {
        "seconds": statistics.median(taken),
        "steps": len(taken),
        "spread": [min(taken), max(taken)],
        "flops": (counters.flops - flops) / len(taken),
        "dense_flops": (counters.dense_flops - dense_flops) / len(taken),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def whole_run(shape: Shape, work: Path, dense_step: float, *, compiled: bool) -> dict[str, Any]:
    """Dense training's time over that of a run at the preset `balanced`, its ladder and dense start included."""
    arm = arm_of("balanced", {"mode": "on"}, shape, work, compiled=compiled, steps=WHOLE_RUN_STEPS)
    arm.advance()
    taken = [arm.advance() for _ in range(WHOLE_RUN_STEPS - 1)]
    counters = arm.run.counters
    arm.close()
    return {
        "speedup": dense_step * len(taken) / sum(taken),
        "bound": counters.dense_flops / counters.flops,
    }


def figures_of(name: str, shape: Shape, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in card), None)
    barred = name.startswith("llama-3.1-8b") and ("H100" in card or "H200" in card)
    tokens, dense = shape.rows * shape.width, rows["dense"]
    made = []
    for arm, row in rows.items():
        made.append(
            figure(f"{name}, {arm}: step", row["seconds"], "s", spread=tuple(row["spread"]))
        )
        made.append(figure(f"{name}, {arm}: tokens/s", tokens / row["seconds"], ""))
        if peak:
            mfu = 100 * row["flops"] / row["seconds"] / peak
            bar = 45.0 if barred and arm == "dense" else None
            made.append(figure(f"{name}, {arm}: MFU", mfu, "%", bar))
        if row["peak_bytes"]:
            made.append(figure(f"{name}, {arm}: peak memory", row["peak_bytes"] / 2**30, "GiB"))
        if arm != "dense":
            speedup, bound = dense["seconds"] / row["seconds"], row["dense_flops"] / row["flops"]
            made.append(figure(f"{name}, {arm}: speed-up of a step", speedup, "x"))
            efficiency = (speedup - 1) / (bound - 1)
            made.append(
                figure(f"{name}, {arm}: efficiency", efficiency, "", 0.85 if barred else None)
            )
    return made


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES)[1:])
    parser.add_argument("--compile", action="store_true", help="compile each decoder layer")
    parser.add_argument("--seconds", type=float, default=20, help="timed, for each arm")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if not torch.cuda.is_available() and args.shapes != ["tiny"]:
        parser.error("no CUDA device; only --shapes tiny runs without one")
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 2**34
    figures: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for asked in args.shapes:
        name, shape = fitted(asked, SHAPES[asked], memory)
        details[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            for arm_name, sat in ARMS.items():
                arm = arm_of(arm_name, sat, shape, Path(folder), compiled=args.compile)
                details[name][arm_name] = measured(arm, args.seconds)
                arm.close()
                del arm
                _free()
            figures += figures_of(name, shape, details[name])
            dense_step = details[name]["dense"]["seconds"]
            whole = whole_run(shape, Path(folder), dense_step, compiled=args.compile)
            _free()
        details[name]["whole run"] = whole
        figures.append(
            figure(
                f"{name}, whole run of {WHOLE_RUN_STEPS} steps, balanced over dense",
                whole["speedup"],
                "x",
            )
        )
        figures.append(figure(f"{name}, its bound by counted FLOPs", whole["bound"], "x"))
        if args.json:
            # A run may be cut off: what is known is written after each shape.
            write(args.json, "gpu", figures, compile=args.compile, details=details)
    print(table(figures))


if __name__ == "__main__":
    main()
