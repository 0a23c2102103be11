"""FLOPs and parameters of a step, counted from shapes.

Matrix products only, two FLOPs a multiply-add, backward twice the forward; causal attention counts half its square.
`benchmarks/` checks the count against torch's own flop counter. Norms, softmax and the optimizer are memory traffic
and are not counted: a speed-up quoted from FLOPs is a bound, and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sat_core.plan.schedule import Ladder, awake_units, layer_rates

if TYPE_CHECKING:
    from sat_core.plan.families import ModelShape


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Awake units summed over all layers."""

    mlp_channels: int
    kv_groups: int

    @classmethod
    def dense(cls, shape: ModelShape) -> Widths:
        """Everything awake."""
        return cls(
            mlp_channels=shape.num_layers * shape.intermediate,
            kv_groups=shape.num_layers * shape.num_kv_heads,
        )


def planned_widths(
    shape: ModelShape,
    *,
    mlp_rate: float,
    attention_rate: float,
    share: float,
    allotment: str,
    multiple: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Awake MLP channels and KV groups of each layer, for a share of the full rates."""
    mlp = layer_rates(mlp_rate, shape.num_layers, allotment)
    attention = layer_rates(attention_rate, shape.num_layers, allotment)
    return (
        tuple(awake_units(shape.intermediate, share * rate, multiple) for rate in mlp),
        tuple(awake_units(shape.num_kv_heads, share * rate, 1) for rate in attention),
    )


def step_flops(
    shape: ModelShape, widths: Widths, *, tokens: int, attended_pairs: int, labels: int
) -> int:
    """FLOPs of forward and backward.

    Args:
        shape: the model.
        widths: awake units over all layers.
        tokens: tokens that pass the layers, padding included.
        attended_pairs: query-key pairs of one head under the causal mask, summed over sequences.
        labels: positions for which logits are computed.
    """
    mlp = 3 * shape.hidden * widths.mlp_channels * tokens
    projections = (
        2 * shape.hidden * shape.head_dim * (shape.heads_per_group + 1) * widths.kv_groups * tokens
    )
    core = 2 * shape.head_dim * shape.heads_per_group * widths.kv_groups * attended_pairs
    head = shape.hidden * shape.vocab * labels
    return 3 * 2 * (mlp + projections + core + head)


def awake_parameters(shape: ModelShape, widths: Widths) -> int:
    """Weights that compute and are trained in a step."""
    dense = Widths.dense(shape)
    mlp = 3 * shape.hidden * (dense.mlp_channels - widths.mlp_channels)
    attention = (
        2
        * shape.hidden
        * shape.head_dim
        * (shape.heads_per_group + 1)
        * (dense.kv_groups - widths.kv_groups)
    )
    return shape.num_parameters - mlp - attention


def run_flops_ratio(
    shape: ModelShape,
    ladder: Ladder,
    *,
    mlp_rate: float,
    attention_rate: float,
    allotment: str,
    multiple: int,
    seq_len: int,
) -> float:
    """FLOPs of the whole run over those of the same run dense, in (0, 1]; its inverse bounds the speed-up."""
    cost = {"tokens": seq_len, "attended_pairs": seq_len * (seq_len + 1) // 2, "labels": seq_len}
    dense = step_flops(shape, Widths.dense(shape), **cost)
    total = 0.0
    for phase in ladder.phases():
        mlp, groups = planned_widths(
            shape,
            mlp_rate=mlp_rate,
            attention_rate=attention_rate,
            share=phase.share,
            allotment=allotment,
            multiple=multiple,
        )
        widths = Widths(mlp_channels=sum(mlp), kv_groups=sum(groups))
        total += phase.num_steps * step_flops(shape, widths, **cost) / dense
    return total / ladder.total_steps
