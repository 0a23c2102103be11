"""Whole runs beside those of other libraries: the same model, data, batch, precision and optimizer, in one run.

    python benchmarks/peers.py [--json FILE] [--plot FILE] [--steps N] [--libraries NAME ...]

Satune dense and at its presets `balanced` and `fast` with ladder and dense start, and the first steps of Hugging Face's
Trainer, TRL's SFTTrainer and PEFT's LoRA on the Trainer, advancing in turn, each in a process of its own, Satune's with the
settings of the allocator that its worker gives a training. Peak memory and the time to the first step are taken with one arm alone, after warming up, by the
kernel's own mark of the highest resident size.

A GPU is used where there is one, and then precision is bfloat16 for all arms.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.arms import (
    STEPS_ALONE,
    Apart,
    SatuneApart,
    SatuneArm,
    Shape,
    TrainerTurns,
    Turn,
    in_turn,
    prepared,
    random_llama,
    serve,
)
from benchmarks.report import figure, table, write
from cli.demo_material import make
from sat_core.corpus import Corpus
from sat_core.plan.config import TrainConfig

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
SATUNE: dict[str, dict[str, Any]] = {
    "Satune dense": {"mode": "off"},
    "Satune balanced": {"mode": "on"},
    "Satune fast": {"mode": "on", "preset": "fast"},
}
TRAINER, SFT, LORA = "HF Trainer", "TRL SFTTrainer", "PEFT LoRA 16"
# One rate from the first step on: a step's memory, not the dense start's.
SPARSE_STEP = {
    "omission_rate": {"mlp": 0.5, "attention": 0.5},
    "schedule": {"dense_start": 0.0, "sparse_share": 1.0},
}
# Theirs are all alike, so that some are enough.
LIBRARY_STEPS = 24
MEMORY_SHAPE = Shape(hidden=512, intermediate=2048, layers=4, heads=8, kv_heads=4, rows=16)


def config_of(name: str, sat: dict[str, Any], shape: Shape, steps: int, work: Path) -> TrainConfig:
    settings = {
        **sat,
        **STEPS_ALONE,
        "train": {
            "max_steps": steps,
            "max_seq_len": shape.width,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "micro_batch_size": shape.rows,
        },
    }
    return prepared(
        work / name.replace(" ", "-"),
        model=random_llama(shape, work),
        training=make(work).documents[0],
        sat=settings,
        batch_size=shape.rows,
    )


def satune(pipe: Connection, config: TrainConfig, work: Path) -> None:
    """The process of an arm of Satune's."""
    turn = Turn(pipe)
    turn.answers |= memory_answers()
    serve(turn, SatuneArm("Satune", config, work))


def library(
    pipe: Connection, name: str, shape: Shape, steps: int, work: Path, corpus: Path
) -> None:
    """The process of another library's arm; it trains on the sequences of Satune's own corpus."""
    turn = Turn(pipe)
    turn.answers |= memory_answers()
    trainers(shape, steps, work, corpus)[name]([TrainerTurns(turn)]).train()


def memory_answers() -> dict[str, Callable[[], Any]]:
    """What a process can tell of its memory: the peak since it was last forgotten, above what is held now."""
    process = psutil.Process()

    def trim() -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def forget() -> None:
        trim()
        # Linux forgets the highest resident size so far.
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - before

    trim()
    before = process.memory_info().rss
    return {"forget peak": forget, "peak bytes": peak}


