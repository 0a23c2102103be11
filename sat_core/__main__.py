"""`python -P -m sat_core prepare|preview|validate|train|export|chat RUN_FOLDER`: the core as a program.

It reads RUN_FOLDER/config.json and writes nothing outside that folder but the shared corpus. Exit codes: 0 done, 10 stopped
on SIGTERM with a checkpoint written, 20 failed for a reason that the last event tells; anything else is a crash. Under `torchrun` every rank runs this; the first one tells.

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
from sat_core.plan.config import TrainConfig
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
    commands = ["prepare", "preview", "validate", "train", "export", "chat"]
    parser.add_argument("command", choices=commands)
    parser.add_argument("folder", type=Path, help="run folder that holds config.json")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    args = parser.parse_args(argv)
    if args.lifeline:
        _hold_lifeline()
    asked = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    if args.command == "train":
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
    with EventLog(args.folder, silent=os.environ.get("RANK", "0") != "0") as events:
        try:
            return _run(args.command, args.folder, events, asked.is_set)
        except PlanError as error:
            events.emit("failed", code=error.code, message=error.message, param=error.param)
        except (MemoryError, OSError) as error:
            code = "out_of_memory" if isinstance(error, MemoryError) else "internal_error"
            events.emit("failed", code=code, message=f"{type(error).__name__}: {error}", param=None)
        finally:
            # torchrun ends the other ranks as soon as one has left; none may die of that with its own code unsaid.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if "RANK" in os.environ else before)
        return FAILED


def _run(command: str, folder: Path, events: EventLog, stopping: Callable[[], bool]) -> int:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}", "config") from error
    if command == "export":
        from sat_core.export import export

        export(folder, config, events)
        return DONE
    if command == "chat":
        from sat_core.chat import chat

        chat(config, events)
        return DONE
    if command != "train":
        from sat_core.data import program

        commands = {
            "prepare": program.prepare,
            "preview": program.show,
            "validate": program.validate,
        }
        commands[command](folder, config, events)
        return DONE
    return _train(folder, TrainConfig.from_dict(config), events, stopping)


def _train(
    folder: Path, config: TrainConfig, events: EventLog, stopping: Callable[[], bool]
) -> int:
    from sat_core import checkpoint
    from sat_core.parallel import Parallel
    from sat_core.step import is_out_of_memory
    from sat_core.trainer import Run, Stopped

    parallel = Parallel()
    try:
        Run(folder, config, events, stopping, parallel).train()
    except Stopped:
        parallel.leave()
        saved = checkpoint.in_order(folder / "checkpoints")
        step = checkpoint.step_of(saved[-1]) if saved else 0
        events.emit("stopped", step=step)
        return STOPPED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(f"Memory ran out: {error}.", code="out_of_memory") from error
    parallel.leave()
    return DONE


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
    exit_code = main()
    if "RANK" in os.environ:
        # All is written by now. Gloo's threads may still hold tensors while the interpreter is taken down, which aborts a
        # rank now and then (pytorch/pytorch#179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
