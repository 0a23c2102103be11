"""Reading an events.jsonl that somebody else is writing: whole lines only, from a byte position that SQL remembers.

The child is a program of its own, so a format that it names and this one does not know is refused, never guessed at.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20
EVENTS_FORMAT = "satune.events/1"


class EventsUnsupported(Exception):
    """The child's events have another format; `error` is what to tell of it."""

    def __init__(self, found: object) -> None:
        message = (
            f"The events have format {found!r}; this worker reads {EVENTS_FORMAT!r}. "
            "Restart the worker, so that it and its programs are of one release."
        )
        super().__init__(message)
        self.error = {"code": "events_unsupported", "message": message, "param": None}


@dataclass
class Tail:
    """A position in one file; `position` counts bytes of the lines taken so far."""

    path: Path
    position: int = 0

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """(events after the position, the position behind them); the position itself moves by `taken`.

        Raises EventsUnsupported.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return [], self.position
        whole = data[: data.rfind(b"\n") + 1]
        events = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                # A disk that was full cut it short, and the next one joined it.
                log.warning("%s: a line is no JSON: %.200r", self.path, line)
                continue
            if event["kind"] == "begun" and event["format"] != EVENTS_FORMAT:
                raise EventsUnsupported(event["format"])
            events.append(event)
        return events, self.position + len(whole)

    @property
    def size(self) -> int:
        """Bytes that the file has; 0 where it is not there yet."""
        return self.path.stat().st_size if self.path.exists() else 0

    def taken(self, position: int) -> None:
        """What lies before `position` was recorded."""
        self.position = position
