"""Which parameter carries which unit, per architecture: data, not code paths.

A unit is an MLP channel or a whole KV group (its query heads, its key and its value head). It is described by
(parameter name, dimension, rows per unit), never by a module class, so a biased or a fused projection is one more line
here and nothing elsewhere. A family is added by naming its parameters and by the twin test that sliced equals masked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sat_core.plan.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One parameter of a decoder layer, and how it follows its units.

    `dim` is the dimension that narrows. `per` counts rows of that dimension in one unit: "channel" is 1,
    "head" is head_dim, "group" is head_dim times the query heads of one KV group. Optional parameters
    (biases) may be absent from a model.
    """

    name: str
    dim: int
    per: str = "channel"
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names inside one architecture; `mlp_out` and `attention_out` are the projections back into the residual stream."""

    model_types: tuple[str, ...]
    layers: str
    mlp: tuple[Slice, ...]
    mlp_module: str
    mlp_out: str
    attention: tuple[Slice, ...]
    attention_module: str
    attention_out: str


LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="model.layers",
    mlp_module="mlp",
    mlp_out="mlp.down_proj",
    mlp=(
        Slice(name="mlp.gate_proj.weight", dim=0),
        Slice(name="mlp.up_proj.weight", dim=0),
        Slice(name="mlp.down_proj.weight", dim=1),
        Slice(name="mlp.gate_proj.bias", dim=0, optional=True),
        Slice(name="mlp.up_proj.bias", dim=0, optional=True),
    ),
    attention_module="self_attn",
    attention_out="self_attn.o_proj",
    attention=(
        Slice(name="self_attn.q_proj.weight", dim=0, per="group"),
        Slice(name="self_attn.k_proj.weight", dim=0, per="head"),
        Slice(name="self_attn.v_proj.weight", dim=0, per="head"),
        Slice(name="self_attn.o_proj.weight", dim=1, per="group"),
        Slice(name="self_attn.q_proj.bias", dim=0, per="group", optional=True),
        Slice(name="self_attn.k_proj.bias", dim=0, per="head", optional=True),
        Slice(name="self_attn.v_proj.bias", dim=0, per="head", optional=True),
    ),
)
FAMILIES = (LLAMA,)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a model that a plan needs, read from its config.json."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and one value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices (norms and biases, a fraction of a per mille, left out)."""
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.num_layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: with the list of what is supported.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ModelError(
        f"model_type {model_type!r} is not supported; supported: {known}. "
        "A family is added in sat_core/plan/families.py by naming the parameters that carry its units.",
        "model",
    )


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Read a Hugging Face config.json.

    Raises:
        ModelError: where the family is unknown or a number is missing or impossible.
    """
    family_of(str(config.get("model_type")))
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = ModelShape(
            model_type=str(config["model_type"]),
            num_layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // max(heads, 1)),
            vocab=int(config["vocab_size"]),
            context=int(config.get("max_position_embeddings") or 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json of the model lacks a usable {error}.", "model") from error
    numbers = {k: v for k, v in asdict(shape).items() if isinstance(v, int) and k != "tied"}
    wrong = [f"{k} = {v}" for k, v in numbers.items() if v < 1]
    if wrong or shape.num_heads % shape.num_kv_heads:
        raise ModelError(
            f"config.json of the model is impossible: {', '.join(wrong) or 'heads do not divide by KV heads'}.",
            "model",
        )
    return shape
