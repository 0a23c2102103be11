"""What a run has done so far, in numbers: counted each step, kept in every checkpoint, told in events and at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sat_core.plan.accounting import awake_parameters

if TYPE_CHECKING:
    from sat_core.plan.config import TrainConfig
    from sat_core.slicing import SlicedBlock
    from sat_core.sparsity import Refresh, Sparsity

MAP_BINS = 64
TOP_SHARE = 0.1


@dataclass
class Counters:
    """What a run has done; part of every checkpoint.

    Seconds are of training steps only, refreshes included. `dense_seconds` over `dense_steps` is the measured price of a
    dense step, `sparse_seconds` over `sparse_flops` that of a sparse FLOP; the first step of a process, which pays for warming
    up, is left out of both, and where a stage of the ladder begins of the latter; where layers are compiled that step and the
    next of both. `probe_flops` are part of `flops`.
    `micro_batch_size` is 0 until memory ran out and made it smaller than the configuration's.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0
    probe_flops: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0
    dense_steps: int = 0
    sparse_seconds: float = 0.0
    sparse_flops: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    micro_batch_size: int = 0
    mlp_rate_sum: float = 0.0
    attention_rate_sum: float = 0.0

    def fitting(self, configured: int) -> int:
        """Sequences in a forward: what memory has held; a run that goes on may be given less than its checkpoint says."""
        return min(self.micro_batch_size or configured, configured)


@dataclass
class StepResult:
    """Figures of one optimizer step; `loss` is the mean over labels, `grad_norm` before clipping, rates as realised.

    `probed_loss` is the sparse loss of the sequences that the probe saw, where one ran in this step.
    """

    mlp_rate: float
    attention_rate: float
    loss: float
    token_accuracy: float
    grad_norm: float
    tokens: int
    flops: int
    dense_flops: int
    probed_loss: float | None = None


def count(counters: Counters, result: StepResult, seconds: float) -> None:
    """Add one finished step."""
    counters.step += 1
    counters.tokens += result.tokens
    counters.flops += result.flops
    counters.dense_flops += result.dense_flops
    counters.seconds += seconds
    counters.mlp_rate_sum += result.mlp_rate
    counters.attention_rate_sum += result.attention_rate


def metrics(
    config: TrainConfig, counters: Counters, sparsity: Sparsity, result: StepResult
) -> dict[str, Any]:
    """The fields of a step's `metrics` event that come from counting."""
    shape = sparsity.shape
    return {
        "step": counters.step,
        "total_steps": config.total_steps,
        "tokens": counters.tokens,
        "loss": result.loss,
        "token_accuracy": result.token_accuracy,
        "grad_norm": result.grad_norm,
        "omission_rate_mlp": result.mlp_rate,
        "omission_rate_attention": result.attention_rate,
        "awake_share": awake_parameters(shape, sparsity.widths) / shape.num_parameters,
        "flops": counters.flops,
    }


def selection(
    refresh: Refresh, sparsity: Sparsity, sparse_loss: float | None, seconds: float
) -> dict[str, Any]:
    """The fields of a `selection` event: who is awake, what it was judged by, what it costs in loss.

    Per block: `awake_share`; `coverage`, share of units ever trained; `churn`, share of the awake that slept before;
    `entropy` of the scores over that of a uniform one; `concentration`, share of all score in the top tenth of units;
    where a stage of the ladder begins also `map`, the awake share of up to 64 equal stretches of units.
    """
    gap = None
    if refresh.dense_loss is not None and sparse_loss is not None:
        gap = sparse_loss - refresh.dense_loss
    return {
        "share": refresh.share,
        "stage_begins": refresh.stage_begins,
        "dense_loss": refresh.dense_loss,
        "sparse_loss": sparse_loss,
        "gap": gap,
        "seconds": seconds,
        "errors": [
            {"kind": kind, "layer": layer, "rate": rate, "error": error}
            for (kind, layer), pairs in refresh.errors.items()
            for rate, error in pairs
        ],
        "blocks": [_block_fields(b, refresh) for b in sparsity.blocks],
    }


def _block_fields(block: SlicedBlock, refresh: Refresh) -> dict[str, Any]:
    churn = refresh.churn.get(id(block))
    awake_U = torch.zeros(block.num_units)
    awake_U[block.awake_K.cpu()] = 1.0
    trained_U = block.trained_U.cpu() | awake_U.bool()
    fields: dict[str, Any] = {
        "kind": block.kind,
        "layer": block.layer,
        "awake_share": block.num_awake / block.num_units,
        "coverage": float(trained_U.float().mean()),
    }
    if refresh.stage_begins:
        bins = awake_U.tensor_split(min(MAP_BINS, block.num_units))
        fields["map"] = [round(float(piece.mean()), 3) for piece in bins]
    if churn is None or block.score_U is None:
        return fields
    share_U = (block.score_U / block.score_U.sum().clamp_min(1e-30)).cpu().double()
    entropy = float(-(share_U * share_U.clamp_min(1e-30).log()).sum())
    top = max(1, round(TOP_SHARE * block.num_units))
    return fields | {
        "churn": churn,
        "entropy": entropy / math.log(block.num_units) if block.num_units > 1 else 1.0,
        "concentration": float(share_U.topk(top).values.sum()),
    }


def summary(counters: Counters) -> dict[str, Any]:
    """The counted part of a result."""
    steps = max(1, counters.step)
    dense_step = counters.dense_seconds / counters.dense_steps if counters.dense_steps else None
    return {
        "steps": counters.step,
        "trained_tokens": counters.tokens,
        "training_seconds": counters.seconds,
        "dense_seconds_estimate": dense_step * counters.step if dense_step else None,
        "sparse_seconds_per_flop": counters.sparse_seconds / counters.sparse_flops
        if counters.sparse_flops
        else None,
        "flops": counters.flops,
        "dense_flops": counters.dense_flops,
        "probe_flops": counters.probe_flops,
        "skipped_steps": counters.skipped_steps,
        "mean_omission_rate_mlp": counters.mlp_rate_sum / steps,
        "mean_omission_rate_attention": counters.attention_rate_sum / steps,
    }
