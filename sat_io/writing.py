"""Append sequences to a corpus on disk: ids as uint32, mask as uint8, offsets as int64; nothing but the offsets is held."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from sat_core.plan.layout import TRAINED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sat_io.packing import Sequence


@dataclass
class SplitWriter:
    """Append sequences of one split (train or validation) to disk."""

    folder: Path
    name: str
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    _offsets: array[int] = field(default_factory=lambda: array("q", [0]))

    def __post_init__(self) -> None:
        self._ids = (self.folder / f"{self.name}.tokens.bin").open("wb")
        self._mask = (self.folder / f"{self.name}.mask.bin").open("wb")

    @property
    def sequences(self) -> int:
        """Sequences written so far."""
        return len(self._offsets) - 1

    def totals(self) -> dict[str, int]:
        """Sequences, tokens and trained tokens written so far."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }

    def add(self, sequence: Sequence) -> None:
        """Append one sequence."""
        np.asarray(sequence.ids, dtype=np.uint32).tofile(self._ids)
        np.asarray(sequence.mask, dtype=np.uint8).tofile(self._mask)
        self.tokens += len(sequence.ids)
        self.trained_tokens += sequence.mask[1:].count(TRAINED)
        self.longest = max(self.longest, len(sequence.ids))
        self._offsets.append(self.tokens)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Append them all."""
        for sequence in sequences:
            self.add(sequence)

    def finish(self) -> dict[str, int]:
        """Write the offsets; the figures of the split."""
        np.save(self.folder / f"{self.name}.offsets.npy", np.asarray(self._offsets, dtype=np.int64))
        return {**self.totals(), "longest": self.longest}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        self._mask.close()
