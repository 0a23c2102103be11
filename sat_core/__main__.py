"""`python -P -m sat_core prepare|train RUN_FOLDER`: the core as a program.

It reads RUN_FOLDER/config.json and writes nothing outside that folder but the shared corpus. Exit codes: 0 done, 10 stopped
on SIGTERM with a checkpoint written, 20 failed for a reason that the last event tells; anything else is a crash.

With --lifeline the process belongs to whoever holds the other end of its standard input: it dies when that end closes, and
on Linux also when its parent dies, so that no orphan keeps a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_core.events import EventLog
from sat_core.plan.config import PREPARE_FORMAT, PREPARED_FORMAT, TrainConfig
from sat_core.plan.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

DONE, STOPPED, FAILED = 0, 10, 20
_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sat_core", description="Sparsity-Accelerated Training of one model."
    )
    parser.add_argument("command", choices=["prepare", "train"])
    parser.add_argument("folder", type=Path, help="run folder that holds config.json")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    args = parser.parse_args(argv)
    if args.lifeline:
        _hold_lifeline()
    asked = threading.Event()
    if args.command == "train":
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
    with EventLog(args.folder) as events:
        try:
            return _run(args.command, args.folder, events, asked.is_set)
        except PlanError as error:
            events.emit("failed", code=error.code, message=error.message, param=error.param)
        except (MemoryError, OSError) as error:
            code = "out_of_memory" if isinstance(error, MemoryError) else "internal_error"
            events.emit("failed", code=code, message=f"{type(error).__name__}: {error}", param=None)
        return FAILED


def _run(command: str, folder: Path, events: EventLog, stopping: Callable[[], bool]) -> int:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}", "config") from error
    if command == "prepare":
        _prepare(folder, config, events)
        return DONE
    return _train(folder, TrainConfig.from_dict(config), events, stopping)


def _train(
    folder: Path, config: TrainConfig, events: EventLog, stopping: Callable[[], bool]
) -> int:
    import torch

    from sat_core.trainer import Stopped, train

    try:
        train(folder, config, events, stopping)
    except Stopped:
        step = max((int(p.name[5:]) for p in folder.glob("checkpoints/step-*")), default=0)
        events.emit("stopped", step=step)
        return STOPPED
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"The GPU's memory does not hold a micro-batch of {config.micro_batch_size} sequences: {error}. "
            "Lower sat.train.micro_batch_size or sat.train.max_seq_len.",
            "sat.train.micro_batch_size",
            "out_of_memory",
        ) from error
    return DONE


def _prepare(folder: Path, config: dict[str, Any], events: EventLog) -> None:
    from sat_core.data.preparing import Preparation, Source
    from sat_core.data.tokenizer import hub_revision, load_tokenizer, model_config
    from sat_core.plan.families import shape_of
    from sat_core.plan.request import RunRequest
    from sat_core.plan.resolve import check_mode, max_seq_len, resolve

    if config.get("format") != PREPARE_FORMAT:
        raise ConfigError(
            f"config.json has format {config.get('format')!r}; this program reads {PREPARE_FORMAT!r}."
        )
    request = RunRequest.from_dict(config["request"])
    check_mode(request)
    model = config["model"]
    source = model["path"] or model["name"]
    revision = model["revision"] or (None if model["path"] else hub_revision(model["name"]))
    events.state("checking_dataset", f"Reading {config['training_file']['filename']}")
    shape = shape_of(model_config(source, revision=revision))
    tokenizer = load_tokenizer(source, revision=revision)
    held = config["validation_file"]
    events.state("tokenizing", "Rendering, masking and tokenising")
    corpus, figures = Preparation(
        tokenizer=tokenizer,
        training=_source(Source, config["training_file"]),
        validation=_source(Source, held) if held else None,
        declared_format=request.sat.data.format,
        train_on=request.sat.train.train_on,
        validation_split=request.sat.data.validation_split,
        seq_len_for=lambda packed: max_seq_len(request, shape, packed=packed),
        progress=lambda rows: events.emit("progress", done=rows, total=None, unit="rows"),
    ).run(Path(config["corpora_dir"]))
    resolved = resolve(
        request,
        shape,
        figures,
        model_path=model["path"],
        revision=revision,
        corpus=str(corpus),
    )
    prepared = {
        "format": PREPARED_FORMAT,
        "config": resolved.config.to_dict(),
        "hyperparameters": resolved.hyperparameters,
        "total_steps": resolved.config.total_steps,
        "figures": figures,
        "warnings": list(resolved.warnings),
    }
    scratch = folder / ".train.json"
    scratch.write_text(json.dumps(prepared, indent=1), "utf-8")
    scratch.rename(folder / "train.json")


def _source(kind: Any, file: dict[str, str]) -> Any:
    return kind(path=Path(file["path"]), filename=file["filename"])


def _hold_lifeline() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
