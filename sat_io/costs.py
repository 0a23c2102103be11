"""What the steps of a run will see of its corpus: tokens with their padding, query-key pairs and labels, by ladder phase.

The order of training is a pure function of seed and position, so nothing is sampled: the widths of all micro-batches are
computed, from lengths and labels alone, some thousand steps at a time.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sat_core.corpus import Corpus
from sat_core.plan.accounting import PAD_MULTIPLE, Cost
from sat_core.plan.layout import TRAINED
from sat_core.plan.quote import PhaseCost, probe_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sat_core.plan.config import TrainConfig

    Ints = NDArray[np.int64]

SEQUENCES_AT_ONCE = 1 << 20


class Costs:
    """Costs of the steps of one run, in one process."""

    def __init__(self, config: TrainConfig) -> None:
        """Read lengths and label counts of the training split of `config.corpus`."""
        self._config = config
        self._corpus = Corpus(Path(config.corpus), "train")
        offsets = self._corpus.offsets
        self._lengths = np.diff(offsets)
        if config.compile:
            self._lengths = np.full_like(self._lengths, self._lengths.max(initial=0))
        mask = np.memmap(Path(config.corpus) / "train.mask.bin", dtype=np.uint8, mode="r")
        # A sequence's first token is predicted by nothing.
        trained = np.array(
            [
                np.count_nonzero(mask[a + 1 : b] == TRAINED)
                for a, b in itertools.pairwise(offsets.tolist())
            ]
        )
        self._labels = trained.astype(np.int64)

    def by_phase(self) -> list[PhaseCost]:
        """One entry a phase of the ladder, in order."""
        found = []
        for phase in self._config.sat.ladder.phases():
            inside = phase.refreshes(self._config.sat.refresh_every)
            # Beyond this many their mean says as much.
            seen = inside[:: max(1, len(inside) // 1000)]
            refreshes = Cost.sum(map(self._probe, seen))
            times = len(inside) / max(1, len(seen))
            found.append(
                PhaseCost(
                    phase=phase,
                    steps=self._steps(phase.first_step, phase.last_step + 1),
                    begin=self._probe(phase.first_step),
                    refreshes=Cost(*(round(n * times) for n in refreshes)),
                )
            )
        return found

    def _steps(self, first: int, end: int) -> Cost:
        batch = self._config.batch_size
        at_once = max(1, SEQUENCES_AT_ONCE // batch)
        starts = range(first, end, at_once)
        return Cost.sum(self._block(start, min(end, start + at_once)) for start in starts)

    def _block(self, first: int, end: int) -> Cost:
        """Steps [first, end): S steps of M micro-batches of B sequences, the last micro-batch perhaps short."""
        config = self._config
        batch, size = config.batch_size, config.micro_batch_size
        number = -(-batch // size)
        indices = self._indices(first * batch, end * batch).reshape(-1, batch)
        lengths = np.zeros((len(indices), number * size), dtype=np.int64)
        lengths[:, :batch] = self._lengths[indices]
        rows_M = np.full(number, size)
        rows_M[-1] = batch - (number - 1) * size
        widths_SM = _padded(lengths.reshape(len(indices), number, size).max(axis=2))
        tokens_SM = widths_SM * rows_M
        return Cost(
            tokens=int(tokens_SM.sum()),
            attended_pairs=int((tokens_SM * (widths_SM + 1) // 2).sum()),
            labels=int(self._labels[indices].sum()),
        )

    def _probe(self, step: int) -> Cost:
        """What a probe at `step` would see: sequences of the first micro-batch, padded with it."""
        config = self._config
        begin = step * config.batch_size
        indices = self._indices(begin, begin + min(config.batch_size, config.micro_batch_size))
        width = int(_padded(self._lengths[indices].max()))
        seen = indices[: probe_rows(config.sat, config.batch_size, width)]
        tokens = width * len(seen)
        return Cost(
            tokens=tokens,
            attended_pairs=tokens * (width + 1) // 2,
            labels=int(self._labels[seen].sum()),
        )

    def _indices(self, first: int, end: int) -> Ints:
        """Sequences at positions [first, end) of the endless stream."""
        size = len(self._corpus)
        pieces = []
        for epoch in range(first // size, (end - 1) // size + 1):
            order = np.asarray(self._corpus.order(self._config.seed, epoch))
            pieces.append(order[max(0, first - epoch * size) : min(size, end - epoch * size)])
        return np.concatenate(pieces)


def _padded(lengths: Ints) -> Ints:
    return np.asarray(-(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE)
