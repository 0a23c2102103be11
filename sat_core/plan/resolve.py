"""From what was asked, and what the corpus turned out to be, to a configuration with every number stated.

One pure function, called before a run and by whoever wants to quote one, so a quote and a run cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sat_core.plan.accounting import run_flops_ratio
from sat_core.plan.config import TrainConfig
from sat_core.plan.errors import ConfigError, DataError
from sat_core.plan.schedule import Ladder

if TYPE_CHECKING:
    from sat_core.plan.families import ModelShape
    from sat_core.plan.request import RunRequest

BASE_LEARNING_RATES = ((10e6, 1e-3), (100e6, 3e-4), (1e9, 5e-5), (10e9, 2e-5), (math.inf, 1e-5))
DEFAULT_MLP_RATE = 0.5
WORTHWHILE_SPEEDUP = 1.15
TOKENS_PER_MICRO_BATCH = 8192
CPU_WIDTH_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run ready to start, with what it should say to the person who asked for it."""

    config: TrainConfig
    hyperparameters: dict[str, Any]
    warnings: tuple[str, ...]


def max_seq_len(request: RunRequest, shape: ModelShape, *, packed: bool) -> int:
    """Tokens in one sequence: what was asked, else the model's context up to 1,024 (packed text) or 2,048.

    Raises:
        ConfigError: where more was asked than the model's context.
    """
    asked = request.sat.train.max_seq_len
    if asked is not None and asked > shape.context:
        raise ConfigError(
            f"sat.train.max_seq_len is {asked}; the model's context is {shape.context}.",
            "sat.train.max_seq_len",
        )
    return asked or min(shape.context, 1024 if packed else 2048)


def base_learning_rate(num_parameters: int) -> float:
    """Base rate for full fine-tuning of a model of this size, which the multiplier scales."""
    return next(rate for limit, rate in BASE_LEARNING_RATES if num_parameters <= limit)


