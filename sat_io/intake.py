"""One file on its way into a corpus: opened, rendered, cut to the length of a sequence, packed, and counted.

The format is that of the first row, and decides how the rest is packed and cut. Rows are told apart by a 64-bit hash of
their tokens, kept for all rows at eight bytes each, so that copies and rows on both sides of the held-out split
are counted over the whole file. The road not taken is comparing texts: two texts that give the same tokens are the
same row to the model.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sat_core.plan.errors import DataError
from sat_io.packing import Packer, Sequence, packer_for, packing_for, pieces
from sat_io.rendering import Rendered, Renderer
from sat_io.rows import Conversation
from sat_io.sources import Source, shuffled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sat_io.reading import Row

PROGRESS_ROWS = 200


@dataclass(frozen=True)
class Tokens:
    """How rows become tokens, in a corpus, a preview or a report on a file.

    Attributes:
        renderer: of the model's tokenizer.
        seq_len_for: tokens in a sequence, given whether the file is packed.
        packing: "auto", "none", "joined" or "separate".
    """

    renderer: Renderer
    seq_len_for: Callable[[bool], int]
    packing: str = "auto"


@dataclass
class Tally:
    """What was counted of one file; lengths are those before cutting. `progress` is told the rows now and then.

    `conversations` are the rows that a chat template renders, whatever the format of the file.
    """

    progress: Callable[[int], None]
    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    untrained_rows: int = 0
    conversations: int = 0
    lengths: array[int] = field(default_factory=lambda: array("q"))

    def begin_row(self) -> None:
        """One more row."""
        self.rows += 1
        if self.rows % PROGRESS_ROWS == 0:
            self.progress(self.rows)

    def end_row(self, length: int, lost: int, trained: int) -> None:
        """How many tokens it has, and how many of them are cut off and trained on."""
        self.lengths.append(length)
        self.truncated_rows += lost > 0
        self.truncated_tokens += lost
        self.untrained_rows += trained == 0

    def row_tokens(self, percentiles: tuple[int, ...], longest: str) -> dict[str, int]:
        """Percentiles of tokens in a row, and the most, under the name `longest`."""
        lengths = np.asarray(self.lengths or [0], dtype=np.int64)
        values = np.percentile(lengths, percentiles, method="lower").tolist()
        names = (f"p{p}" for p in percentiles)
        return {**dict(zip(names, values, strict=True)), longest: int(lengths.max())}

    def figures(self) -> dict[str, Any]:
        """The counts, and percentiles of tokens in a row."""
        return {
            "rows": self.rows,
            "truncated_rows": self.truncated_rows,
            "truncated_tokens": self.truncated_tokens,
            "untrained_rows": self.untrained_rows,
            "conversations": self.conversations,
            "row_tokens": self.row_tokens((50, 90, 99), "longest"),
        }


class Intake:
    """One file, read once."""

    def __init__(
        self,
        source: Source,
        tokens: Tokens,
        progress: Callable[[int], None],
        *,
        declared: str = "auto",
        order: tuple[int, ...] | None = None,
    ) -> None:
        """Read the first row.

        Args:
            source: the file.
            tokens: how its rows become some.
            progress: told the rows done so far.
            declared: format of the file, or "auto".
            order: seed of the order of rows; None is the file's own.

        Raises:
            DataError: where the first row is unusable.
        """
        self.source, self.tally, self._renderer = source, Tally(progress), tokens.renderer
        rows = source.rows(declared)
        rows = rows if order is None else shuffled(rows, order)
        first = next(rows, None)
        self.format = first.format if first else "messages" if declared == "auto" else declared
        self.packing = packing_for(tokens.packing, self.format)
        self.seq_len = tokens.seq_len_for(self.packing != "none")
        self._rows = itertools.chain([first] if first else [], rows)

    def packer(self) -> Packer:
        """A packer for this file's sequences."""
        return packer_for(self.packing, self.seq_len)

    def rows(self) -> Iterator[tuple[int, list[Rendered]]]:
        """The mark of each row, and the row in parts that fit a sequence; rows without a trained token are left out.

        Raises:
            DataError: naming a row that is unusable.
        """
        for row in self._rows:
            self.tally.begin_row()
            self.tally.conversations += isinstance(row.content, Conversation)
            whole = rendered(self._renderer, row, self.source.filename)
            parts, lost = fit(whole, row.format, self.packing, self.seq_len)
            trained = sum(sum(part.trained[1:]) for part in parts)
            self.tally.end_row(len(whole.ids), lost, trained)
            if trained:
                yield mark_of(whole), parts

    def sequences(self, marks: array[int]) -> Iterator[Sequence]:
        """All rows packed; their marks are added to `marks`.

        Raises:
            DataError: naming a row that is unusable.
        """
        packer = self.packer()
        for mark, parts in self.rows():
            marks.append(mark)
            for part in parts:
                yield from packer.add(part)
        yield from packer.finish()

    def figures(self, role: str, written: dict[str, int]) -> dict[str, Any]:
        """What the corpus says of this file, given what was written of it."""
        kind = "revision" if self.source.path is None else "sha256"
        return {
            "filename": self.source.filename,
            kind: self.source.fingerprint,
            "role": role,
            "weight": self.source.weight,
            "format": self.format,
            "packing": self.packing,
            "seq_len": self.seq_len,
            **self.tally.figures(),
            **written,
        }


def rendered(renderer: Renderer, row: Row, filename: str) -> Rendered:
    """A row as tokens. Raises DataError: naming the row where it cannot be rendered."""
    try:
        return renderer.render(row.content)
    except DataError as error:
        raise DataError(f"{filename}, line {row.line}: {error.message}") from error


def fit(row: Rendered, format: str, packing: str, seq_len: int) -> tuple[list[Rendered], int]:
    """A row in parts for a packer, and the tokens lost at its end."""
    if packing == "joined":
        return [row], 0
    if format == "text":
        return list(pieces(row, seq_len)), 0
    return [Rendered(row.ids[:seq_len], row.trained[:seq_len])], max(0, len(row.ids) - seq_len)


def mark_of(row: Rendered) -> int:
    """A 64-bit hash of a row's tokens."""
    return hash_of(np.asarray(row.ids, dtype=np.uint32).tobytes())


def hash_of(content: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def new_marks() -> array[int]:
    """An empty array of marks."""
    return array("Q")


def copies(*marks: array[int]) -> int:
    """Rows that repeat an earlier one."""
    every = np.concatenate([np.asarray(m, dtype=np.uint64) for m in marks])
    return int(len(every) - len(np.unique(every)))


def overlap(trained: array[int], held: array[int]) -> int:
    """Held-out rows that are trained on too."""
    return int(
        np.isin(np.asarray(held, dtype=np.uint64), np.asarray(trained, dtype=np.uint64)).sum()
    )
