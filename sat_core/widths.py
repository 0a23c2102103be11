"""How many units of each block stay awake in a stage of the ladder, by the allotment that the configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sat_core.allotment import allot
from sat_core.plan.schedule import awake_units, layer_rates

if TYPE_CHECKING:
    from sat_core.allotment import Curve
    from sat_core.plan.config import SatConfig
    from sat_core.slicing import SlicedBlock


def stage_widths(
    config: SatConfig,
    blocks: list[SlicedBlock],
    curves: dict[int, Curve],
    share: float,
    multiple: int,
) -> dict[int, int]:
    """Awake units of each block, by its `id`, for a share of the full rates.

    Args:
        config: rates and allotment.
        blocks: those that may sleep, in layer order for each kind.
        curves: what each width would cost, by `id`; needed for the sensitivity allotment alone.
        share: of the full rates.
        multiple: awake MLP channels are rounded to it.
    """
    rates = {"mlp": config.mlp_rate, "attention": config.attention_rate}
    if config.pooled:
        return _by_curves(blocks, curves, rates, share)
    widths: dict[int, int] = {}
    for kind, rate in rates.items():
        mine = [b for b in blocks if b.kind == kind]
        if config.allotment == "sensitivity":
            widths |= _by_curves(mine, curves, rates, share)
            continue
        for b, r in zip(mine, layer_rates(rate, len(mine), config.allotment), strict=True):
            rounding = multiple if kind == "mlp" else 1
            per_stretch = awake_units(b.num_units // b.stretches, share * r, rounding)
            widths[id(b)] = per_stretch * b.stretches
    return widths


def _by_curves(
    blocks: list[SlicedBlock], curves: dict[int, Curve], rates: dict[str, float], share: float
) -> dict[int, int]:
    """One budget of FLOPs for all of `blocks`, in the currency of what is lost for each."""
    if not blocks:
        return {}
    mine = [curves[id(b)] for b in blocks]
    whole = [c.num_units * c.unit_cost for c in mine]
    saved = sum(rates[b.kind] * cost for b, cost in zip(blocks, whole, strict=True))
    awake = allot(mine, share * saved / sum(whole))
    return {id(b): k for b, k in zip(blocks, awake, strict=True)}
