"""`python -P -m sat_core train RUN_FOLDER`: the core as a program (`program.py` says what it is given and how it ends).

Under `torchrun` every rank runs this; the first one tells.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from sat_core import program
from sat_core.plan.config import TrainConfig
from sat_core.plan.errors import PlanError, is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

    from sat_core.events import EventLog


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return program.run("sat_core", {"train": train}, argv)
    finally:
        # torchrun ends the other ranks as soon as one has left; none may die of that with its own code unsaid.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "RANK" in os.environ else before)


def train(folder: Path, config: dict[str, Any], events: EventLog) -> int:
    """Train to the end, or until SIGTERM, after which a checkpoint is written."""
    from sat_core import checkpoint
    from sat_core.parallel import Parallel
    from sat_core.trainer import Run, Stopped

    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    parallel = Parallel()
    try:
        Run(folder, TrainConfig.from_dict(config), events, asked.is_set, parallel).train()
    except Stopped:
        parallel.leave()
        saved = checkpoint.in_order(folder / "checkpoints")
        step = checkpoint.step_of(saved[-1]) if saved else 0
        events.emit("stopped", step=step)
        return program.STOPPED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(f"Memory ran out: {error}.", code="out_of_memory") from error
    parallel.leave()
    return program.DONE


if __name__ == "__main__":
    exit_code = main()
    if "RANK" in os.environ:
        # All is written by now. Gloo's threads may still hold tensors while the interpreter is taken down, which aborts a
        # rank now and then (pytorch/pytorch#179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
