"""Which projection carries which unit, per architecture: data, not code paths.

A unit is an MLP channel or a whole KV group (its query heads, its key and its value head). It is described by
(projection, segments), never by a module class, so a fused projection is one more line here and nothing elsewhere; weights,
biases and adapters follow their projection (`sat_core.blocks`). A family is added by naming its projections and by the twin
test that sliced equals masked.

Segments say how the rows of a projection follow its units: each segment holds so many rows of every unit, in unit order,
and segments follow each other. A fused gate_up is ("channel", "channel"); a fused qkv of three stretches is
("group", "head", "head"); one that is interleaved per head is ("qkv",).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sat_core.plan.errors import ModelError


@dataclass(frozen=True)
class Slice:
    """One projection, by its name below the module of its block, and how it follows its units.

    A segment's rows per unit: "channel" 1, "head" head_dim, "group" head_dim times the query heads of one KV group, "qkv"
    head_dim times those plus two, "query" head_dim of one query head. `out` marks the projection back into the residual
    stream, whose inputs narrow; of the others the outputs do. `experts` marks a bare parameter of all experts.
    """

    name: str
    segments: tuple[str, ...] = ("channel",)
    out: bool = False
    experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names inside one architecture.

    Attributes:
        layers: where the decoder layers are.
        mlp_module, attention_module: the submodules of a layer whose forward uses the projections.
        mlp, attention: the projections that carry units; gate before up.
        attributes: (path below the attention module, quantity) that must follow the width, quantity being one of "heads",
            "kv_heads" and "width" (heads times head_dim).
        queries: projections of the other attention unit, one query head in every KV group; empty where it is not supported.
        keys: names in config.json where they differ from Llama's.
        gated: whether the MLP has a gate.
        tied: whether embeddings are tied where config.json is silent.
        whole_heads_if: a key of config.json that, where true, forbids narrowing the attention (positions live in the heads).
        masks_documents: whether documents in one sequence need a mask to be kept apart; the stock forward of the others does
            it by their positions.
    """

    model_types: tuple[str, ...]
    layers: str
    mlp: tuple[Slice, ...]
    mlp_module: str = "mlp"
    attention: tuple[Slice, ...]
    attention_module: str = "self_attn"
    attributes: tuple[tuple[str, str], ...] = ()
    queries: tuple[Slice, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)
    gated: bool = True
    tied: bool = False
    whole_heads_if: str = ""
    masks_documents: bool = False


def _two_matrices(into: str, out: str) -> tuple[Slice, ...]:
    """An MLP without a gate."""
    return Slice(into), Slice(out, out=True)


def _separate_attention(out: str) -> tuple[Slice, ...]:
    """q, k, v as three projections, and the output projection's name."""
    return (
        Slice("q_proj", ("group",)),
        Slice("k_proj", ("head",)),
        Slice("v_proj", ("head",)),
        Slice(out, ("group",), out=True),
    )


# q, k and v of each KV group beside each other in one projection.
_INTERLEAVED = (Slice("query_key_value", ("qkv",)), Slice("dense", ("group",), out=True))
_LLAMA: dict[str, Any] = {
    "layers": "model.layers",
    "mlp": (Slice("gate_proj"), Slice("up_proj"), Slice("down_proj", out=True)),
    "attention": _separate_attention("o_proj"),
    "queries": (Slice("q_proj", ("query",)), Slice("o_proj", ("query",), out=True)),
}
_EXPERTS: dict[str, Any] = {
    **_LLAMA,
    "mlp_module": "mlp.experts",
    "mlp": (
        Slice("gate_up_proj", ("channel", "channel"), experts=True),
        Slice("down_proj", out=True, experts=True),
    ),
}