def trainers(
    shape: Shape, steps: int, work: Path, corpus: Path
) -> dict[str, Callable[[list[Any]], Any]]:
    """How each library's trainer is made, given its callbacks."""
    train = Corpus(corpus, "train")
    rows = [
        {"input_ids": ids, "labels": ids}
        for i in range(min(len(train), steps * shape.rows))
        for ids in train.batch([i], "cpu").input_ids_BT.tolist()
    ]
    shared: dict[str, Any] = {
        "output_dir": str(work / "trainer"),
        "per_device_train_batch_size": shape.rows,
        "max_steps": steps + 4,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "bf16": torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(random_llama(shape, work), dtype=torch.float32)

    def quiet(trainer: Any) -> Any:
        trainer.remove_callback(PrinterCallback)
        return trainer

    def stock(callbacks: list[Any], adapt: Callable[[Any], Any] = lambda m: m) -> Any:
        arguments = TrainingArguments(**shared)
        return quiet(
            Trainer(model=adapt(model()), args=arguments, train_dataset=rows, callbacks=callbacks)
        )

    def lora(callbacks: list[Any]) -> Any:
        settings = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return stock(callbacks, lambda m: get_peft_model(m, settings))

    def supervised(callbacks: list[Any]) -> Any:
        arguments = SFTConfig(**shared, max_length=shape.width, gradient_checkpointing=False)
        data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
        return quiet(
            SFTTrainer(model=model(), args=arguments, train_dataset=data, callbacks=callbacks)
        )

    return {TRAINER: stock, SFT: supervised, LORA: lora}


def whole_runs(
    shape: Shape, steps: int, work: Path, libraries: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every arm from its first step to its last, ladder and dense start included."""
    configs = {name: config_of(name, sat, shape, steps, work) for name, sat in SATUNE.items()}
    corpus = Path(configs["Satune dense"].corpus)
    ours = [SatuneApart(name, satune, config, work) for name, config in configs.items()]
    others = [Apart(name, library, name, shape, steps, work, corpus) for name in libraries]
    seconds = in_turn([*ours, *others], min(steps, LIBRARY_STEPS))
    for name, more in in_turn(ours, steps - LIBRARY_STEPS).items():
        seconds[name] += more
    counted = {arm.name: arm.ask("counters") for arm in ours}
    choices = {arm.name: arm.ask("choice seconds") for arm in ours}
    for arm in [*ours, *others]:
        arm.close()
    # An arm's first step pays for warming up.
    totals = {name: sum(taken[1:]) for name, taken in seconds.items()}
    tokens = shape.rows * shape.width
    figures = [
        figure(f"{name}, tokens/s", tokens * (len(seconds[name]) - 1) / total, "")
        for name, total in totals.items()
    ]
    dense = totals["Satune dense"]
    for name, bar in (("Satune balanced", 1.30), ("Satune fast", 1.45)):
        counters = counted[name]
        figures += [
            figure(f"whole run, {name} over Satune dense", dense / totals[name], "x", bar),
            figure("its bound by counted FLOPs", counters.dense_flops / counters.flops, "x"),
        ]
    for name in (n for n in (TRAINER, SFT) if n in libraries):
        pairs = zip(seconds[name][1:], seconds["Satune dense"][1:LIBRARY_STEPS], strict=True)
        low, middle, high = statistics.quantiles([t / o for t, o in pairs], n=4)
        bar = 1.0 if name == TRAINER else None
        figures.append(figure(f"Satune dense over {name}", middle, "x", bar, spread=(low, high)))
    if LORA in libraries:
        its_run = statistics.mean(seconds[LORA][1:]) * (steps - 1)
        figures.append(
            figure(
                f"whole run, Satune balanced over {LORA}", its_run / totals["Satune balanced"], "x"
            )
        )
    figures.append(
        figure(
            f"sweeps, probes and refreshes, share of a balanced run of {steps} steps",
            100 * sum(choices["Satune balanced"]) / totals["Satune balanced"],
            "%",
            2.0,
            "lower",
        )
    )
    return figures, {"seconds": seconds, "choice_seconds": choices}


def memory(libraries: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Peak memory of a step above what was there before the model, and the time to the first step, of each arm alone."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("dense", "sparse", *libraries):
            sat = SPARSE_STEP if name == "sparse" else {"mode": "off"}
            config = config_of(name, sat, MEMORY_SHAPE, 1000, work)
            if name in ("dense", "sparse"):
                arm: Apart = SatuneApart(name, satune, config, work)
            else:
                arm = Apart(name, library, name, MEMORY_SHAPE, 8, work, Path(config.corpus))
            first = arm.made_seconds + arm.advance()
            arm.advance()
            # What follows is a step's peak, not a probe's.
            arm.ask("forget peak")
            arm.advance()
            found[name] = {"peak_bytes": arm.ask("peak bytes"), "first_step_seconds": first}
            arm.close()
    mib = {arm: row["peak_bytes"] / 2**20 for arm, row in found.items()}
    figures = [
        figure("peak memory of a step, rate .5 over dense", mib["sparse"] / mib["dense"], "x", 0.80, "lower"),
        *(figure(f"peak memory of a step, {arm}", value, "MiB") for arm, value in mib.items()),
        *(figure(f"loading and first step, {arm}", row["first_step_seconds"], "s") for arm, row in found.items()),
    ]  # fmt: skip
    return figures, found


def plot(seconds: dict[str, list[float]], path: Path) -> None:
    """Steps done against seconds, one line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axis = pyplot.subplots(figsize=(7, 4.5))
    for name, taken in seconds.items():
        elapsed = [sum(taken[1 : i + 1]) for i in range(len(taken))]
        axis.plot(elapsed, range(len(taken)), label=name)
    axis.set(xlabel="seconds", ylabel="steps of the run")
    axis.legend()
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole runs")
    parser.add_argument(
        "--libraries", nargs="+", choices=[TRAINER, SFT, LORA], default=[TRAINER, SFT, LORA], help="beside which"
    )  # fmt: skip
    args = parser.parse_args()
    # Sequences as short as the smallest probe, so that a short run is to a long one as its steps are.
    shape = Shape(layers=4, rows=4, width=256)
    with tempfile.TemporaryDirectory() as folder:
        figures, details = whole_runs(shape, args.steps, Path(folder), args.libraries)
    more, processes = memory(args.libraries) if not torch.cuda.is_available() else ([], {})
    figures += more
    print(table(figures))
    if args.json:
        write(args.json, "peers", figures, shape=vars(shape), memory_shape=vars(MEMORY_SHAPE), processes=processes, **details)  # fmt: skip
    if args.plot:
        plot(details["seconds"], args.plot)


if __name__ == "__main__":
    main()
