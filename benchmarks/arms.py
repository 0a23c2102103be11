"""Arms of a comparison that take their steps in turn.

Each arm holds a run that stands still between steps, so arms can be advanced alternately, step by step, and whatever else
the machine does slows all of them alike. That is why a ratio of two arms is worth something on a busy machine; runs one
after the other, the road not taken, need a quiet one. A Satune arm is a real run of the core with all that belongs to a
step: choosing, probes, guards, events. Where a few per cent count each has a process of its own (`Apart`), for what one has
allocated makes another faster or slower.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Protocol
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from cli.demo_material import make
from sat_core.__main__ import main as sat_core
from sat_core.events import EventLog
from sat_core.parallel import Parallel
from sat_core.plan.config import TrainConfig
from sat_core.trainer import Run
from sat_io.__main__ import main as sat_io
from worker.child import KEEP_FREED

# The planned ladder to its end: how large the gap of a random model is says nothing of one that has learned.
UNGUARDED: dict[str, Any] = {"guard": {"max_gap": 0}}
# Nothing beside the steps, where their speed is what is looked for.
STEPS_ALONE: dict[str, Any] = {
    **UNGUARDED,
    "eval": {"every": 0, "forgetting_sequences": 0},
    "checkpoints": {"every": 0},
}


class Arm(Protocol):
    """Something that can make one more step."""

    name: str

    def advance(self) -> float:
        """Make a step; its seconds."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@dataclass(frozen=True)
class Shape:
    """A Llama, and a step of `rows` sequences of `width` tokens; `vocab` is None for the tokenizer's own."""

    hidden: int = 768
    intermediate: int = 3072
    layers: int = 8
    heads: int = 12
    kv_heads: int = 4
    rows: int = 4
    width: int = 512
    vocab: int | None = None


def random_llama(shape: Shape, work: Path) -> Path:
    """A model folder with random weights of a shape, and the demo's tokenizer; made once."""
    fields = (
        shape.hidden,
        shape.intermediate,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.vocab or 0,
    )
    folder = work / f"llama-{'-'.join(map(str, fields))}"
    if (folder / "config.json").exists():
        return folder
    material = make(work)
    demo = work / "models" / material.model.removeprefix("local/")
    vocab = json.loads((demo / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab or vocab,
        max_position_embeddings=4096,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for path in demo.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def quietly(command: str, folder: Path) -> None:
    """A command on a run folder, its log beside it; leaves the program where it fails."""
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        code = (sat_core if command == "train" else sat_io)([command, str(folder)])
    if code:
        sys.exit((folder / "events.jsonl").read_text() + (folder / "log.txt").read_text())


def prepared(
    work: Path,
    *,
    model: Path,
    training: Path,
    sat: dict[str, Any],
    validation: Path | None = None,
    seed: int = 0,
    **hyperparameters: Any,
) -> TrainConfig:
    """A run's configuration with every number stated; the corpus is made once and found again."""
    work.mkdir(parents=True, exist_ok=True)
    source = lambda path: {"path": str(path), "filename": path.name} if path else None  # noqa: E731
    config = {
        "format": "satune.prepare/1",
        "request": {
            "model": "local/base",
            "seed": seed,
            "hyperparameters": hyperparameters,
            "sat": sat,
        },
        "model": {"name": "local/base", "path": str(model), "revision": None},
        "training_file": source(training),
        "validation_file": source(validation),
        "corpora_dir": str(work / "corpora"),
    }
    folder = Path(tempfile.mkdtemp(dir=work, prefix="prepare-"))
    (folder / "config.json").write_text(json.dumps(config))
    quietly("prepare", folder)
    made = json.loads((folder / "train.json").read_text())["config"]
    shutil.rmtree(folder)
    return TrainConfig.from_dict(made)


class SatuneArm:
    """A run of the core, a step at a time; `run.counters` counts what it did."""

    def __init__(self, name: str, config: TrainConfig, work: Path) -> None:
        self.name = name
        self.folder = Path(tempfile.mkdtemp(dir=work, prefix="arm-"))
        self._events = EventLog(self.folder)
        self.run = Run(self.folder, config, self._events, lambda: False, Parallel())

    def advance(self) -> float:
        started = time.perf_counter()
        self.run.advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the run told, of one kind."""
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def close(self) -> None:
        self._events.__exit__()
        shutil.rmtree(self.folder)


class Turn:
    """A child's end of `Apart`: obeys between two steps, and tells what a step took."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._started = time.perf_counter()
        self.answers: dict[str, Callable[[], Any]] = {}

    def wait(self) -> None:
        """Until a step is wanted; leaves the process where none is any more."""
        while (order := self._pipe.recv()) != "advance":
            if order == "close":
                raise SystemExit
            self._pipe.send(self.answers[order]())
        self._started = time.perf_counter()

    def done(self) -> None:
        """A step, or before the first the making of the arm, has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._pipe.send(time.perf_counter() - self._started)


def serve(turn: Turn, arm: SatuneArm) -> None:
    """The process of an arm of Satune's, once the arm is made."""
    turn.answers["counters"] = lambda: arm.run.counters
    turn.answers["choice seconds"] = lambda: [e["seconds"] for e in arm.events("selection")]
    turn.done()
    while True:
        turn.wait()
        arm.advance()
        turn.done()


class TrainerTurns(TrainerCallback):
    """Lets a Trainer make one step at a time; fetching the batch is part of the step."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turn.done()
        self._turn.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._turn.done()
        self._turn.wait()


class Apart:
    """An arm in a process of its own: its main thread, its heap, nothing shared with the others but the processor.

    `train` is called there with the pipe's other end and `arguments`; it makes the arm, tells `Turn.done`, and then waits for
    its turn before each step. The road not taken is a thread for who has a loop of his own: a thread allocates from another
    arena than the main one, and one and the same arm is faster or slower by that alone.

    Attributes:
        made_seconds: what making the arm took, from `Turn` on.
    """

    environment: ClassVar[Mapping[str, str]] = {}

    def __init__(self, name: str, train: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=train, args=(theirs, *arguments), daemon=True)
        with mock.patch.dict(os.environ, {**self.environment, **os.environ}):
            self._process.start()
        theirs.close()
        self.made_seconds: float = self._pipe.recv()

    def advance(self) -> float:
        return float(self.ask("advance"))

    def ask(self, order: str) -> Any:
        """What `Turn.answers` has there."""
        self._pipe.send(order)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send("close")
        self._process.join()


class SatuneApart(Apart):
    """One of Satune's, with the settings of the allocator that the worker gives a training."""

    environment = KEEP_FREED


def in_turn(arms: Sequence[Arm], steps: int, *, say: bool = True) -> dict[str, list[float]]:
    """Advance all arms `steps` times, alternately; seconds of each step by arm."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for step in range(steps):
        # Whoever goes first finds cold caches: each round begins with another arm.
        for arm in [*arms[step % len(arms) :], *arms[: step % len(arms)]]:
            seconds[arm.name].append(arm.advance())
        if say and sys.stderr.isatty():
            print(f"\r{step + 1}/{steps} ", end="", file=sys.stderr, flush=True)
    return seconds