FAMILIES = (
    Family(model_types=("llama", "mistral", "qwen2", "qwen3"), **_LLAMA),
    Family(model_types=("gemma2", "gemma3_text"), tied=True, **_LLAMA),
    Family(
        model_types=("phi3",),
        layers="model.layers",
        mlp=(Slice("gate_up_proj", ("channel", "channel")), Slice("down_proj", out=True)),
        attention=(
            Slice("qkv_proj", ("group", "head", "head")),
            Slice("o_proj", ("group",), out=True),
        ),
        attributes=(("config.num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads")),
    ),
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        mlp=_two_matrices("c_fc", "c_proj"),
        attention_module="attn",
        attention=(
            Slice("c_attn", ("head", "head", "head")),
            Slice("c_proj", ("head",), out=True),
        ),
        attributes=(("num_heads", "heads"), ("split_size", "width")),
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
        gated=False,
        tied=True,
    ),
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        mlp=_two_matrices("dense_h_to_4h", "dense_4h_to_h"),
        attention_module="attention",
        attention=_INTERLEAVED,
        gated=False,
    ),
    Family(
        model_types=("opt",),
        layers="model.decoder.layers",
        mlp_module="",
        mlp=_two_matrices("fc1", "fc2"),
        attention=_separate_attention("out_proj"),
        attributes=(("num_heads", "heads"),),
        keys={"intermediate_size": "ffn_dim"},
        gated=False,
        tied=True,
        masks_documents=True,
    ),
    Family(
        model_types=("falcon",),
        layers="transformer.h",
        mlp=_two_matrices("dense_h_to_4h", "dense_4h_to_h"),
        attention_module="self_attention",
        attention=_INTERLEAVED,
        attributes=(("num_heads", "heads"), ("num_kv_heads", "kv_heads")),
        keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        gated=False,
        tied=True,
        whole_heads_if="alibi",
    ),
    Family(model_types=("mixtral",), **_EXPERTS),
    Family(
        model_types=("qwen3_moe",), keys={"intermediate_size": "moe_intermediate_size"}, **_EXPERTS
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a model that a plan needs, read from its config.json.

    `intermediate` is the width of one expert where there are `experts`, of which a token passes `active_experts`.
    """

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
    gated: bool = True
    experts: int = 1
    active_experts: int = 1
    whole_heads: bool = False

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and one value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP: gate, up and down, or two without a gate."""
        return 3 if self.gated else 2

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer's matrices (norms, biases and routers left out)."""
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.intermediate * self.experts

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices."""
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.num_layers * self.layer_parameters + embeddings


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that a family describes."""
    return tuple(name for family in FAMILIES for name in family.model_types)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelError: with the list of what is supported.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ModelError(
        f"model_type {model_type!r} is not supported; supported: {', '.join(supported_model_types())}. "
        "A family is added in sat_core/plan/families.py by naming the projections that carry its units.",
        "model",
    )


def shape_of(config: dict[str, Any]) -> ModelShape:
    """Read a Hugging Face config.json.

    Raises:
        ModelError: where the family is unknown or a number is missing or impossible.
    """
    family = family_of(str(config.get("model_type")))

    def read(name: str) -> Any:
        return config.get(family.keys.get(name, name))

    def need(name: str) -> int:
        value = read(name)
        if value is None:
            raise KeyError(family.keys.get(name, name))
        return int(value)

    try:
        heads, hidden = need("num_attention_heads"), need("hidden_size")
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
        shape = ModelShape(
            model_type=str(config["model_type"]),
            num_layers=need("num_hidden_layers"),
            hidden=hidden,
            intermediate=4 * hidden
            if not family.gated and read("intermediate_size") is None
            else need("intermediate_size"),
            num_heads=heads,
            num_kv_heads=_kv_heads(config, read, heads),
            head_dim=int(config.get("head_dim") or hidden // max(heads, 1)),
            vocab=need("vocab_size"),
            context=int(read("max_position_embeddings") or 2048),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            gated=family.gated,
            experts=experts,
            active_experts=int(read("num_experts_per_tok") or 1) if experts > 1 else 1,
            whole_heads=bool(family.whole_heads_if and config.get(family.whole_heads_if)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json of the model lacks a usable {error}.", "model") from error
    wrong = [f"{k} = {v}" for k, v in asdict(shape).items() if type(v) is int and v < 1]
    if wrong or shape.num_heads % shape.num_kv_heads:
        raise ModelError(
            f"config.json of the model is impossible: {', '.join(wrong) or 'heads do not divide by KV heads'}.",
            "model",
        )
    return shape


def _kv_heads(config: dict[str, Any], read: Any, heads: int) -> int:
    """Falcon says `multi_query` where it means one KV head, and then ignores `num_kv_heads`."""
    if config["model_type"] == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return int(read("num_key_value_heads") or heads)
