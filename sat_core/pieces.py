"""Pieces and rows: what of a block its scores are computed from, whichever way the architecture lays it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sat_core import importance
from sat_core.allotment import GRID
from sat_core.plan.schedule import awake_units

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.slicing import SlicedBlock


class Piece(NamedTuple):
    """Inner values of one output projection; a block has one, or one an expert.

    Attributes:
        tokens_t: which of the T valid tokens the rows are.
        inner_tI: its input.
        out_IH: its weight.
        first_unit: the piece's first unit in the block.
    """

    tokens_t: Tensor
    inner_tI: Tensor
    out_IH: Tensor
    first_unit: int


def weight_score(block: SlicedBlock, metric: str, *, seed: int, step: int) -> Tensor:
    """Scores that need no forward: `uniform` and `magnitude`; float32 [U]."""
    if metric == "uniform":
        scores = importance.uniform(
            block.num_units, seed=seed, step=step, layer=block.layer, kind=block.kind
        )
        return scores.to(block.awake_K.device)
    rows_out = out_rows(block)
    rows = input_rows(block, rows_out.shape[1] // block.out.segments[0])
    scored = [importance.magnitude_rows(r).reshape(block.num_units, -1) for r in rows]
    return importance.joined(scored, block.kind) * importance.out_norm(rows_out, block.kind)


def reached(piece: Piece, gradient_TH: Tensor) -> Tensor:
    """What of the gradient of the block's output reaches the piece's inner values; float32 [t, I]."""
    return gradient_TH[piece.tokens_t] @ piece.out_IH.float().T


def effects(piece: Piece, gradient_tI: Tensor, block: SlicedBlock) -> Tensor:
    """Gradient of the loss for a factor on each unit's output, at each of the piece's tokens; float32 [t, units of the piece]."""
    values = block.out.segments[0]
    effect_tI = piece.inner_tI.float() * gradient_tI
    return effect_tI.reshape(len(effect_tI), -1, values).sum(-1)


def out_rows(block: SlicedBlock) -> Tensor:
    """Output weights of the widened block, [U, values * H]."""
    return block.out.unit_rows(block.whole(block.out))[0]


def input_rows(block: SlicedBlock, hidden: int) -> list[Tensor]:
    """Input weights of the widened block, [U * rows, H] for each segment, gate before up."""
    weights = [p for p in block.parts if not (p.out or p.adapter) and p.parameter.dim() > 1]
    return [m.reshape(-1, hidden) for p in weights for m in p.unit_rows(block.whole(p))]


def inner_rows(piece: Piece, units: Tensor, block: SlicedBlock) -> Tensor:
    """Inner values of those of `units` that are in `piece`."""
    values = block.out.segments[0]
    here = units - piece.first_unit
    here = here[(here >= 0) & (here < piece.inner_tI.shape[1] // values)]
    return (here[:, None] * values + torch.arange(values, device=here.device)).flatten()


def expert_pieces(
    module: Any, block: SlicedBlock, args: tuple[Tensor, ...], valid: Tensor
) -> list[Piece]:
    """Inner values of each expert, weighted by the router, from the inputs of a stock experts module."""
    hidden_TH, index_Tk, weight_Tk = (a[valid] for a in args)
    per_expert = block.num_units // block.out.experts
    out_UH = out_rows(block)
    pieces = []
    for expert in range(block.out.experts):
        tokens, slot = torch.where(index_Tk == expert)
        gate, up = nn.functional.linear(hidden_TH[tokens], module.gate_up_proj[expert]).chunk(2, -1)
        inner = module.act_fn(gate) * up * weight_Tk[tokens, slot, None]
        first = expert * per_expert
        pieces.append(Piece(tokens, inner, out_UH[first : first + per_expert], first))
    return pieces


def probe_grid(block: SlicedBlock, multiple: int, mean_rate: float) -> list[int]:
    """Awake units of the block at each rate of the grid, strictly falling; beyond the grid where the mean rate is high."""
    rates = GRID if mean_rate <= GRID[-2] else (*GRID, (1 + mean_rate) / 2)
    per_stretch = block.num_units // block.stretches
    counts = [awake_units(per_stretch, rate, multiple) * block.stretches for rate in rates]
    return [k for k in sorted(set(counts), reverse=True) if k < block.num_units]


def activation_function(block: SlicedBlock) -> Callable[[Tensor], Tensor]:
    """The nonlinearity of an MLP, under whichever name the architecture keeps it."""
    module: Any = block.module
    name = next(n for n in ("act_fn", "activation_fn", "act") if hasattr(module, n))
    found: Callable[[Tensor], Tensor] = getattr(module, name)
    return found
