"""FLOPs and parameters of a step, counted from shapes.

Matrix products only, two FLOPs a multiply-add, backward twice the forward; causal attention counts half its square.
`benchmarks/` checks the count against torch's own flop counter. Norms, softmax and the optimizer are memory traffic
and are not counted: a speed-up quoted from FLOPs is a bound, and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sat_core.plan.schedule import awake_units, exempt_layers, layer_rates

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sat_core.plan.config import SatConfig
    from sat_core.plan.families import ModelShape


PAD_MULTIPLE = 8


def padded(tokens: int) -> int:
    """Tokens of a row in a batch whose longest sequence has so many."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Awake units summed over all layers; `mlp_channels` of one expert where there are experts."""

    mlp_channels: int
    kv_groups: int
    query_heads: int

    @classmethod
    def dense(cls, shape: ModelShape) -> Widths:
        """Everything awake."""
        return cls(
            mlp_channels=shape.num_layers * shape.intermediate,
            kv_groups=shape.num_layers * shape.num_kv_heads,
            query_heads=shape.num_layers * shape.num_heads,
        )


class Cost(NamedTuple):
    """What a step has to do.

    Attributes:
        tokens: tokens that pass the layers, padding included.
        attended_pairs: query-key pairs of one head under the causal mask, summed over sequences.
        labels: positions for which logits are computed.
    """

    tokens: int
    attended_pairs: int
    labels: int

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        """All together."""
        return cls(*map(sum, zip(cls(0, 0, 0), *costs, strict=True)))

    @classmethod
    def of_sequence(cls, seq_len: int) -> Cost:
        """One full sequence, every position labelled."""
        pairs = seq_len * (seq_len + 1) // 2
        return cls(tokens=seq_len, attended_pairs=pairs, labels=seq_len)


def forward_flops(shape: ModelShape, widths: Widths, cost: Cost) -> int:
    """FLOPs of a forward alone."""
    active = shape.active_experts
    mlp = shape.mlp_matrices * shape.hidden * widths.mlp_channels * active * cost.tokens
    heads = 2 * (widths.query_heads + widths.kv_groups)
    projections = shape.hidden * shape.head_dim * heads * cost.tokens
    core = 2 * shape.head_dim * widths.query_heads * cost.attended_pairs
    head = shape.hidden * shape.vocab * cost.labels
    return 2 * (mlp + projections + core + head)


def step_flops(shape: ModelShape, widths: Widths, cost: Cost) -> int:
    """FLOPs of forward and backward."""
    return 3 * forward_flops(shape, widths, cost)


def awake_parameters(shape: ModelShape, widths: Widths) -> int:
    """Weights that compute and are trained in a step."""
    dense = Widths.dense(shape)
    channels = (dense.mlp_channels - widths.mlp_channels) * shape.experts
    heads = dense.query_heads - widths.query_heads + dense.kv_groups - widths.kv_groups
    asleep = shape.mlp_matrices * channels + 2 * shape.head_dim * heads
    return shape.num_parameters - shape.hidden * asleep


def attention_units(shape: ModelShape, unit: str) -> int:
    """Units of one layer's attention that can sleep: its KV groups, or the query heads of one of them."""
    return shape.num_kv_heads if unit == "kv_group" else shape.heads_per_group


def unit_cost(shape: ModelShape, kind: str, unit: str) -> float:
    """Multiply-adds of a token that pass through one MLP channel or attention unit; its projections alone."""
    if kind == "mlp":
        return shape.mlp_matrices * shape.hidden * shape.active_experts / shape.experts
    heads = shape.heads_per_group + 1 if unit == "kv_group" else 1
    return 2 * shape.hidden * shape.head_dim * heads


def planned_widths(shape: ModelShape, sat: SatConfig, share: float, multiple: int) -> Widths:
    """Awake units for a share of the full rates."""
    exempt = exempt_layers(sat.allotment, sat.exempt_layers, shape.num_layers)
    mlp = layer_rates(sat.mlp_rate, shape.num_layers, exempt)
    attention = layer_rates(
        0.0 if shape.whole_heads else sat.attention_rate, shape.num_layers, exempt
    )
    units = attention_units(shape, sat.attention_unit)
    awake = sum(awake_units(units, share * rate, 1) for rate in attention)
    whole_groups = sat.attention_unit == "kv_group"
    return Widths(
        mlp_channels=sum(awake_units(shape.intermediate, share * r, multiple) for r in mlp),
        kv_groups=awake if whole_groups else shape.num_layers * shape.num_kv_heads,
        query_heads=awake * (shape.heads_per_group if whole_groups else shape.num_kv_heads),
    )


def preview(
    shape: ModelShape, sat: SatConfig, *, multiple: int, seq_len: int
) -> list[dict[str, Any]]:
    """The run before it runs: one row a phase of the ladder, as plain data.

    Rows hold `first_step` and `last_step` (1-based), `state`, the mean rates, the mean awake `widths` a layer, and
    `flops_share`, the FLOPs of a step over those of a dense one, whose inverse bounds the phase's speed-up.
    """
    cost = Cost.of_sequence(seq_len)
    dense = step_flops(shape, Widths.dense(shape), cost)
    rows = []
    for phase in sat.ladder.phases():
        widths = planned_widths(shape, sat, phase.share, multiple)
        rows.append(
            {
                "first_step": phase.first_step + 1,
                "last_step": phase.last_step + 1,
                "state": phase.state,
                "omission_rate_mlp": sat.mlp_rate * phase.share,
                "omission_rate_attention": sat.attention_rate * phase.share,
                "mlp_channels": widths.mlp_channels / shape.num_layers,
                "kv_groups": widths.kv_groups / shape.num_layers,
                "query_heads": widths.query_heads / shape.num_layers,
                "flops_share": step_flops(shape, widths, cost) / dense,
            }
        )
    return rows


def run_flops_ratio(shape: ModelShape, sat: SatConfig, *, multiple: int, seq_len: int) -> float:
    """FLOPs of the whole run over those of the same run dense, in (0, 1]; its inverse bounds the speed-up."""
    rows = preview(shape, sat, multiple=multiple, seq_len=seq_len)
    steps = [(row["last_step"] - row["first_step"] + 1) * row["flops_share"] for row in rows]
    return float(sum(steps) / sat.total_steps)
