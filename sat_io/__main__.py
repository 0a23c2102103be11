"""`python -P -m sat_io prepare|preview|validate|export|chat RUN_FOLDER`; `sat_core.program` says how it is given and ends."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sat_core import program

if TYPE_CHECKING:
    from pathlib import Path

    from sat_core.events import EventLog

# Each is loaded when it is asked for: torch takes a second and hundreds of megabytes, which looking at rows does not need.
COMMANDS = {
    "prepare": "datasets",
    "preview": "datasets",
    "validate": "datasets",
    "export": "export",
    "chat": "chat",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return program.run("sat_io", {name: _lazily(COMMANDS[name], name) for name in COMMANDS}, argv)


def _lazily(module: str, name: str) -> program.Command:
    def command(folder: Path, config: dict[str, Any], events: EventLog) -> None:
        getattr(import_module(f"sat_io.{module}"), name)(folder, config, events)

    return command


if __name__ == "__main__":
    sys.exit(main())
