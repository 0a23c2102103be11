"""From rendered rows to sequences: alone, joined, or side by side with attention kept apart.

    none      one row is one sequence
    joined    rows follow each other and are cut into full sequences; attention crosses from one to the next
    separate  as many whole rows as fit share a sequence, first-fit in order, and none sees another

"auto" is joined for text and none for the rest: what continual pre-training and fine-tuning do by custom. A text longer
than a sequence goes on in the next one; a supervised row is cut off, because the rest of an answer without its question
teaches nothing. The road not taken is sorting rows by length: it would fill a few more tokens and tie the content of
a sequence to rows that come much later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from sat_core.plan.layout import FIRST, TRAINED
from sat_io.rendering import Rendered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Sequences that wait for a row that fits; more fill them better, and hold rows back longer.
OPEN_SEQUENCES = 32


class Sequence(NamedTuple):
    """Token ids, and for each its bits of the mask (`plan.layout`)."""

    ids: list[int]
    mask: list[int]


class Packer(Protocol):
    """Rows in, sequences out."""

    def add(self, row: Rendered) -> Iterator[Sequence]:
        """Sequences that this row completes."""

    def finish(self) -> Iterator[Sequence]:
        """What is left."""


def packing_for(asked: str, format: str) -> str:
    """The packing of a file of this format."""
    return asked if asked != "auto" else "joined" if format == "text" else "none"


def packer_for(packing: str, seq_len: int) -> Packer:
    """A packer of sequences of at most `seq_len` tokens."""
    packers: dict[str, Callable[[int], Packer]] = {
        "none": Alone,
        "joined": Joined,
        "separate": Separate,
    }
    return packers[packing](seq_len)


def pieces(row: Rendered, seq_len: int) -> Iterator[Rendered]:
    """A text in parts that fit into a sequence; no token is lost but a last one by itself, which nothing can predict."""
    for start in range(0, len(row.ids), seq_len):
        part = slice(start, start + seq_len)
        if len(row.ids[part]) > 1:
            yield Rendered(row.ids[part], row.trained[part])


class Alone:
    """One row, one sequence."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def add(self, row: Rendered) -> Iterator[Sequence]:
        """The row."""
        yield Sequence(row.ids, [TRAINED * flag for flag in row.trained])

    def finish(self) -> Iterator[Sequence]:
        """Nothing."""
        yield from ()


class Joined:
    """Rows end to end, cut into full sequences."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._ids: list[int] = []
        self._mask: list[int] = []

    def add(self, row: Rendered) -> Iterator[Sequence]:
        """Full sequences."""
        self._ids += row.ids
        self._mask += [TRAINED * flag for flag in row.trained]
        start = 0
        while len(self._ids) - start >= self.seq_len:
            end = start + self.seq_len
            yield Sequence(self._ids[start:end], self._mask[start:end])
            start = end
        del self._ids[:start], self._mask[:start]

    def finish(self) -> Iterator[Sequence]:
        """The last, shorter sequence."""
        if len(self._ids) > 1:
            yield Sequence(self._ids, self._mask)


class Separate:
    """Whole rows side by side, each in the first open sequence with room for it."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self._open: list[Sequence] = []

    def add(self, row: Rendered) -> Iterator[Sequence]:
        """The sequence that had to close, if any."""
        # Nothing before a document's first token is seen from it, so it can be no label.
        mask = [FIRST, *(TRAINED * flag for flag in row.trained[1:])]
        at = next(
            (
                i
                for i, other in enumerate(self._open)
                if len(other.ids) + len(row.ids) <= self.seq_len
            ),
            len(self._open),
        )
        if at == len(self._open):
            self._open.append(Sequence([], []))
        self._open[at].ids.extend(row.ids)
        self._open[at].mask.extend(mask)
        if len(self._open[at].ids) == self.seq_len:
            yield self._open.pop(at)
        elif len(self._open) > OPEN_SEQUENCES:
            yield self._open.pop(0)

    def finish(self) -> Iterator[Sequence]:
        """The open sequences."""
        yield from self._open
        self._open = []
