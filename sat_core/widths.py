"""How many units of each block stay awake in a stage of the ladder, by the allotment that the configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sat_core.allotment import allot
from sat_core.plan.schedule import awake_units, exempt_layers, layer_rates

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
    kinds = {kind: [b for b in blocks if b.kind == kind] for kind in rates}
    outer: set[int] = set()
    for mine in kinds.values():
        exempt = exempt_layers(config.allotment, config.exempt_layers, len(mine))
        outer |= {id(b) for b in mine[:exempt] + mine[len(mine) - exempt :]}
    if config.pooled:
        return _by_curves(blocks, curves, rates, share, outer)
    widths: dict[int, int] = {}
    for kind, mine in kinds.items():
        if config.allotment == "sensitivity":
            widths |= _by_curves(mine, curves, rates, share, outer)
            continue
        exempt = exempt_layers(config.allotment, config.exempt_layers, len(mine))
        for b, r in zip(mine, layer_rates(rates[kind], len(mine), exempt), strict=True):
            rounding = multiple if kind == "mlp" else 1
            per_stretch = awake_units(b.num_units // b.stretches, share * r, rounding)
            widths[id(b)] = per_stretch * b.stretches
    return widths


def _by_curves(
    blocks: list[SlicedBlock],
    curves: dict[int, Curve],
    rates: dict[str, float],
    share: float,
    outer: set[int],
) -> dict[int, int]:
    """One budget of FLOPs for all of `blocks`, in the currency of what is lost for each; `outer` ones stay dense."""
    inner = [b for b in blocks if id(b) not in outer]
    widths = {id(b): b.num_units for b in blocks}
    if inner:
        whole = {id(b): curves[id(b)].num_units * curves[id(b)].unit_cost for b in blocks}
        saved = sum(rates[b.kind] * whole[id(b)] for b in blocks)
        given = sum(whole[id(b)] for b in inner)
        awake = allot([curves[id(b)] for b in inner], share * saved / given)
        widths |= {id(b): k for b, k in zip(inner, awake, strict=True)}
    return widths
