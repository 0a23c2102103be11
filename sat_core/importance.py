"""Scores of units: how much each matters now. One small function a metric, formula and source in its docstring.

The paper names four metrics and gives no code; what is written there as words is made precise here. All but the weights'
own see the dense layer, awake and asleep units alike, from a probe (`sat_core.probe`) on a training micro-batch, padding
left out. The road not taken is to score awake units from the training forward, which can never rank those that sleep.

A unit has inner values (its activations, the input of the output projection), one or more input rows (gate and up; query,
key and value rows of a head) and output rows. A metric scores each inner value or each input row; `per_unit` adds up what
belongs to a unit.

Axes: T tokens (padding left out), H hidden, I inner values of a block, U units (I = U times values in a unit).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def activation(inner_TI: Tensor, out_IH: Tensor, num_tokens: int) -> Tensor:
    """Mean absolute activation times the norm of its output row; float32 [I].

    s_i = sum_t |a_ti| / T * ||O_i||_2: an upper bound on what the unit adds to the residual stream. Used by SparseLoRA
    (arXiv 2506.16500) in a predicted form. `num_tokens` may exceed the rows of `inner_TI` where an expert saw few.
    """
    return inner_TI.abs().float().sum(0) / num_tokens * out_IH.float().norm(dim=1)


def fluctuation(inner_TI: Tensor, out_IH: Tensor, num_tokens: int) -> Tensor:
    """Variance of an activation times the squared norm of its output row; float32 [I].

    s_i = sum_t (a_ti - mean a_i)^2 / T * ||O_i||_2^2 (FLAP, An et al. 2024, arXiv 2312.11983, WIFV): what a fixed bias in
    the unit's place could not stand in for.
    """
    inner_TI = inner_TI.float()
    if len(inner_TI) == 0:
        return inner_TI.new_zeros(inner_TI.shape[1])
    spread_I = (inner_TI - inner_TI.mean(0)).square().sum(0) / num_tokens
    return spread_I * out_IH.float().square().sum(1)


def maxip_mlp(mean_H: Tensor, inputs: list[Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """Inner product of the mean input with a channel's input rows, carried through the gate; float32 [U].

    s_i = |act(x . g_i) (x . u_i)|, or |act(x . w_i)| without a gate, with x the token mean (SAT, Ma et al. 2024, "maxip",
    the mean reading). Multiplied by `out_norm`.
    """
    gate_U = act(inputs[0] @ mean_H)
    return (gate_U if len(inputs) == 1 else gate_U * (inputs[1] @ mean_H)).abs().float()


def maxip_rows(mean_H: Tensor, rows_RH: Tensor) -> Tensor:
    """|x . w| of each input row with x the token mean; float32 [R]: maxip where rows meet no common nonlinearity."""
    return (rows_RH @ mean_H).abs().float()


def wanda_rows(input_norm_H: Tensor, rows_RH: Tensor) -> Tensor:
    """sum_j ||X_j||_2 |w_j| of each input row; float32 [R] (Wanda, Sun et al. 2024, arXiv 2306.11695, summed over a row)."""
    return (rows_RH.abs() @ input_norm_H).float()


def magnitude_rows(rows_RH: Tensor) -> Tensor:
    """||w||_2 of each input row; float32 [R] (SAT, "magnitude"; Han et al. 2015)."""
    return rows_RH.float().norm(dim=1)


def joined(scores: list[Tensor], kind: str) -> Tensor:
    """One score a unit from those of its input rows, each [U, rows]; float32 [U].

    An MLP channel multiplies gate and up, so theirs are joined by the geometric mean; a head's rows by the mean.
    """
    if kind == "mlp":
        return torch.stack([s.mean(1) for s in scores]).log().mean(0).exp()
    return torch.cat(scores, dim=1).mean(1)


def out_norm(out_rows: Tensor, kind: str) -> Tensor:
    """||O_u||_F of a unit's output rows [U, values * H], over the square root of its values for a head; float32 [U]."""
    return (
        out_rows.float().norm(dim=1) if kind == "mlp" else out_rows.float().square().mean(1).sqrt()
    )


def taylor(gate_gradient_U: Tensor) -> Tensor:
    """|dL / dm_u| for a factor m_u = 1 on the unit's output; float32 [U].

    Equal to |sum_w w dL/dw| over the unit's output weights, the first-order change of the loss if it slept (Molchanov et
    al. 2019, arXiv 1906.10771; Michel et al. 2019, arXiv 1905.10650, for heads).
    """
    return gate_gradient_U.abs().float()


def fisher(effect_tU: Tensor, num_labels: int) -> Tensor:
    """sum_t (dL_t / dm_u)^2 / 2N; float32 [U].

    The rise of the mean loss, to second order and unit by unit, if the unit slept: the diagonal of the empirical Fisher
    matrix of the factors m (Theis et al. 2018, arXiv 1801.05787).
    """
    return effect_tU.float().square().sum(0) / (2 * num_labels)


def uniform(num_units: int, *, seed: int, step: int, layer: int, kind: str) -> Tensor:
    """Seeded random scores, float32 [U]: the baseline every other metric must beat. Same on every device."""
    return torch.rand(num_units, generator=generator(seed, step, layer, kind))


def generator(seed: int, step: int, layer: int, kind: str) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments."""
    mixed = (seed * 1_000_003 + step) * 4096 + layer * 2 + (kind == "attention")
    return torch.Generator().manual_seed(mixed % 2**63)


def per_unit(scores_I: Tensor, num_units: int) -> Tensor:
    """Sum over the inner values of each unit; float32 [U]."""
    return scores_I.view(num_units, -1).sum(1)
