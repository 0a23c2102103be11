"""How a mean omission rate is spread over layers by what each would lose: the sensitivity allotment.

The probe estimates, for each block and each rate of `GRID`, what would be lost if that share of its least important units
slept (`sat_core.probe` says how). The budget is then spent greedily where the loss per FLOP saved is least, on the lower
convex hull of each block's curve, which is the best split for convex curves. Widths come from the grid, so only a few are
distinct; one block takes the remainder.

The road not taken is a sweep of whole losses, layer by layer and rate by rate: it costs up to a sixth of a short run, and
one backward of a micro-batch did as well (docs/decisions/0004-allotment.md).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GRID = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a block would lose: `errors[j]` is the cost when all but `awake[j]` of its units sleep.

    `awake` falls strictly from `num_units`, where the error is 0. `unit_cost` is FLOPs saved per unit asleep, in any one
    currency; rounding of a remainder is to `multiple` units.
    """

    num_units: int
    awake: tuple[int, ...]
    errors: tuple[float, ...]
    unit_cost: float = 1.0
    multiple: int = 1

    def rows(self) -> list[tuple[float, float]]:
        """(omission rate, cost) pairs, for people."""
        rates = [1 - k / self.num_units for k in self.awake]
        return list(zip(rates, self.errors, strict=True))

    def hull(self) -> list[tuple[int, float]]:
        """Lower convex hull of (units asleep, error), from (0, 0) on."""
        points = [(0, 0.0)] + [
            (self.num_units - k, e) for k, e in zip(self.awake, self.errors, strict=True)
        ]
        kept: list[tuple[int, float]] = []
        for point in points:
            while len(kept) >= 2 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], point):
                kept.pop()
            kept.append(point)
        return kept


def allot(curves: list[Curve], mean_rate: float) -> list[int]:
    """Awake units of each block, so that `mean_rate` of all FLOPs of these blocks is saved at the least summed error.

    The budget is met up to a unit's rounding; where the curves do not reach it, everything on them is spent.
    """
    budget = mean_rate * sum(c.num_units * c.unit_cost for c in curves)
    steps = []
    for block, curve in enumerate(curves):
        for before, after in itertools.pairwise(curve.hull()):
            price = _slope(before, after) / curve.unit_cost
            steps.append((price, block, after[0] - before[0]))
    asleep = [0] * len(curves)
    for _, block, units in sorted(steps):
        curve = curves[block]
        affordable = budget / curve.unit_cost
        if units > affordable:
            rest = round(affordable / curve.multiple) * curve.multiple
            asleep[block] += min(units, rest)
            break
        asleep[block] += units
        budget -= units * curve.unit_cost
    return [c.num_units - a for c, a in zip(curves, asleep, strict=True)]


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
