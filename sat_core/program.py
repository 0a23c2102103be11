"""What `python -m sat_core` and `python -m sat_io` are alike in: one command, on one run folder.

It reads RUN_FOLDER/config.json and writes nothing outside that folder but the shared corpus. Exit codes: 0 done, 10 stopped
on SIGTERM with a checkpoint written, 20 failed for a reason that the last event tells, 143 ended on SIGTERM with nothing half
made left; anything else is a crash.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sat_core.events import EventLog
from sat_core.plan.errors import ConfigError, PlanError

DONE, STOPPED, FAILED = 0, 10, 20
_PR_SET_PDEATHSIG = 1
# From the run folder, its configuration and its events to an exit code.
Command = Callable[[Path, dict[str, Any], EventLog], int | None]


def run(prog: str, commands: dict[str, Command], argv: list[str] | None = None) -> int:
    """Run the command that `argv` names; returns the exit code. None of a command is DONE."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("folder", type=Path, help="run folder that holds config.json")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    args = parser.parse_args(argv)
    if args.lifeline:
        _hold_lifeline()
    with EventLog(args.folder, silent=os.environ.get("RANK", "0") != "0") as events:
        try:
            return commands[args.command](args.folder, _config(args.folder), events) or DONE
        except PlanError as error:
            events.emit("failed", code=error.code, message=error.message, param=error.param)
        except (MemoryError, OSError) as error:
            code = "out_of_memory" if isinstance(error, MemoryError) else "internal_error"
            events.emit("failed", code=code, message=f"{type(error).__name__}: {error}", param=None)
        return FAILED


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}", "config") from error


def _hold_lifeline() -> None:
    # Whoever is asked to end removes what is half made; training does more.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
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
