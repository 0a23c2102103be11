"""How a key of another trainer's file is told in the words of a create body: small rules, and what they were applied to.

Every key is in one of four lots: told in our words; told, with a note of what is done instead; not needed here (where
output goes, how often a line is logged, which attention kernel); or not tellable, because leaving it out would train
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cli.client import USAGE, CliError

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ALL_LINEAR = "adapters go on every linear layer"
ONE_PROCESS = "one process trains a job"
OWN_TEMPLATE = "the chat template of the model itself is used"


@dataclass
class Told:
    """What came of a file: the body, what is done instead, what cannot be told, and what is not needed here."""

    body: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, str] = field(default_factory=dict)
    untold: dict[str, str] = field(default_factory=dict)
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


Rule = Callable[[Told, str, Any], None]


def to(dotted: str) -> Rule:
    """The same value under our name."""
    return lambda told, _key, value: told.put(dotted, value)


def to_count(dotted: str) -> Rule:
    """A whole number of steps or epochs."""

    def rule(told: Told, key: str, value: Any) -> None:
        if isinstance(value, int | float) and value == int(value):
            if value > 0:  # the others write -1 for "not set"
                told.put(dotted, int(value))
        else:
            told.untold[key] = (
                f"only whole numbers are taken, --set {dotted}=N; parts of an epoch are steps: "
                "--set sat.train.max_steps=N"
            )

    return rule


def switch(dotted: str, yes: Any, no: Any = None) -> Rule:
    """A boolean that is `yes` or `no` here; None says nothing."""

    def rule(told: Told, _key: str, value: Any) -> None:
        chosen = yes if value and value != "false" else no
        if chosen is not None:
            told.put(dotted, chosen)

    return rule


def choose(dotted: str, words: Mapping[str, Any], otherwise: str) -> Rule:
    """A word that has another name here."""

    def rule(told: Told, key: str, value: Any) -> None:
        if str(value).lower() in words:
            told.put(dotted, words[str(value).lower()])
        else:
            told.untold[key] = f"{value!r} is not known here; {otherwise}"

    return rule


def note(instead: str) -> Rule:
    """Not done; says what is done instead, where the setting is on."""

    def rule(told: Told, key: str, value: Any) -> None:
        if value and value != "none":
            told.noted[key] = instead

    return rule


def refuse(advice: str) -> Rule:
    """Not tellable where it is on."""

    def rule(told: Told, key: str, value: Any) -> None:
        if value and value != "none":
            told.untold[key] = advice

    return rule


def only(*usual: Any, otherwise: str) -> Rule:
    """What is done here anyway, whatever is said; another value is not tellable."""

    def rule(told: Told, key: str, value: Any) -> None:
        if value not in usual:
            told.untold[key] = otherwise

    return rule


def linear(told: Told, key: str, value: Any) -> None:
    """Which layers get adapters: all that are linear, here."""
    names = value.split(",") if isinstance(value, str) else value
    if names not in (True, ["all"], ["all-linear"]) and not set(names or []) >= LINEAR:
        told.noted[key] = ALL_LINEAR


def split(told: Told, key: str, value: Any) -> None:
    """What is held out, as a share."""
    if isinstance(value, int | float) and value < 1:
        told.put("sat.data.validation_split", value)
    else:
        told.untold[key] = "a share below 1 is taken (--set sat.data.validation_split=0.05)"


def optimizer(told: Told, key: str, value: Any) -> None:
    """AdamW, by any of its names."""
    name = str(value).lower()
    if "adamw" not in name or "galore" in name or "4bit" in name:
        told.untold[key] = f"{value!r} is not known here; there are adamw and adamw_8bit"
    elif "8bit" in name:
        told.put("sat.train.optimizer", "adamw_8bit")
    else:
        told.put("sat.train.optimizer", "adamw")


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
    "sat": lambda told, _key, value: _merge(told.body.setdefault("sat", {}), value),
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
OTHER_SCHEDULES = f"there are {', '.join(sorted(set(SCHEDULES.values())))}"


def taken_with_others(_told: Told, _key: str, _value: Any) -> None:
    """Told with other keys, by what follows the rules."""


def apply(
    told: Told,
    found: Mapping[str, Any],
    rules: Mapping[str, Rule],
    not_needed: frozenset[str],
) -> None:
    """Apply a rule to every key that is set; the `sat` of the file comes last and wins."""
    for key, value in sorted(found.items(), key=lambda item: item[0] == "sat"):
        if value is None:
            continue
        if key in rules:
            rules[key](told, key, value)
        elif key in not_needed:
            told.not_needed.append(key)
        else:
            told.untold[key] = "not known here"


def batch(told: Told, found: Mapping[str, Any], micro: str, accumulated: str) -> None:
    """The batch of one process from its two factors."""
    sequences = found.get(micro)
    if sequences is None:
        return
    told.put("sat.train.micro_batch_size", sequences)
    if "hyperparameters" not in told.body or "batch_size" not in told.body["hyperparameters"]:
        told.put("hyperparameters.batch_size", sequences * (found.get(accumulated) or 1))


def warmup(told: Told, found: Mapping[str, Any]) -> None:
    """Steps of warm-up as a share, where the number of all steps is known."""
    steps, total = found.get("warmup_steps"), found.get("max_steps") or 0
    if not steps or found.get("warmup_ratio") is not None:
        return
    if steps < 1:
        told.put("sat.train.warmup", steps)
    elif total > 0:
        told.put("sat.train.warmup", min(1.0, steps / total))
    else:
        told.noted["warmup_steps"] = (
            "warm-up is the default share of all steps; give one by --set sat.train.warmup=0.05"
        )


def _merge(target: dict[str, Any], more: Any) -> None:
    if not isinstance(more, Mapping):
        raise CliError("sat must be a mapping.", USAGE)
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
