"""From a stock model to its sliced blocks: the parameters that carry each layer's units, found by their family's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sat_core.plan.errors import ModelError
from sat_core.plan.families import Family, ModelShape, Slice, family_of, shape_of
from sat_core.plan.resolve import refuse_impossible
from sat_core.slicing import SlicedBlock, SlicedParameter, follow

if TYPE_CHECKING:
    from collections.abc import Iterator

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
            ModelError: for a family that is not supported, or what is no causal LM.
            ConfigError: for what the model cannot do.
        """
        try:
            core: Any = model.get_base_model() if hasattr(model, "peft_config") else model
            shape = shape_of(core.config.to_dict())
            core.get_submodule(family_of(shape.model_type).layers)
        except AttributeError as error:
            raise ModelError(
                f"model is a {type(model).__name__}; allowed is a causal LM, or peft's around one (of DataParallel its `module`)."
            ) from error
        refuse_impossible(config, shape)
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
    module = anatomy.layer(layer).get_submodule(family.mlp_module)
    return SlicedBlock(
        layer,
        "mlp",
        module,
        _parts(anatomy, module, family.mlp, units),
        units,
        stretches=shape.experts,
        attributes=[(module, "intermediate_dim", 1 / shape.experts)] * (shape.experts > 1),
        asleep_on=anatomy.config.asleep_on,
    )


def attention_block(anatomy: Anatomy, layer: int) -> SlicedBlock:
    """The attention of a layer; a unit is what the config's `attention_unit` says."""
    shape, family = anatomy.shape, anatomy.family
    module = anatomy.layer(layer).get_submodule(family.attention_module)
    whole_groups = anatomy.config.attention_unit == "kv_group"
    units = shape.num_kv_heads if whole_groups else shape.num_heads
    heads = shape.heads_per_group if whole_groups else 1
    quantities: dict[str, float] = {
        "heads": heads,
        "kv_heads": 1,
        "width": heads * shape.head_dim,
        "groups": 1 / shape.num_kv_heads,
    }
    wanted = family.attributes if whole_groups else (("num_key_value_groups", "groups"),)
    return SlicedBlock(
        layer,
        "attention",
        module,
        _parts(anatomy, module, family.attention if whole_groups else family.queries, units),
        units,
        stretches=1 if whole_groups else shape.num_kv_heads,
        attributes=[(*follow(module, path), quantities[q]) for path, q in wanted],
        asleep_on=anatomy.config.asleep_on,
    )


def _parts(
    anatomy: Anatomy, module: nn.Module, slices: tuple[Slice, ...], units: int
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
    return [
        SlicedParameter(
            name=anatomy.names[id(getattr(owner, leaf))],
            parameter=getattr(owner, leaf),
            owner=owner,
            dim=dim,
            segments=tuple(rows[s] for s in item.segments),
            num_units=units,
            out=item.out,
            adapter=adapter,
            experts=shape.experts if item.experts else 1,
        )
        for item in slices
        for owner, leaf, dim, adapter in _carriers(module, item)
    ]


def _carriers(module: Any, item: Slice) -> Iterator[tuple[Any, str, int, bool]]:
    """The tensors that carry a projection's units, each with its owner, the dimension that narrows, and whether it is LoRA's.

    A weight is [out, in], Conv1D's (which alone has `nf`) [in, out]; a bias narrows with the output. peft keeps the
    projection as `base_layer`, beside `lora_A` [rank, in] and `lora_B` [out, rank].
    """
    if item.experts:
        yield module, item.name, 1 + item.out, False
        return
    projection = module.get_submodule(item.name)
    base = getattr(projection, "base_layer", projection)
    yield base, "weight", int(item.out != hasattr(base, "nf")), False
    if not item.out and base.bias is not None:
        yield base, "bias", 0, False
    if base is not projection:
        adapters = projection.lora_A if item.out else projection.lora_B
        for adapter in adapters.values():
            yield adapter, "weight", int(item.out), True