def resolve(
    request: RunRequest,
    shape: ModelShape,
    figures: dict[str, Any],
    *,
    model_path: str | None,
    revision: str | None,
    corpus: str,
) -> Resolved:
    """State every number.

    Args:
        request: what was asked.
        shape: of the model.
        figures: of the corpus (`sequences`, `seq_len`, `packed`, ...).
        model_path: folder of the model, None for the hub.
        revision: of a hub model.
        corpus: folder of the prepared corpus.

    Raises:
        ConfigError: for settings that contradict each other.
        DataError: where the corpus has no sequence to train on.
    """
    sat, hyper = request.sat, request.hyperparameters
    sequences, seq_len = int(figures["sequences"]), int(figures["seq_len"])
    if sequences < 1:
        raise DataError(
            "The data gives no sequence to train on: every row was empty, or the file is too short.",
            "training_file",
        )
    batch = hyper.batch_size or (
        min(8, sequences) if figures["packed"] else max(1, min(16, sequences // 32))
    )
    per_epoch = max(1, math.ceil(sequences / batch))
    epochs = hyper.n_epochs or (1 if figures["packed"] else 3)
    steps = sat.train.max_steps or epochs * per_epoch
    peak = _learning_rate(request, shape)
    ladder = Ladder(
        total_steps=steps,
        dense_start=sat.schedule.dense_start,
        sparse_share=sat.schedule.sparse_share,
        rungs=sat.schedule.rungs,
    )
    mlp, attention, warnings = _rates(request, shape, ladder, seq_len)
    micro = min(
        batch,
        sat.train.micro_batch_size
        or max(1, TOKENS_PER_MICRO_BATCH // max(1, int(figures["longest"]))),
    )
    config = TrainConfig(
        model_name=request.model,
        model_path=model_path,
        model_revision=revision,
        shape=shape,
        corpus=corpus,
        seed=request.seed if request.seed is not None else 0,
        total_steps=steps,
        batch_size=batch,
        micro_batch_size=micro,
        learning_rate=peak,
        lr_schedule=sat.train.lr_schedule,
        warmup_steps=math.ceil(sat.train.warmup * steps),
        weight_decay=sat.train.weight_decay,
        max_grad_norm=sat.train.max_grad_norm,
        precision=sat.train.precision,
        mlp_rate=mlp,
        attention_rate=attention,
        allotment=sat.allotment,
        dense_start=sat.schedule.dense_start,
        sparse_share=sat.schedule.sparse_share,
        rungs=sat.schedule.rungs,
        metric=sat.importance.metric,
        refresh_every=sat.importance.refresh_every,
        eval_every=sat.eval.every if sat.eval.every is not None else max(1, steps // 4),
        prompts=sat.eval.prompts,
        max_new_tokens=sat.eval.max_new_tokens,
        checkpoint_every=sat.checkpoints.every
        if sat.checkpoints.every is not None
        else max(1, steps // 4),
        checkpoint_keep=sat.checkpoints.keep,
    )
    stated = {
        "n_epochs": max(1, math.ceil(steps / per_epoch)),
        "batch_size": batch,
        "learning_rate_multiplier": peak / base_learning_rate(shape.num_parameters),
    }
    return Resolved(config=config, hyperparameters=stated, warnings=tuple(warnings))


def _learning_rate(request: RunRequest, shape: ModelShape) -> float:
    asked, multiplier = (
        request.sat.train.learning_rate,
        request.hyperparameters.learning_rate_multiplier,
    )
    if asked is not None and multiplier is not None:
        raise ConfigError(
            "sat.train.learning_rate and learning_rate_multiplier are both given; give one of them.",
            "sat.train.learning_rate",
            "conflicting_parameters",
        )
    return (
        asked
        if asked is not None
        else (multiplier or 1.0) * base_learning_rate(shape.num_parameters)
    )


def _rates(
    request: RunRequest, shape: ModelShape, ladder: Ladder, seq_len: int
) -> tuple[float, float, list[str]]:
    sat = request.sat
    asked = sat.omission_rate
    explicit = asked.mlp is not None or asked.attention is not None
    check_mode(request)
    if sat.mode == "off":
        return 0.0, 0.0, []
    mlp = asked.mlp if asked.mlp is not None else 0.0 if explicit else DEFAULT_MLP_RATE
    attention = asked.attention or 0.0
    ratio = run_flops_ratio(
        shape,
        ladder,
        mlp_rate=mlp,
        attention_rate=attention,
        allotment=sat.allotment,
        multiple=CPU_WIDTH_MULTIPLE,
        seq_len=seq_len,
    )
    if sat.mode == "auto" and not explicit and 1 / ratio < WORTHWHILE_SPEEDUP:
        return (
            0.0,
            0.0,
            [
                f"Trained dense: sparsity would bound the speed-up at {1 / ratio:.2f}x on this model. Set sat.mode to on to have it anyway."
            ],
        )
    warnings = []
    if mlp > 0.75:
        warnings.append(
            f"sat.omission_rate.mlp is {mlp:g}; above .75 quality has been seen to fall."
        )
    if attention > 0.25:
        warnings.append(
            f"sat.omission_rate.attention is {attention:g}; above .25 quality has been seen to fall."
        )
    if attention > 0 and shape.num_kv_heads < 4:
        warnings.append(
            f"The model has {shape.num_kv_heads} KV groups a layer, so the attention rate is realised coarsely."
        )
    return mlp, attention, warnings


def check_mode(request: RunRequest) -> None:
    """Refuse an omission rate beside `mode: off`.

    Raises:
        ConfigError: saying which of the two to drop.
    """
    asked = request.sat.omission_rate
    if request.sat.mode == "off" and (asked.mlp or asked.attention):
        raise ConfigError(
            "sat.mode is 'off' but an omission rate is given; drop one of them.",
            "sat.mode",
            "conflicting_parameters",
        )
