"""What a person asks of a run, checked.

The web service, the command line and a researcher's script all go through `RunRequest.from_dict`, so a setting has one
meaning, one range and one error message wherever it is typed. The road not taken is a pydantic model in the web
service: it would repeat these ranges, and the core must be usable without it.

Every field is optional but `model`; `"auto"` (or absence) is resolved to a stated number by `plan.resolve`, which
sees the corpus. Unknown keys are refused with the nearest valid name: a typo in `omission_rate` must not cost a GPU-day.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from sat_core.plan.checking import build, json_schema, plain, refuse_unknown, setting
from sat_core.plan.config import (
    RATE,
    RUNGS,
    SHARE,
    TEMPERATURE,
    Allotment,
    AsleepOn,
    AttentionUnit,
    LadderType,
    Metric,
    Preset,
    Selector,
)
from sat_core.plan.errors import ConfigError

Priority = Literal["low", "normal", "high"]
DataFormat = Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"]


@dataclass(frozen=True, kw_only=True)
class OmissionRate:
    """Share of units left out, the mean over all layers of that kind of unit."""

    mlp: float | None = setting(None, "Share of MLP channels asleep; a warning above .75.", **RATE)
    attention: float | None = setting(
        None, "Share of KV groups (attention heads) asleep; a warning above .25.", **RATE
    )
    pooled: bool = setting(False, "Spend both as one budget of FLOPs, wherever least is lost.")
    attention_unit: AttentionUnit = setting(
        "kv_group", "What sleeps: whole KV groups, or equally many query heads of every group."
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """LORS, the ladder omission-rate scheduler: dense start, constant stage, rungs down to dense."""

    type: LadderType = setting("ladder", "Fall to dense: equal rungs, or a line or cosine of them.")
    dense_start: float = setting(0.05, "Share of all steps trained dense first.", **SHARE)
    sparse_share: float = setting(
        0.7,
        "Share of all steps after which the rungs begin; 1 leaves out the dense end.",
        **SHARE,
    )
    rungs: int = setting(4, "Number of rungs; the last one is dense.", **RUNGS)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How units are scored and how often they are chosen anew."""

    metric: Metric = setting("activation", "Formula of the score.")
    refresh_every: int = setting(0, "Steps between choices in a rung; 0: at rungs only.", ge=0)
    ema: float = setting(0.0, "Weight of the older scores at a refresh.", **RATE)
    selector: Selector = setting("top_k", "The best scores, a draw by them, or a mix of both.")
    temperature: float = setting(1.0, "Of the draw: near 0 top-k, large even.", **TEMPERATURE)
    explore: float = setting(0.3, "Share of the awake units that `mixed` draws.", **SHARE)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What watches that sparse training does not drift from the dense model."""

    max_gap: float = setting(
        0.05,
        "Nats by which a sparse loss may exceed the dense one, before the ladder steps down for good; 0 is off.",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimisation."""

    learning_rate: float | None = setting(
        None, "Peak learning rate; overrides the multiplier.", gt=0, le=1
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "Decay after the warm-up; wsd is constant and falls over the last fifth."
    )
    warmup: float = setting(0.03, "Share of all steps with a rising learning rate.", ge=0, le=1)
    max_seq_len: int | None = setting(None, "Tokens in one sequence, at most.", ge=8, le=1_048_576)
    train_on: Literal["assistant", "all"] = setting(
        "assistant", "Which tokens of supervised rows carry loss."
    )
    max_steps: int | None = setting(None, "Optimizer steps, in place of n_epochs.", ge=1)
    micro_batch_size: int | None = setting(None, "Sequences in one forward pass.", ge=1)
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, "Global norm to clip gradients to; 0 is off.", ge=0)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "bf16 is autocast over fp32 parameters."
    )
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw",
        "torch's AdamW, or torchao's with moments of eight bits, where the workers have torchao.",
    )
    tuning: Literal["full", "lora"] = setting(
        "full", "Train all weights, or low-rank adapters (peft) on a sliced frozen base."
    )
    lora_rank: int = setting(16, "Rank of the adapters.", ge=1, le=4096)
    lora_alpha: int = setting(32, "Scale of the adapters, over their rank.", ge=1)
    gradient_checkpointing: bool = setting(False, "Compute activations twice, to save memory.")
    compile: bool = setting(
        False,
        "torch.compile each decoder layer; rows are then padded to one width, for a graph is for one.",
    )
    sharding: Literal["none", "fsdp"] = setting(
        "none", "Over several processes, by torchrun: plain data parallel, or FSDP2."
    )


