"""What a person asks of a run, checked.

The web service, the command line and a researcher's script all go through `RunRequest.from_dict`, so a setting has one
meaning, one range and one error message wherever it is typed. The road not taken is a pydantic model in the web
service: it would repeat these ranges, and the core must be usable without it.

Every field is optional but `model`; `"auto"` (or absence) is resolved to a stated number by `plan.resolve`, which
sees the corpus. Unknown keys are refused with the nearest valid name: a typo in `omission_rate` must not cost a GPU-day.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from sat_core.plan.errors import ConfigError

METRICS = ("maxip", "activation", "uniform")
ALLOTMENTS = ("uniform", "exempt")
DATA_FORMATS = ("auto", "text", "messages", "prompt_completion", "alpaca")


def _setting(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and its limits (`ge`, `gt`, `le`, `lt`, `choices`)."""
    return field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True, kw_only=True)
class OmissionRate:
    """Share of units left out, the mean over all layers of that kind of unit."""

    mlp: float | None = _setting(
        None, "Share of MLP channels asleep; a warning above .75.", ge=0, lt=1
    )
    attention: float | None = _setting(
        None, "Share of KV groups (attention heads) asleep; a warning above .25.", ge=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """LORS, the ladder omission-rate scheduler: dense start, constant stage, rungs down to dense."""

    type: Literal["ladder"] = _setting("ladder", "The only schedule.")
    dense_start: float = _setting(0.05, "Share of all steps trained dense first.", ge=0, le=1)
    sparse_share: float = _setting(
        0.7, "Share of all steps after which the rungs begin.", ge=0, le=1
    )
    rungs: int = _setting(4, "Number of rungs; the last one is dense.", ge=1, le=64)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How units are scored and how often they are chosen anew."""

    metric: Literal["maxip", "activation", "uniform"] = _setting(
        "activation", "Formula of the score."
    )
    refresh_every: int = _setting(
        0, "Steps between selections inside a rung; 0 chooses at rungs only.", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimisation."""

    learning_rate: float | None = _setting(
        None, "Peak learning rate; overrides the multiplier.", gt=0, le=1
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "Decay after the warm-up."
    )
    warmup: float = _setting(0.03, "Share of all steps with a rising learning rate.", ge=0, le=1)
    max_seq_len: int | None = _setting(None, "Tokens in one sequence, at most.", ge=8, le=1_048_576)
    train_on: Literal["assistant", "all"] = _setting(
        "assistant", "Which tokens of supervised rows carry loss."
    )
    max_steps: int | None = _setting(None, "Optimizer steps, in place of n_epochs.", ge=1)
    micro_batch_size: int | None = _setting(None, "Sequences in one forward pass.", ge=1)
    weight_decay: float = _setting(0.01, "AdamW's decoupled weight decay.", ge=0, le=1)
    max_grad_norm: float = _setting(
        1.0, "Gradients are clipped to this global norm; 0 is off.", ge=0
    )
    precision: Literal["auto", "fp32", "bf16"] = _setting(
        "auto", "bf16 is autocast over fp32 parameters."
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """How rows become sequences."""

    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca"] = _setting(
        "auto", "`text` is continual pre-training on all tokens, packed; the others are supervised."
    )
    validation_split: float | None = _setting(
        None, "Share of sequences held out where no validation file is given.", ge=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Held-out evaluation, always on the merged dense model."""

    every: int | None = _setting(
        None, "Steps between evaluations; 0 is before and after only.", ge=0
    )
    prompts: tuple[str, ...] = _setting(
        (), "Continued greedily before and after the run, as samples."
    )
    max_new_tokens: int = _setting(48, "Length of a sample.", ge=1, le=4096)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is kept to resume from."""

    every: int | None = _setting(None, "Steps between checkpoints; 0 is at the end only.", ge=0)
    keep: int = _setting(2, "Newest checkpoints kept.", ge=1, le=1000)


@dataclass(frozen=True, kw_only=True)
class SatSettings:
    """Sparsity-Accelerated Training and everything else that OpenAI's body has no place for."""

    mode: Literal["auto", "on", "off"] = _setting(
        "auto",
        "auto is sparse where the plan promises at least 1.15x; an explicit omission rate means on.",
    )
    omission_rate: OmissionRate = field(default_factory=OmissionRate)
    schedule: Schedule = field(default_factory=Schedule)
    importance: Importance = field(default_factory=Importance)
    allotment: Literal["uniform", "exempt"] = _setting(
        "exempt",
        "How the rate is spread: the same everywhere, or first and last layers dense and the others higher.",
    )
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    eval: Eval = field(default_factory=Eval)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """OpenAI's three; each a number or "auto" (None here)."""

    n_epochs: int | None = _setting(None, "Passes over the data.", ge=1, le=1000)
    batch_size: int | None = _setting(
        None, "Sequences per optimizer step, a packed block counting as one.", ge=1, le=65536
    )
    learning_rate_multiplier: float | None = _setting(
        None, "Times the base rate for the model's size.", gt=0, le=10_000
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
        _refuse_unknown(body, ("model", "seed", "method", "hyperparameters", "sat"), "")
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
            sat=_build(SatSettings, body.get("sat"), "sat"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The canonical JSON form: every field present, tuples as lists."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))


def sat_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the `sat` object, made from the same fields that check it."""
    return _schema(SatSettings)


def _hyperparameters(method: Any, direct: Any) -> Hyperparameters:
    nested: Any = None
    if method is not None:
        if not isinstance(method, dict):
            raise ConfigError(f"method is {method!r}; allowed is an object with a type.", "method")
        _refuse_unknown(method, ("type", "supervised", "dpo", "reinforcement"), "method")
        kind = method.get("type", "supervised")
        if (
            kind != "supervised"
            or method.get("dpo") is not None
            or method.get("reinforcement") is not None
        ):
            raise ConfigError(
                f"method.type is {kind!r}; only 'supervised' is supported.",
                "method.type",
                "unsupported_parameter",
            )
        supervised = method.get("supervised") or {}
        _refuse_unknown(supervised, ("hyperparameters",), "method.supervised")
        nested = supervised.get("hyperparameters")
    if nested and direct and nested != direct:
        raise ConfigError(
            "hyperparameters and method.supervised.hyperparameters differ; give one of them.",
            "hyperparameters",
            "conflicting_parameters",
        )
    path = "method.supervised.hyperparameters" if nested else "hyperparameters"
    return _build(Hyperparameters, nested or direct, path)


def _build(cls: type, value: Any, path: str) -> Any:
    if value is None:
        return cls()
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {value!r}; allowed is an object.", path)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _refuse_unknown(value, tuple(fields), path)
    hints = typing.get_type_hints(cls)
    checked = {
        name: _check(hints[name], item, f"{path}.{name}", fields[name])
        for name, item in value.items()
    }
    return cls(**checked)


def _refuse_unknown(value: Any, known: tuple[str, ...], path: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {value!r}; allowed is an object.", path)
    for name in value:
        if name in known:
            continue
        dotted = f"{path}.{name}" if path else str(name)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{dotted} is not a known setting.{hint} Allowed here: {', '.join(known)}.",
            dotted,
            "unknown_parameter",
        )


def _check(hint: Any, value: Any, path: str, spec: dataclasses.Field[Any]) -> Any:
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        if value is None or value == "auto":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type", hint), value, path)
    if value is None:
        return spec.default
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path} is {value!r}; allowed: {', '.join(choices)}.{meant}", path)
        return value
    if typing.get_origin(hint) is tuple:
        if (
            not isinstance(value, (list, tuple))
            or not all(isinstance(v, str) for v in value)
            or len(value) > 16
        ):
            raise ConfigError(f"{path} must be a list of at most 16 strings; got {value!r}.", path)
        return tuple(value)
    return _number(hint, value, path, spec.metadata, optional=optional)


def _number(
    hint: Any, value: Any, path: str, limits: typing.Mapping[str, Any], *, optional: bool
) -> int | float:
    kind = "an integer" if hint is int else "a number"
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if good and hint is int:
        good = float(value).is_integer()
    low = limits.get("ge", limits.get("gt", -math.inf))
    high = limits.get("le", limits.get("lt", math.inf))
    inside = good and (value > low or ("ge" in limits and value == low) or low == -math.inf)
    inside = inside and (value < high or ("le" in limits and value == high) or high == math.inf)
    if not inside:
        raise ConfigError(
            f"{path} is {value!r}; allowed is {kind}{_range_text(limits)}{', or auto' if optional else ''}.",
            path,
        )
    return int(value) if hint is int else float(value)


def _range_text(limits: typing.Mapping[str, Any]) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[k]} {limits[k]:g}" for k in ("ge", "gt", "le", "lt") if k in limits]
    return " " + " and ".join(parts) if parts else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _schema(hint: Any, spec: dataclasses.Field[Any] | None = None) -> dict[str, Any]:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        properties = {f.name: _schema(hints[f.name], f) for f in dataclasses.fields(hint)}
        return {
            "type": "object",
            "description": (hint.__doc__ or "").strip(),
            "properties": properties,
            "additionalProperties": False,
        }
    limits = spec.metadata if spec else {}
    if isinstance(hint, types.UnionType):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        number = _schema(inner, spec)
        description = number.pop("description", "")
        return {"anyOf": [number, {"const": "auto"}, {"type": "null"}], "description": description}
    out: dict[str, Any] = {"description": limits.get("doc", "")}
    if typing.get_origin(hint) is Literal:
        out |= {"type": "string", "enum": list(typing.get_args(hint))}
    elif typing.get_origin(hint) is tuple:
        out |= {"type": "array", "items": {"type": "string"}, "maxItems": 16}
    else:
        out |= {"type": "integer" if hint is int else "number"}
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    out |= {names[k]: limits[k] for k in names if k in limits}
    if spec is not None and spec.default is not dataclasses.MISSING:
        out["default"] = _plain(spec.default)
    return out
