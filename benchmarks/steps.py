"""How long a training step takes: Satune sparse and dense, beside Hugging Face's Trainer, in one run.

    python benchmarks/steps.py [--json FILE] [--rounds N]

All arms train the same random Llama on the same batches with the same precision and torch's fused AdamW, interleaved in
rounds, so that a busy machine slows all of them alike. Printed are medians of step seconds with their spread; what
matters are the ratios of one run, never a number of this run beside one of another.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sat_core.data.corpus import Batch
from sat_core.loss import token_loss
from sat_core.optim import build_optimizer
from sat_core.plan.accounting import Cost, Widths, step_flops
from sat_core.plan.config import SatConfig
from sat_core.sparsity import Sparsity, sparsify

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """What is trained: tokens are `rows` times `width` a step."""

    hidden: int = 768
    intermediate: int = 3072
    layers: int = 8
    heads: int = 12
    kv_heads: int = 4
    vocab: int = 4096
    rows: int = 4
    width: int = 512


def build(shape: Shape) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.width,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def batch_of(shape: Shape, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.width), generator=generator)
    return Batch(ids, ids.clone(), torch.full((shape.rows,), shape.width))


def satune_arm(shape: Shape, rate: float) -> tuple[Callable[[int], list[float]], Sparsity]:
    """Steps of Satune's own code; the selection is made once, as inside a rung."""
    model = build(shape)
    optimizer = build_optimizer(model, learning_rate=LEARNING_RATE, weight_decay=0.01)
    config = SatConfig(
        total_steps=1, mlp_rate=rate, attention_rate=rate, allotment="uniform", dense_start=0.0
    )
    sparsity = sparsify(model, optimizer, config)
    if rate:
        sparsity.choose(0, batch_of(shape, 0))

    def steps(count: int) -> list[float]:
        seconds = []
        for step in range(count):
            batch = batch_of(shape, step)
            started = time.perf_counter()
            found = token_loss(model, batch)
            torch.autograd.backward(found.total / found.labels)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(found.total.detach())
            seconds.append(time.perf_counter() - started)
        return seconds

    return steps, sparsity


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks[-1] = time.perf_counter() - self.marks[-1]


def trainer_arm(shape: Shape, folder: str) -> Callable[[int], list[float]]:
    """Steps of Hugging Face's Trainer with its defaults but for what all arms share."""
    model = build(shape)

    def steps(count: int) -> list[float]:
        data = [
            {"input_ids": row, "labels": row}
            for s in range(count)
            for row in batch_of(shape, s).input_ids_BT
        ]
        clock = _Clock()
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.rows,
            max_steps=count,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.marks

    return steps


def flop_bound(shape: Shape, dense: Sparsity, sparse: Sparsity) -> float:
    """Speed-up that counted FLOPs allow."""
    cost = Cost(
        tokens=shape.rows * shape.width,
        attended_pairs=shape.rows * shape.width * (shape.width + 1) // 2,
        labels=shape.rows * (shape.width - 1),
    )
    return step_flops(dense.shape, Widths.dense(dense.shape), cost) / step_flops(
        sparse.shape, sparse.widths, cost
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=4, help="steps a round; the first of each round warms up"
    )
    args = parser.parse_args()
    shape = Shape()
    dense, dense_sparsity = satune_arm(shape, 0.0)
    sparse, sparse_sparsity = satune_arm(shape, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "satune sparse .5": sparse,
            "satune dense": dense,
            "Trainer dense": trainer_arm(shape, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(args.rounds):
            for name, steps in arms.items():
                seconds[name] += steps(args.steps)[1:]
            print(f"round {number + 1}/{args.rounds}", flush=True)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    bound = flop_bound(shape, dense_sparsity, sparse_sparsity)
    speedup = median["satune dense"] / median["satune sparse .5"]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "shape": vars(shape),
        "seconds": {
            n: {"median": median[n], "min": min(s), "max": max(s), "steps": len(s)}
            for n, s in seconds.items()
        },
        "speedup_sparse_over_dense": speedup,
        "flop_bound": bound,
        "efficiency": (speedup - 1) / (bound - 1),
        "dense_over_trainer": median["Trainer dense"] / median["satune dense"],
    }
    for name, figures in result["seconds"].items():
        print(
            f"{name:18} {figures['median']:.3f} s  [{figures['min']:.3f}, {figures['max']:.3f}]  n={figures['steps']}"
        )
    print(
        f"sparse over dense  {speedup:.2f}x (bound by FLOPs {bound:.2f}x, efficiency {result['efficiency']:.2f})"
    )
    print(f"dense over Trainer {result['dense_over_trainer']:.2f}x")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
