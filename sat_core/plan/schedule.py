"""LORS, the ladder omission-rate scheduler, and how a mean rate is spread over layers. Pure data, no torch.

Rate 0 on the dense start [0, dense_start T), the full rate on [dense_start T, sparse_share T), then down to dense: by
`rungs` equal stages whose rate falls by 1/rungs each (`ladder`; Ma et al. 2024, section on LORS, whose fractions are not
public), or along a line or a cosine rounded to the same rungs. The road not taken is a rate that falls every step: each
width costs a compiled graph and a refresh, a ladder needs a handful.

Steps are 0-based here: step t is the update that takes the model from t to t + 1 finished steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from sat_core.plan.errors import ConfigError

# Awake MLP channels are rounded to what the hardware multiplies in one piece.
GPU_WIDTH_MULTIPLE, CPU_WIDTH_MULTIPLE = 128, 8
MAX_LAYER_RATE = 0.9375
WSD_DECAY_SHARE = 0.2
_STATES = {0.0: "training_dense_finish", 1.0: "training_sparse"}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps [first_step, last_step] with one share of the full omission rate; `share` is in [0, 1]."""

    first_step: int
    last_step: int
    share: float
    state: str

    def refreshes(self, every: int) -> range:
        """Steps inside the phase at which units are chosen anew, its first one left out; none where `every` is 0."""
        return range(self.first_step + every, self.last_step + 1, every) if every else range(0)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The schedule of one run; `share_at(t)` times a layer's rate is its omission rate at step t."""

    total_steps: int
    dense_start: float
    sparse_share: float
    rungs: int
    type: str = "ladder"

    def share_at(self, step: int) -> float:
        """Share of the full omission rate at 0-based `step`."""
        start, constant = self._dense_end(), self._constant_end()
        if step < start:
            return 0.0
        if step < constant:
            return 1.0
        rungs, left = self._rungs, self.total_steps - constant
        if self.type == "ladder":
            return 1.0 - ((step - constant) * rungs // left + 1) / rungs
        if step == self.total_steps - 1:
            return 0.0
        done = (step - constant + 1) / left
        wanted = 1.0 - done if self.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return round(wanted * rungs) / rungs

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a ladder is a few numbers
    def phases(self) -> tuple[Phase, ...]:
        """The run as maximal stretches of equal share, in order; their steps sum to `total_steps`."""
        edges = [0, self._dense_end(), self._constant_end()]
        left = self.total_steps - self._constant_end()
        if self.type == "ladder":
            edges += [edges[-1] + math.ceil(left * k / self._rungs) for k in range(1, self._rungs)]
        else:
            falling = range(edges[-1] + 1, self.total_steps)
            edges += [t for t in falling if self.share_at(t) != self.share_at(t - 1)]
        edges.append(self.total_steps)
        phases: list[Phase] = []
        for first, end in itertools.pairwise(edges):
            if end <= first:
                continue
            share = self.share_at(first)
            if phases and phases[-1].share == share:
                first = phases.pop().first_step
            state = _STATES.get(share, "training_ladder")
            if first == 0 and share == 0:
                state = "training_dense_start"
            phases.append(Phase(first_step=first, last_step=end - 1, share=share, state=state))
        return tuple(phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that holds 0-based `step`.

        Raises:
            ConfigError: for a step outside the run.
        """
        if not 0 <= step < self.total_steps:
            raise ConfigError(f"step is {step}; allowed is 0 to {self.total_steps - 1}.", "step")
        return next(p for p in self.phases() if p.first_step <= step <= p.last_step)

    @property
    def _rungs(self) -> int:
        """A run too short for all rungs has as many as it has steps left, so that its last step is dense."""
        return max(1, min(self.rungs, self.total_steps - self._constant_end()))

    def _dense_end(self) -> int:
        return math.ceil(self.dense_start * self.total_steps)

    def _constant_end(self) -> int:
        constant = math.floor(self.sparse_share * self.total_steps)
        return min(self.total_steps, max(self._dense_end(), constant))


def exempt_layers(allotment: str, asked: int | None, num_layers: int) -> int:
    """How many layers stay dense at each end: as asked, else with the allotment `exempt` a sixteenth, at least one."""
    if asked is not None:
        return asked
    return max(1, num_layers // 16) if allotment == "exempt" else 0


def layer_rates(mean_rate: float, num_layers: int, exempt: int) -> tuple[float, ...]:
    """Omission rate of each layer, their mean being `mean_rate`.

    The first and the last `exempt` layers stay dense and the others give more, up to 15/16; what they cannot give falls
    back on the exempt ones. By sensitivity it is planned so too: that allotment is measured when a stage of the ladder
    begins (`sat_core.allotment`) and keeps the mean.
    """
    inner = num_layers - 2 * exempt
    if not exempt or inner < 1 or mean_rate == 0:
        return (mean_rate,) * num_layers
    inner_rate = min(mean_rate * num_layers / inner, max(MAX_LAYER_RATE, mean_rate))
    outer_rate = max(0.0, (mean_rate * num_layers - inner_rate * inner) / (2 * exempt))
    return (outer_rate,) * exempt + (inner_rate,) * inner + (outer_rate,) * exempt


def awake_units(num_units: int, rate: float, multiple: int) -> int:
    """Units that stay awake at `rate`, rounded to a multiple (hardware tiles), at least one, all at rate 0."""
    if rate <= 0:
        return num_units
    wanted = (1.0 - rate) * num_units / multiple
    return min(num_units, max(multiple, round(wanted) * multiple))


def learning_rate_at(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: str
) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then cosine or linear to zero, constant, or `wsd`.

    `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) is constant and falls linearly over the last fifth.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        return peak * min(1.0, (1.0 - done) / WSD_DECAY_SHARE)
    if schedule == "linear":
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))
