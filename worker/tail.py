"""Reading an events.jsonl that somebody else is writing: whole lines only, from a byte position that SQL remembers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 4 * 2**20


@dataclass
class Tail:
    """A position in one file; `position` counts bytes of the lines taken so far."""

    path: Path
    position: int = 0

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """(events after the position, the position behind them); the position itself moves by `taken`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return [], self.position
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], self.position + len(whole)

    def taken(self, position: int) -> None:
        """What lies before `position` was recorded."""
        self.position = position
