"""A corpus on disk, as `sat_io` left it (`plan.layout`): token ids and loss mask memory-mapped.

Shared by attempts and ranks, larger than memory if need be, written whole or not at all. The order of training is a
pure function of seed and position, so a resumed run needs a step number and nothing else.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sat_core.plan.accounting import padded
from sat_core.plan.errors import DataError
from sat_core.plan.layout import CORPUS_FORMAT, FIRST, TRAINED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

IGNORED_LABEL = -100


class Batch(NamedTuple):
    """Sequences, right-padded. Under a causal mask no real token sees the padding, so no mask is needed.

    Attributes:
        input_ids_BT: int64 [B, T].
        labels_BT: int64 [B, T], each position's own token, or -100 where it carries no loss.
        lengths_B: int64 [B], tokens before the padding.
        positions_BT: int64 [B, T], restarting at each document and at the padding, so that attention can be kept inside
            a document; None where every sequence is one document or documents may see each other.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    lengths_B: Tensor
    positions_BT: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss; the first of a sequence is predicted by nothing."""
        return int((self.labels_BT[:, 1:] != IGNORED_LABEL).sum())

    def rows(self, first: int, end: int) -> Batch:
        """Sequences [first, end) as a batch."""
        return self.map(lambda tensor: tensor[first:end])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of changed tensors."""
        positions = None if self.positions_BT is None else change(self.positions_BT)
        return Batch(
            change(self.input_ids_BT), change(self.labels_BT), change(self.lengths_B), positions
        )


class Corpus:
    """One split of a prepared corpus."""

    def __init__(self, folder: Path, split: str, *, even: bool = False) -> None:
        """Open `split` ("train" or "validation") of a corpus folder; `even` batches are all as wide as the longest needs.

        Raises:
            DataError: for another format version.
        """
        meta = json.loads((folder / "corpus.json").read_text("utf-8"))
        if meta.get("format") != CORPUS_FORMAT:
            raise DataError(
                f"The corpus has format {meta.get('format')!r}; this program reads {CORPUS_FORMAT!r}."
            )
        self.meta: dict[str, Any] = meta
        self._separate = meta["figures"]["packing"] == "separate"
        self.offsets = np.load(folder / f"{split}.offsets.npy")
        self._fewest = int(np.diff(self.offsets).max(initial=0)) if even else 0
        self._ids = self._open(folder / f"{split}.tokens.bin", np.uint32)
        self._mask = self._open(folder / f"{split}.mask.bin", np.uint8)

    @staticmethod
    def _open(path: Path, dtype: Any) -> np.ndarray[Any, Any]:
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, indices: list[int], device: str = "cpu") -> Batch:
        """Sequences `indices`, right-padded to the longest's length, as a multiple of 8."""
        import torch  # here alone: a quote counts sequences without it

        lengths = [int(self.offsets[i + 1] - self.offsets[i]) for i in indices]
        width = padded(max(self._fewest, *lengths))
        ids = np.zeros((len(indices), width), dtype=np.int64)
        labels = np.full((len(indices), width), IGNORED_LABEL, dtype=np.int64)
        starts = np.zeros((len(indices), width), dtype=bool)
        for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
            span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
            tokens, mask = self._ids[span].astype(np.int64), self._mask[span]
            ids[row, :length] = tokens
            labels[row, :length] = np.where(mask == TRAINED, tokens, IGNORED_LABEL)
            starts[row, :length] = mask & FIRST
            starts[row, length:][:1] = True
        positions = torch.from_numpy(_positions(starts)) if self._separate else None
        batch = Batch(
            torch.from_numpy(ids), torch.from_numpy(labels), torch.tensor(lengths), positions
        )
        return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def indices_at(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Sequences of 0-based `step`: an endless stream of seeded permutations, cut into batches."""
        first = step * batch_size
        return [
            self.order(seed, p // len(self))[p % len(self)]
            for p in range(first, first + batch_size)
        ]

    def in_order(self, batch_size: int) -> Iterator[list[int]]:
        """All sequences once, in order, for evaluation."""
        for first in range(0, len(self), batch_size):
            yield list(range(first, min(first + batch_size, len(self))))

    @lru_cache(maxsize=2)  # noqa: B019 - two epochs of one corpus, which lives as long as the run
    def order(self, seed: int, epoch: int) -> list[int]:
        """All sequences once, in the order of an epoch."""
        return list(map(int, np.random.default_rng([seed, epoch]).permutation(len(self))))


def _positions(starts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Distance of each token from the last start at or before it; int64 [B, T] from bool [B, T]."""
    here = np.arange(starts.shape[1], dtype=np.int64)
    return here - np.maximum.accumulate(np.where(starts, here, 0), axis=1)