@dataclass(frozen=True, kw_only=True)
class MixFile:
    """A file mixed into the training data, usually replay against forgetting."""

    file: str = setting("", "Id of an uploaded file.")
    weight: float = setting(
        0.25, "Its sequences for each sequence of the training file.", gt=0, le=100
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """How rows become sequences."""

    format: DataFormat = setting(
        "auto", "`text` is continual pre-training on all tokens, packed; the others are supervised."
    )
    validation_split: float | None = setting(
        None, "Share of sequences held out where no validation file is given.", ge=0, lt=1
    )
    packing: Literal["auto", "none", "joined", "separate"] = setting(
        "auto",
        "Several documents in a sequence, attention crossing (joined, text by default) or kept inside each (separate).",
    )
    mix: tuple[MixFile, ...] = setting((), "Further files, with weights.")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Held-out evaluation, always on the merged dense model."""

    every: int | None = setting(None, "Steps between evaluations; 0: before and after.", ge=0)
    prompts: tuple[str, ...] = setting(
        (), "Continued greedily before and after the run, as samples, within the model's context."
    )
    max_new_tokens: int = setting(48, "Length of a sample.", ge=1, le=4096)
    forgetting_sequences: int = setting(
        16,
        "Sequences of the base model's own text that measure forgetting; 0 is off.",
        ge=0,
        le=256,
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is kept to resume from."""

    every: int | None = setting(None, "Steps between checkpoints; 0 is at the end only.", ge=0)
    keep: int = setting(2, "Newest checkpoints kept.", ge=1, le=1000)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a worker must have to train the job; a job waits until one that has it is free."""

    device: Literal["any", "cpu", "gpu"] = setting("any", "Where it may train.")
    min_memory_gib: float | None = setting(
        None, "Memory of its GPU, or of its machine where it has none, at least; in GiB.", gt=0
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may take before it is ended, its last checkpoint written."""

    max_seconds: int | None = setting(
        None, "Seconds of training, over all attempts; then the job fails.", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class SatSettings:
    """Sparsity-Accelerated Training and everything else that OpenAI's body has no place for."""

    mode: Literal["auto", "on", "off"] = setting(
        "auto",
        "auto is sparse where the plan promises at least 1.15x; an explicit omission rate means on.",
    )
    preset: Preset = setting(
        "balanced", "Omission rates where none is given, from little to much time saved."
    )
    omission_rate: OmissionRate = field(default_factory=OmissionRate)
    schedule: Schedule = field(default_factory=Schedule)
    importance: Importance = field(default_factory=Importance)
    guard: Guard = field(default_factory=Guard)
    allotment: Allotment = setting(
        "sensitivity",
        "How the rate is spread: by measured sensitivity, first and last layers dense, or the same everywhere.",
    )
    exempt_layers: int | None = setting(
        None,
        "First and last layers that stay dense; auto is none, or with the allotment exempt a sixteenth of all.",
        ge=0,
    )
    compensation: bool = setting(False, "Add the mean contribution of the sleepers as a bias.")
    asleep_on: AsleepOn = setting("device", "Where the weights of sleepers wait.")
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    eval: Eval = field(default_factory=Eval)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    priority: Priority = setting(
        "normal", "Of jobs that wait, high ones start before normal ones and these before low ones."
    )
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """OpenAI's three; each a number or "auto" (None here)."""

    n_epochs: int | None = setting(None, "Passes over the data.", ge=1, le=1000)
    batch_size: int | None = setting(
        None, "Sequences per optimizer step, a packed block counting as one.", ge=1, le=65536
    )
    learning_rate_multiplier: float | None = setting(
        None, "Times the base rate for the model's size and the tuning.", gt=0, le=10_000
    )


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One run, as asked for."""

    model: str
    seed: int | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    sat: SatSettings = field(default_factory=SatSettings)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> RunRequest:
        """Check `body` (keys model, seed, method, hyperparameters, sat).

        Raises:
            ConfigError: naming the field by its dotted path, what came and what is allowed.
        """
        refuse_unknown(body, ("model", "seed", "method", "hyperparameters", "sat"), "")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise ConfigError(
                f"model is {model!r}; give the name of a model, as in local/NAME or org/name.",
                "model",
            )
        seed = body.get("seed")
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31
        ):
            raise ConfigError(
                f"seed is {seed!r}; allowed is an integer from 0 to 2147483647.", "seed"
            )
        hyper = _hyperparameters(body.get("method"), body.get("hyperparameters"))
        return cls(
            model=model,
            seed=seed,
            hyperparameters=hyper,
            sat=build(SatSettings, body.get("sat"), "sat"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The canonical JSON form: every field present, tuples as lists."""
        return typing.cast("dict[str, Any]", plain(dataclasses.asdict(self)))


def sat_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the `sat` object, made from the same fields that check it."""
    return json_schema(SatSettings)


def _hyperparameters(method: Any, direct: Any) -> Hyperparameters:
    nested: Any = None
    if method is not None:
        if not isinstance(method, dict):
            raise ConfigError(f"method is {method!r}; allowed is an object with a type.", "method")
        refuse_unknown(method, ("type", "supervised", "dpo", "reinforcement"), "method")
        kind = method.get("type", "supervised")
        others = [method[name] for name in ("dpo", "reinforcement") if method.get(name) is not None]
        if kind != "supervised" or others:
            raise ConfigError(
                f"method.type is {kind!r}; only 'supervised' is supported.",
                "method.type",
                "unsupported_parameter",
            )
        supervised = method.get("supervised") or {}
        refuse_unknown(supervised, ("hyperparameters",), "method.supervised")
        nested = supervised.get("hyperparameters")
    if nested and direct and nested != direct:
        raise ConfigError(
            "hyperparameters and method.supervised.hyperparameters differ; give one of them.",
            "hyperparameters",
            "conflicting_parameters",
        )
    path = "method.supervised.hyperparameters" if nested else "hyperparameters"
    return build(Hyperparameters, nested or direct, path)
