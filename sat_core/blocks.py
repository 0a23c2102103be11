"""From a stock model to its sliced blocks: the parameters that carry each layer's units, found by their family's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sat_core.plan.families import Family, ModelShape, Slice, family_of, shape_of
from sat_core.slicing import SlicedBlock, SlicedParameter, follow

if TYPE_CHECKING:
    from torch import nn

    from sat_core.plan.config import SatConfig


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    Attributes:
        core: the stock model, inside peft's where there is one.
        shape, family: of the stock model.
        config: which units are wanted, and where sleepers wait.
        names: full name of each parameter in the outer model, by `id`.
    """

    core: Any
    shape: ModelShape
    family: Family
    config: SatConfig
    names: dict[int, str]

    @classmethod
    def of(cls, model: Any, config: SatConfig) -> Anatomy:
        """Of a stock causal LM, or of a peft model around one.

        Raises:
            ModelError: for a family that is not supported.
        """
        core: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        shape = shape_of(core.config.to_dict())
        names = {id(p): n for n, p in model.named_parameters()}
        return cls(core, shape, family_of(shape.model_type), config, names)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        module: nn.Module = self.core.get_submodule(f"{self.family.layers}.{index}")
        return module


def mlp_block(anatomy: Anatomy, layer: int) -> SlicedBlock:
    """The MLP of a layer, or all its experts; a unit is a channel."""
    shape, family = anatomy.shape, anatomy.family
    units = shape.intermediate * shape.experts
    parts = _parts(anatomy, layer, family.mlp, units)
    module = anatomy.layer(layer).get_submodule(family.mlp_module)
    attributes: list[tuple[Any, str, float]] = (
        [(module, "intermediate_dim", 1 / shape.experts)] if shape.experts > 1 else []
    )
    return SlicedBlock(
        layer,
        "mlp",
        module,
        parts,
        units,
        stretches=shape.experts,
        attributes=attributes,
        asleep_on=anatomy.config.asleep_on,
    )


def attention_block(anatomy: Anatomy, layer: int) -> SlicedBlock:
    """The attention of a layer; a unit is what the config's `attention_unit` says."""
    shape, family = anatomy.shape, anatomy.family
    module: Any = anatomy.layer(layer).get_submodule(family.attention_module)
    whole_groups = anatomy.config.attention_unit == "kv_group"
    units = shape.num_kv_heads if whole_groups else shape.num_heads
    heads = shape.heads_per_group if whole_groups else 1
    quantities: dict[str, float] = {
        "heads": heads,
        "kv_heads": 1,
        "width": heads * shape.head_dim,
    }
    wanted = family.attributes
    if not whole_groups:
        quantities = {"groups": 1 / shape.num_kv_heads}
        wanted = (("num_key_value_groups", "groups"),)
    return SlicedBlock(
        layer,
        "attention",
        module,
        _parts(anatomy, layer, family.attention if whole_groups else family.queries, units),
        units,
        stretches=1 if whole_groups else shape.num_kv_heads,
        attributes=[(*follow(module, path), quantities[q]) for path, q in wanted],
        asleep_on=anatomy.config.asleep_on,
    )


def _parts(
    anatomy: Anatomy, layer: int, slices: tuple[Slice, ...], units: int
) -> list[SlicedParameter]:
    shape = anatomy.shape
    group = shape.head_dim * shape.heads_per_group
    rows = {
        "channel": 1,
        "head": shape.head_dim,
        "query": shape.head_dim,
        "group": group,
        "qkv": group + 2 * shape.head_dim,
    }
    parts = []
    for item in slices:
        path, _, leaf = item.name.rpartition(".")
        owner = anatomy.layer(layer).get_submodule(path)
        for i, (holder, name, dim) in enumerate(_carriers(owner, leaf, item.dim)):
            parameter: Any = getattr(holder, name, None)
            if parameter is None and item.optional:
                continue
            parts.append(
                SlicedParameter(
                    name=anatomy.names[id(parameter)],
                    parameter=parameter,
                    owner=holder,
                    dim=dim,
                    segments=tuple(rows[s] for s in item.segments),
                    num_units=units,
                    out=item.out,
                    adapter=i > 0,
                    experts=shape.experts if item.experts else 1,
                )
            )
    return parts


def _carriers(owner: Any, leaf: str, dim: int) -> list[tuple[Any, str, int]]:
    """The tensors that carry a projection's units: its own, and those of its LoRA adapters where peft has put some.

    peft keeps the projection as `base_layer`; `lora_A` [rank, in] narrows with the input, `lora_B` [out, rank] with the
    output.
    """
    if not hasattr(owner, "base_layer"):
        return [(owner, leaf, dim)]
    base = [(owner.base_layer, leaf, dim)]
    if leaf != "weight":
        return base
    if dim == int(owner.fan_in_fan_out):
        return base + [(adapter, "weight", 0) for adapter in owner.lora_B.values()]
    return base + [(adapter, "weight", 1) for adapter in owner.lora_A.values()]
