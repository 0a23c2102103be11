"""events.jsonl: all that a run tells the world, numbered, append-only, one JSON object a line.

Each process begins by naming the format. A line exists once its newline does; a reader ignores an unfinished tail. The
file, not a socket, because it survives either side and keeps what was said while nobody listened.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path

EVENTS_FORMAT = "satune.events/1"


class EventLog:
    """Writer of one run folder's events; a `silent` one (a rank that is not the first) writes none."""

    def __init__(self, folder: Path, *, silent: bool = False) -> None:
        path = os.devnull if silent else folder / "events.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._silent, self._seq = silent, 0
        self.emit("begun", format=EVENTS_FORMAT)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event; numbers that JSON cannot hold (NaN, infinity) become null."""
        self._seq += 1
        row = {"seq": self._seq, "time": time.time(), "kind": kind, **fields}
        os.write(self._file, (json.dumps(_finite(row), allow_nan=False) + "\n").encode())

    def state(self, state: str, message: str, *, again: bool = False) -> None:
        """What the run is doing now; `again` where it goes on with what it did before, which is no news."""
        self.emit("state", state=state, message=message, again=again)

    def message(self, level: str, message: str, **data: Any) -> None:
        """Something a person should read; `level` is info, warn or error."""
        self.emit("message", level=level, message=message, data=data)

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if not self._silent:
            os.fsync(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
