"""What a run will cost, before it runs: FLOPs by phase of its ladder, probes included, from shapes and counts alone.

A quote is made of the numbers that the run itself counts with (`plan.accounting`), so the two can differ only in what is
not known before: how the widths are allotted to layers, and whether a guard makes the run dense early. The road not taken
is 6 N D: it is off by the attention core, the head and the padding, which is most of what small models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sat_core.plan.accounting import (
    Cost,
    Widths,
    forward_flops,
    planned_widths,
    preview,
    step_flops,
)
from sat_core.plan.config import GRADIENT_METRICS, WEIGHT_METRICS
from sat_core.plan.schedule import CPU_WIDTH_MULTIPLE, GPU_WIDTH_MULTIPLE

if TYPE_CHECKING:
    from sat_core.plan.config import SatConfig, TrainConfig
    from sat_core.plan.families import ModelShape
    from sat_core.plan.schedule import Phase

# What all probes of a run together may see of it, within bounds for one probe in tokens: 256 chose as well as 1,024
# (docs/evidence/ablation.md).
PROBE_SHARE = 0.01
MIN_PROBE_TOKENS, MAX_PROBE_TOKENS = 256, 4096


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What one phase of the ladder will do.

    Attributes:
        phase: its steps and its share of the full rates.
        steps: the cost of all its steps together.
        begin: what the probe sees where the phase begins.
        refreshes: what the probes inside the phase see, together.
    """

    phase: Phase
    steps: Cost
    begin: Cost
    refreshes: Cost


def width_multiple(sat: SatConfig, *, gpu: bool) -> int:
    """What mean widths are rounded to. By sensitivity a budget of FLOPs is kept to about a unit, whatever the tiles."""
    if sat.allotment == "sensitivity":
        return 1
    return sat.multiple or (GPU_WIDTH_MULTIPLE if gpu else CPU_WIDTH_MULTIPLE)


def probe_rows(sat: SatConfig, batch_size: int, width: int, world: int = 1) -> int:
    """Sequences of one rank that a probe looks at; all ranks together see what one process sees."""
    sparse = (phase for phase in sat.ladder.phases() if phase.share > 0)
    probes = sum(1 + len(phase.refreshes(sat.refresh_every)) for phase in sparse)
    rows = PROBE_SHARE * sat.total_steps * batch_size / max(1, probes)
    fewest, most = MIN_PROBE_TOKENS / width, MAX_PROBE_TOKENS // width
    return max(1, round(max(fewest, min(rows, most)) / world))


def probe_passes(sat: SatConfig, shape: ModelShape, *, stage_begins: bool) -> int:
    """Forwards' worth of FLOPs that a probe of one process spends: none, one, or two with a backward to no weight.

    It is three where there are experts, whose inner values it has to compute again.
    """
    by_errors = stage_begins and sat.allotment == "sensitivity"
    if by_errors or sat.metric in GRADIENT_METRICS:
        return 2 + (shape.experts > 1 and sat.mlp_rate > 0)
    looks = sat.metric not in WEIGHT_METRICS or sat.max_gap > 0 or sat.compensation
    return int(looks)


def quote(config: TrainConfig, costs: Sequence[PhaseCost], *, gpu: bool) -> dict[str, Any]:
    """FLOPs of the run, and of each phase, as plain data.

    `flops` holds `dense`, `sat` with its probes, `probe` and `ratio`; each of `phases` `steps`, `state`, the mean rates,
    `flops`, `dense_flops` and `ratio`. The inverse of a ratio bounds the speed-up.
    """
    shape, sat = config.shape, config.sat
    everything = Widths.dense(shape)
    multiple = width_multiple(sat, gpu=gpu)
    phases: list[dict[str, Any]] = []
    probes = 0
    for cost in costs:
        share = cost.phase.share if sat.sparse else 0.0
        widths = planned_widths(shape, sat, share, multiple) if share else everything
        probe = 0
        if share:
            begin, inside = (probe_passes(sat, shape, stage_begins=b) for b in (True, False))
            probe = begin * forward_flops(shape, everything, cost.begin)
            probe += inside * forward_flops(shape, everything, cost.refreshes)
        dense = step_flops(shape, everything, cost.steps)
        spent = step_flops(shape, widths, cost.steps) + probe
        probes += probe
        phases.append(
            {
                "first_step": cost.phase.first_step + 1,
                "last_step": cost.phase.last_step + 1,
                "steps": cost.phase.last_step - cost.phase.first_step + 1,
                "state": cost.phase.state if sat.sparse else "training_dense",
                "omission_rate_mlp": sat.mlp_rate * share,
                "omission_rate_attention": sat.attention_rate * share,
                "flops": spent,
                "dense_flops": dense,
                "ratio": spent / dense if dense else 1.0,
            }
        )
    total, dense = (sum(p[name] for p in phases) for name in ("flops", "dense_flops"))
    flops = {
        "dense": dense,
        "sat": total,
        "probe": probes,
        "ratio": total / dense if dense else 1.0,
    }
    return {"flops": flops, "phases": phases}


def schedule_preview(
    shape: ModelShape, sat: SatConfig, *, gpu: bool, seq_len: int
) -> dict[str, Any]:
    """The ladder of a run on full sequences, phase by phase, without data and without probes."""
    multiple = width_multiple(sat, gpu=gpu)
    rows = preview(shape, sat, multiple=multiple, seq_len=seq_len)
    counts = [row["last_step"] - row["first_step"] + 1 for row in rows]

    def mean(name: str) -> float:
        total: float = sum(n * row[name] for n, row in zip(counts, rows, strict=True))
        return total / sat.total_steps

    ratio = mean("flops_share")
    rungs = [
        {**row, "steps": n, "speedup_bound": 1 / row["flops_share"]}
        for n, row in zip(counts, rows, strict=True)
    ]
    return {
        "rungs": rungs,
        "mean_omission_rate_mlp": mean("omission_rate_mlp"),
        "mean_omission_rate_attention": mean("omission_rate_attention"),
        "flops_ratio": ratio,
        "speedup_bound": 1 / ratio,
    }
