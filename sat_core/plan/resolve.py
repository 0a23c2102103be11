"""From what was asked, and what the corpus turned out to be, to a configuration with every number stated.

One pure function, called before a run and by whoever wants to quote one, so a quote and a run cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sat_core.plan.accounting import attention_units, run_flops_ratio
from sat_core.plan.config import GRADIENT_METRICS, PRESETS, SatConfig, TrainConfig
from sat_core.plan.errors import ConfigError, DataError
from sat_core.plan.families import family_of
from sat_core.plan.schedule import CPU_WIDTH_MULTIPLE, MAX_LAYER_RATE, exempt_layers

if TYPE_CHECKING:
    from sat_core.plan.families import ModelShape
    from sat_core.plan.request import RunRequest

BASE_LEARNING_RATES = ((10e6, 1e-3), (100e6, 3e-4), (1e9, 5e-5), (10e9, 2e-5), (math.inf, 1e-5))
# Where dense training and LoRA each did best, adapters had two to eight times the rate: docs/evidence/same-clock.md.
TUNING_FACTORS = {"full": 1, "lora": 4}
WORTHWHILE_SPEEDUP = 1.15
# Narrower models were behind dense training at every setting, at equal FLOPs: docs/evidence/ablation.md.
WORTHWHILE_HIDDEN = 128
TOKENS_PER_MICRO_BATCH = 8192


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


def base_learning_rate(num_parameters: int, tuning: str) -> float:
    """Base rate for a model of this size and this tuning, which the multiplier scales."""
    of_size = next(rate for limit, rate in BASE_LEARNING_RATES if num_parameters <= limit)
    return TUNING_FACTORS[tuning] * of_size


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
    epochs = hyper.n_epochs or (1 if figures["format"] == "text" else 3)
    steps = sat.train.max_steps or epochs * per_epoch
    base = base_learning_rate(shape.num_parameters, sat.train.tuning)
    peak = _learning_rate(request, base)
    sat_config, warnings = resolve_sat(request, shape, steps, seq_len)
    _refuse_unshardable(request, shape)
    fitting = max(1, TOKENS_PER_MICRO_BATCH // max(1, int(figures["longest"])))
    micro = min(batch, sat.train.micro_batch_size or fitting)
    train = dataclasses.replace(sat.train, learning_rate=peak, micro_batch_size=micro)
    quarter = max(1, steps // 4)
    config = TrainConfig(
        model_name=request.model,
        model_path=model_path,
        model_revision=revision,
        shape=shape,
        corpus=corpus,
        seed=request.seed or 0,
        total_steps=steps,
        batch_size=batch,
        warmup_steps=math.ceil(sat.train.warmup * steps),
        sat=sat_config,
        eval_every=quarter if sat.eval.every is None else sat.eval.every,
        checkpoint_every=quarter if sat.checkpoints.every is None else sat.checkpoints.every,
        checkpoint_keep=sat.checkpoints.keep,
        **_as_asked(TrainConfig, train, sat.eval),
    )
    stated = {
        "n_epochs": max(1, math.ceil(steps / per_epoch)),
        "batch_size": batch,
        "learning_rate_multiplier": peak / base,
    }
    warnings += _data_warnings(figures)
    if config.sharding == "fsdp":
        warnings.append(
            "sat.train.sharding is 'fsdp': it shards under torchrun, and does nothing in a run of one process, as the "
            "service's are."
        )
    return Resolved(config=config, hyperparameters=stated, warnings=tuple(warnings))


def _as_asked(cls: type, *settings: Any) -> dict[str, Any]:
    """The settings that a configuration holds under the same name."""
    values = {name: value for group in settings for name, value in vars(group).items()}
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def _data_warnings(figures: dict[str, Any]) -> list[str]:
    """What a person should know of the data before it is trained on."""
    rows = max(1, int(figures["rows"]))
    said = {
        "truncated_rows": "longer than sat.train.max_seq_len and cut there",
        "untrained_rows": "left out: not one of their tokens would carry loss",
        "duplicate_rows": "exact repetitions of other rows",
        "overlap_rows": "in the validation data too",
    }
    return [
        f"{figures[name]} of {rows} rows are {words}."
        for name, words in said.items()
        if figures.get(name)
    ]


def _learning_rate(request: RunRequest, base: float) -> float:
    asked = request.sat.train.learning_rate
    multiplier = request.hyperparameters.learning_rate_multiplier
    if asked is not None and multiplier is not None:
        raise ConfigError(
            "sat.train.learning_rate and learning_rate_multiplier are both given; give one of them.",
            "sat.train.learning_rate",
            "conflicting_parameters",
        )
    return asked or (multiplier or 1.0) * base


def resolve_sat(
    request: RunRequest, shape: ModelShape, steps: int, seq_len: int
) -> tuple[SatConfig, list[str]]:
    """The part that is the method, for a run of so many steps on sequences of so many tokens; and what to say of it.

    Raises:
        ConfigError: for settings that contradict each other or the model.
    """
    sat = request.sat
    asked = sat.omission_rate
    explicit = asked.mlp is not None or asked.attention is not None
    check_mode(request)
    mlp, attention = (asked.mlp or 0.0, asked.attention or 0.0) if explicit else PRESETS[sat.preset]
    if sat.mode == "off":
        mlp = attention = 0.0
    elif shape.whole_heads and not explicit:
        attention = 0.0
    config = SatConfig(
        total_steps=steps,
        mlp_rate=mlp,
        attention_rate=attention,
        schedule=sat.schedule.type,
        allotment=sat.allotment,
        exempt_layers=exempt_layers(sat.allotment, sat.exempt_layers, shape.num_layers),
        compensation=sat.compensation,
        asleep_on=sat.asleep_on,
        seed=request.seed or 0,
        **_as_asked(SatConfig, asked, sat.schedule, sat.importance, sat.guard),
    )
    refuse_impossible(config, shape)
    if sat.mode == "auto" and not explicit:
        bound = 1 / run_flops_ratio(shape, config, multiple=CPU_WIDTH_MULTIPLE, seq_len=seq_len)
        why = None
        if shape.hidden < WORTHWHILE_HIDDEN:
            why = f"a model of width {shape.hidden} has no channel to spare (from {WORTHWHILE_HIDDEN} on it may)"
        elif bound < WORTHWHILE_SPEEDUP:
            why = f"sparsity would bound the speed-up at {bound:.2f}x on this model"
        if why:
            return dataclasses.replace(config, mlp_rate=0.0, attention_rate=0.0), [
                f"Trained dense: {why}. Set sat.mode to on to have it anyway."
            ]
    _refuse_too_many_exempt(sat.exempt_layers or 0, config, shape)
    return config, _warnings(config, shape)


def refuse_impossible(config: SatConfig, shape: ModelShape) -> None:
    """What a model of this shape cannot do; the core asks too, for those who come without a request.

    Raises:
        ConfigError: naming the setting.
    """
    if config.attention_rate > 0 and shape.whole_heads:
        raise ConfigError(
            f"sat.omission_rate.attention is {config.attention_rate:g}; in this {shape.model_type} model positions live in "
            "the heads (ALiBi), so only MLP channels can sleep.",
            "sat.omission_rate.attention",
        )
    if config.attention_unit == "query_head" and not family_of(shape.model_type).queries:
        raise ConfigError(
            f"sat.omission_rate.attention_unit is 'query_head'; for {shape.model_type} only 'kv_group' is supported.",
            "sat.omission_rate.attention_unit",
        )
    if config.compensation and shape.experts > 1:
        raise ConfigError(
            "sat.compensation is true; inside experts it is not supported.", "sat.compensation"
        )


def _refuse_too_many_exempt(asked: int, config: SatConfig, shape: ModelShape) -> None:
    """The layers between the exempt ones must be able to give the whole mean rate."""
    rate = max(config.mlp_rate, config.attention_rate)
    most = math.floor(shape.num_layers * (1 - rate / MAX_LAYER_RATE) / 2)
    if rate and asked > most:
        raise ConfigError(
            f"sat.exempt_layers is {asked}; with an omission rate of {rate:g} at most {most} of {shape.num_layers} layers "
            "can stay dense at each end.",
            "sat.exempt_layers",
        )


def _refuse_unshardable(request: RunRequest, shape: ModelShape) -> None:
    """What the ranks cannot do while each holds only a slice of a layer."""
    train, metric = request.sat.train, request.sat.importance.metric
    if train.sharding != "fsdp":
        return
    reasons = {
        f"sat.train.tuning {train.tuning!r}": train.tuning != "full",
        f"sat.train.optimizer {train.optimizer!r}": train.optimizer != "adamw",
        "sat.train.compile": train.compile,
        f"sat.importance.metric {metric!r}": metric in GRADIENT_METRICS,
        f"a {shape.model_type} model": not family_of(shape.model_type).mlp_module,
    }
    if refused := next((words for words, holds in reasons.items() if holds), None):
        raise ConfigError(
            f"sat.train.sharding is 'fsdp', which does not work with {refused}; leave sharding at 'none'.",
            "sat.train.sharding",
            "conflicting_parameters",
        )


def _warnings(config: SatConfig, shape: ModelShape) -> list[str]:
    rates = (("mlp", config.mlp_rate, 0.75), ("attention", config.attention_rate, 0.25))
    warnings = [
        f"sat.omission_rate.{kind} is {rate:g}; above {limit:g} quality has been seen to fall."
        for kind, rate, limit in rates
        if rate > limit
    ]
    if config.sparse and config.ladder.phases()[-1].share > 0:
        warnings.append(
            "sat.schedule.sparse_share is 1: the run ends sparse, and no step at its end trains all units together."
        )
    units = attention_units(shape, config.attention_unit)
    if config.attention_rate > 0 and units == 1:
        warnings.append(
            "A layer has a single attention unit, which cannot sleep: the attention rate has no effect."
        )
    elif config.attention_rate > 0 and units < 4:
        warnings.append(
            f"A layer has {units} attention units that can sleep, so the attention rate is realised coarsely."
        )
    return warnings


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
