"""`python -P -m sat_io prepare|preview|validate|export|chat RUN_FOLDER`; `sat_core.program` says how it is given and ends."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sat_core import program

if TYPE_CHECKING:
    from pathlib import Path

    from sat_core.events import EventLog

# Each is loaded when it is asked for.
COMMANDS = {
    "prepare": "datasets",
    "preview": "datasets",
    "validate": "datasets",
    "export": "export",
    "chat": "chat",
}
WITH_TORCH = ("export", "chat")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return program.run("sat_io", {name: _lazily(COMMANDS[name], name) for name in COMMANDS}, argv)


def _lazily(module: str, name: str) -> program.Command:
    def command(folder: Path, config: dict[str, Any], events: EventLog) -> None:
        getattr(import_module(f"sat_io.{module}"), name)(folder, config, events)

    return command


def _without_torch() -> None:
    """Let transformers, which imports torch wherever it finds it, find none.

    Reading rows needs a tokenizer and no tensor: this saves three quarters of the seconds of a short command, and hundreds of
    megabytes.
    """
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # of its being missing
    sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's own word for "not here"
    from transformers.utils.import_utils import is_torch_available

    is_torch_available()  # asked once and remembered; others must not trip over the None
    del sys.modules["torch"]


if __name__ == "__main__":
    if not {*WITH_TORCH} & {*sys.argv}:
        _without_torch()
    sys.exit(main())
