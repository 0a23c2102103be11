"""Scores of units: how much each matters now. One small function a metric, formula and source in its docstring.

The paper names four metrics and gives no code; what is written there as words is made precise here. All of them see
the dense layer, awake and asleep units alike, from a probe: one forward without gradient on a training micro-batch.
The road not taken is to score awake units from the training forward, which can never rank those that sleep.

Axes: T tokens (padding left out), H hidden, I rows of a block's inner width, U units, R rows in a unit (I = U R).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def activation(inner_TI: Tensor, out_HI: Tensor, num_units: int) -> Tensor:
    """Mean absolute activation times the norm of its output column, summed over a unit's rows; float32 [U].

    s_u = sum_{i in u} mean_t |a_ti| * ||O_:i||_2: an upper bound on what the unit adds to the residual stream.
    Used by SparseLoRA (arXiv 2506.16500) in a predicted form.
    """
    rows_I = inner_TI.abs().float().mean(0) * out_HI.float().norm(dim=0)
    return rows_I.view(num_units, -1).sum(1)


def maxip_mlp(
    mean_H: Tensor, gate_IH: Tensor, up_IH: Tensor, out_HI: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Inner product of the mean input with a channel's weights, carried through the gate; float32 [U].

    s_i = |act(x . g_i) (x . u_i)| * ||D_:i||_2 with x the token mean (SAT, Ma et al. 2024, "maxip").
    """
    inner_I = act(gate_IH @ mean_H) * (up_IH @ mean_H)
    return (inner_I.abs() * out_HI.norm(dim=0)).float()


def maxip_attention(
    mean_H: Tensor, weights: list[Tensor], out_HI: Tensor, num_units: int
) -> Tensor:
    """Mean absolute inner product over a KV group's q, k and v rows, times its output's norm; float32 [U].

    s_u = mean_{w in u} |x . w| * ||O_u||_F / sqrt(R).
    """
    products_U = torch.cat([(w @ mean_H).abs().view(num_units, -1) for w in weights], dim=1).mean(1)
    out_U = out_HI.T.reshape(num_units, -1).norm(dim=1) / (out_HI.shape[1] // num_units) ** 0.5
    return (products_U * out_U).float()


def uniform(num_units: int, *, seed: int, step: int, layer: int, kind: str) -> Tensor:
    """Seeded random scores, float32 [U]: the baseline every other metric must beat. Same on every device."""
    mixed = (seed * 1_000_003 + step) * 4096 + layer * 2 + (kind == "attention")
    return torch.rand(num_units, generator=torch.Generator().manual_seed(mixed % 2**63))
