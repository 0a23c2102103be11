"""How a key of another trainer's file is translated: small rules, and what they make.

Every key is in one of four lots: translated; noted, with what is done instead; not needed here (where output goes, how
often a line is logged, which attention kernel); or refused, because leaving it out would train something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from cli.client import USAGE, CliError

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ALL_LINEAR = "adapters go on every linear layer"
ONE_PROCESS = "one process trains a job"
OWN_TEMPLATE = "the chat template of the model itself is used"


@dataclass
class Translation:
    """What came of a file: the body, what is done instead, what cannot be result, and what is not needed here."""

    body: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    not_needed: list[str] = field(default_factory=list)

    def put(self, dotted: str, value: Any) -> None:
        """Set a field of the body."""
        *path, last = dotted.split(".")
        place = self.body
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value

    def track(self, kind: str, settings: dict[str, Any]) -> None:
        """Send what is measured to a tracker as well."""
        self.body.setdefault("integrations", []).append({"type": kind, kind: settings})


Rule = Callable[[Translation, str, Any], None]


def to(dotted: str) -> Rule:
    """The same value under our name."""
    return lambda result, _key, value: result.put(dotted, value)


def to_count(dotted: str) -> Rule:
    """A whole number of steps or epochs."""

    def rule(result: Translation, key: str, value: Any) -> None:
        if is_number(value) and value == int(value):
            if value > 0:  # the others write -1 for "not set"
                result.put(dotted, int(value))
        else:
            result.refused[key] = (
                f"only whole numbers are taken, --set {dotted}=N; parts of an epoch are steps: "
                "--set sat.train.max_steps=N"
            )

    return rule


def switch(dotted: str, yes: Any, no: Any = None) -> Rule:
    """A boolean that is `yes` or `no` here; None says nothing."""

    def rule(result: Translation, _key: str, value: Any) -> None:
        chosen = yes if value and value != "false" else no
        if chosen is not None:
            result.put(dotted, chosen)

    return rule


def choose(dotted: str, words: Mapping[str, Any], otherwise: str) -> Rule:
    """A word that has another name here."""

    def rule(result: Translation, key: str, value: Any) -> None:
        if str(value).lower() in words:
            result.put(dotted, words[str(value).lower()])
        else:
            result.refused[key] = f"{value!r} is not known here; {otherwise}"

    return rule


def note(instead: str) -> Rule:
    """Not done; says what is done instead, where the setting is on."""

    def rule(result: Translation, key: str, value: Any) -> None:
        if value and value != "none":
            result.noted[key] = instead

    return rule


def refuse(advice: str) -> Rule:
    """Refused where it is on, with what to do."""

    def rule(result: Translation, key: str, value: Any) -> None:
        if value and value != "none":
            result.refused[key] = advice

    return rule


def only(*usual: Any, otherwise: str) -> Rule:
    """What is done here anyway; another value is refused."""

    def rule(result: Translation, key: str, value: Any) -> None:
        if value not in usual:
            result.refused[key] = otherwise

    return rule


def taken_with_others(_result: Translation, _key: str, _value: Any) -> None:
    """Translation with other keys, by what follows the rules."""


def linear(result: Translation, key: str, value: Any) -> None:
    """Which layers get adapters: all that are linear, here."""
    names = value if isinstance(value, list) else str(value).split(",")
    if names not in (["all"], ["all-linear"]) and not set(map(str, names)) >= LINEAR:
        result.noted[key] = ALL_LINEAR


def split(result: Translation, key: str, value: Any) -> None:
    """What is held out, as a share."""
    if is_number(value) and value < 1:
        result.put("sat.data.validation_split", value)
    else:
        result.refused[key] = "a share below 1 is taken (--set sat.data.validation_split=0.05)"


def optimizer(result: Translation, key: str, value: Any) -> None:
    """AdamW, by any of its names."""
    name = str(value).lower()
    if "adamw" not in name or "galore" in name or "4bit" in name:
        result.refused[key] = f"{value!r} is not known here; there are adamw and adamw_8bit"
    elif "8bit" in name:
        result.put("sat.train.optimizer", "adamw_8bit")
    else:
        result.put("sat.train.optimizer", "adamw")


# Keys of Hugging Face's Trainer, which both pass on.
COMMON: dict[str, Rule] = {
    "learning_rate": to("sat.train.learning_rate"),
    "max_steps": to_count("sat.train.max_steps"),
    "warmup_ratio": to("sat.train.warmup"),
    "weight_decay": to("sat.train.weight_decay"),
    "max_grad_norm": to("sat.train.max_grad_norm"),
    "seed": to("seed"),
    "bf16": choose(
        "sat.train.precision",
        {"true": "bf16", "full": "bf16", "auto": "auto", "false": "fp32"},
        "there are true, false and auto",
    ),
    "fp16": refuse("halves without a scaler are not trained in; take it out, or write bf16: true"),
    "gradient_checkpointing": switch("sat.train.gradient_checkpointing", yes=True, no=False),
    "torch_compile": choose(
        "sat.train.compile",
        {"true": True, "false": False, "auto": False},
        "there are true, false and auto",
    ),
    "eval_steps": to_count("sat.eval.every"),
    "save_steps": to_count("sat.checkpoints.every"),
    "save_total_limit": to_count("sat.checkpoints.keep"),
    "lora_alpha": to("sat.train.lora_alpha"),
    "lora_dropout": note("adapters are trained without dropout"),
    "neftune_noise_alpha": refuse("noise on embeddings is not offered"),
    "adam_beta1": only(0.9, otherwise="AdamW has betas .9 and .999 here"),
    "adam_beta2": only(0.999, otherwise="AdamW has betas .9 and .999 here"),
    "adam_epsilon": only(1e-8, 1e-08, otherwise="AdamW has epsilon 1e-8 here"),
    "trust_remote_code": note(
        "code that comes with a model is never run; its family must be known"
    ),
    "deepspeed": note(ONE_PROCESS),
    "fsdp": note(ONE_PROCESS),
    "fsdp_config": note(ONE_PROCESS),
    "resume_from_checkpoint": refuse("name a checkpoint of ours as the model instead"),
    "group_by_length": note("sequences are packed or taken in random order"),
    "load_best_model_at_end": note("the result is what the last step left"),
    "sat": taken_with_others,
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
OTHER_SCHEDULES = f"there are {', '.join(sorted(set(SCHEDULES.values())))}"


def apply(
    result: Translation,
    found: Mapping[str, Any],
    rules: Mapping[str, Rule],
    not_needed: frozenset[str],
) -> None:
    """Apply its rule to every key that is set."""
    for key, value in found.items():
        if value is None:
            continue
        if key in rules:
            rules[key](result, key, value)
        elif key in not_needed:
            result.not_needed.append(key)
        else:
            result.refused[key] = "not known here"


def batch(result: Translation, found: Mapping[str, Any], micro: str, accumulated: str) -> None:
    """The batch of one process from its two factors; where neither is a number the API says so."""
    sequences, times = found.get(micro), found.get(accumulated) or 1
    if sequences is None:
        return
    result.put("sat.train.micro_batch_size", sequences)
    if "batch_size" not in result.body.get("hyperparameters", {}):
        whole = sequences * times if is_number(sequences) and is_number(times) else sequences
        result.put("hyperparameters.batch_size", whole)


def warmup(result: Translation, found: Mapping[str, Any]) -> None:
    """Steps of warm-up as a share, where the number of all steps is known."""
    steps, total = found.get("warmup_steps"), found.get("max_steps") or 0
    if not steps or found.get("warmup_ratio") is not None:
        return
    if is_number(steps) and steps < 1:
        result.put("sat.train.warmup", steps)
    elif is_number(steps) and is_number(total) and total > 0:
        result.put("sat.train.warmup", min(1.0, steps / total))
    else:
        result.noted["warmup_steps"] = (
            "warm-up is the default share of all steps; give one by --set sat.train.warmup=0.05"
        )


def own_settings(result: Translation, found: Mapping[str, Any]) -> None:
    """The `sat` object of the file, which wins over what was translated."""
    if found.get("sat") is not None:
        _merge(result.body.setdefault("sat", {}), found["sat"])


def is_number(value: Any) -> bool:
    """Whether it can be reckoned with; true and infinity cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _merge(target: dict[str, Any], more: Any) -> None:
    if not isinstance(more, Mapping):
        raise CliError("sat must be a mapping.", USAGE)
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
