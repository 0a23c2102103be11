"""A stock model, loaded with suspicion, and the blocks of it that can sleep.

model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
sparsity = Sparsity(model, optimizer)
sparsity.select(mlp_rate=0.5, attention_rate=0.0, batch=batch, step=t)   # between optimizer steps
...                                                                       # your own loop, on a narrower model
sparsity.wake_all()                                                       # and the dense model is back
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from sat_core import importance
from sat_core.data.corpus import IGNORED_LABEL, Batch
from sat_core.data.tokenizer import load_tokenizer
from sat_core.plan.accounting import Widths
from sat_core.plan.errors import ModelError
from sat_core.plan.families import family_of, shape_of
from sat_core.plan.schedule import awake_units, layer_rates
from sat_core.selection import top_k
from sat_core.slicing import SlicedBlock, SlicedParameter

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_model(path: str, *, revision: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Model (float32, sdpa attention, train mode) and tokenizer; safetensors only, no remote code.

    Raises:
        ModelError: where the folder or the hub name cannot be loaded whole: no tensor missing, misshapen or not finite.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        shape_of(config.to_dict())
        tokenizer = load_tokenizer(path, revision=revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"The model {path} cannot be loaded: {type(error).__name__}: {error}", "model"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"The model's weights lack {', '.join(missing[:3])} ({len(missing)} in all).", "model"
        )
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ModelError(
            f"The model's weights hold NaN or infinity in {', '.join(broken[:3])}.", "model"
        )
    model.config.use_cache = False
    return model.to(device).train(), tokenizer


class TokenLoss(NamedTuple):
    """Loss of one batch.

    Attributes:
        total: summed cross-entropy, float32 scalar with gradient.
        correct: labels predicted right, int64 scalar.
        labels: labels counted.
        positions: positions for which logits were computed.
    """

    total: Tensor
    correct: Tensor
    labels: int
    positions: int


def token_loss(model: Any, batch: Batch) -> TokenLoss:
    """Cross-entropy of each labelled token given those before it.

    Logits are computed only for columns in which some row has a label: exact, and in supervised data much of the head.
    """
    targets_BT = batch.labels_BT[:, 1:]
    columns = (targets_BT != IGNORED_LABEL).any(0).nonzero().flatten()
    logits_BCV = model(
        input_ids=batch.input_ids_BT, logits_to_keep=columns, use_cache=False
    ).logits.float()
    targets_N, logits_NV = targets_BT[:, columns].flatten(), logits_BCV.flatten(0, 1)
    total = functional.cross_entropy(
        logits_NV, targets_N, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    labelled = targets_N != IGNORED_LABEL
    correct = ((logits_NV.detach().argmax(-1) == targets_N) & labelled).sum()
    return TokenLoss(total, correct, int(labelled.sum()), len(targets_N))


class Sparsity:
    """Which units of a model are awake."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer | None = None, *, multiple: int = 8
    ) -> None:
        """Describe the blocks of `model`; nothing sleeps yet.

        Args:
            model: a causal LM of a supported family.
            optimizer: AdamW over its parameters, whose moments will follow.
            multiple: awake MLP channels are rounded to a multiple of this (8 on a CPU, 128 on a GPU).

        Raises:
            ModelError: for an unsupported family.
        """
        self.model, self.optimizer, self.multiple = model, optimizer, multiple
        self.shape = shape_of(model.config.to_dict())
        self.family = family_of(self.shape.model_type)
        self.mlp = [self._block(i, "mlp") for i in range(self.shape.num_layers)]
        self.attention = [self._block(i, "attention") for i in range(self.shape.num_layers)]

    @property
    def blocks(self) -> list[SlicedBlock]:
        """All blocks, MLP first."""
        return [*self.mlp, *self.attention]

    @property
    def widths(self) -> Widths:
        """Awake units over all layers."""
        return Widths(
            mlp_channels=sum(b.num_awake for b in self.mlp),
            kv_groups=sum(b.num_awake for b in self.attention),
        )

    def realised_rates(self) -> tuple[float, float]:
        """Mean omission rate of MLP channels and of KV groups as they are."""
        return tuple(
            1 - sum(b.num_awake for b in blocks) / sum(b.num_units for b in blocks)
            for blocks in (self.mlp, self.attention)
        )  # type: ignore[return-value]

    def select(
        self,
        *,
        mlp_rate: float,
        attention_rate: float,
        batch: Batch,
        step: int,
        share: float = 1.0,
        allotment: str = "exempt",
        metric: str = "activation",
        seed: int = 0,
    ) -> None:
        """Choose anew which units are awake: `share` times each layer's rate sleeps, the lowest scores first."""
        layers = self.shape.num_layers
        wanted = [
            awake_units(self.shape.intermediate, share * r, self.multiple)
            for r in layer_rates(mlp_rate, layers, allotment)
        ]
        wanted += [
            awake_units(self.shape.num_kv_heads, share * r, 1)
            for r in layer_rates(attention_rate, layers, allotment)
        ]
        chosen = [(b, k) for b, k in zip(self.blocks, wanted, strict=True) if k < b.num_units]
        scores = self.scores([b for b, _ in chosen], batch, metric=metric, step=step, seed=seed)
        awake = {id(b): top_k(s, k) for (b, k), s in zip(chosen, scores, strict=True)}
        for block in self.blocks:
            block.refresh(awake.get(id(block), torch.arange(block.num_units)), self.optimizer)

    def wake_all(self) -> None:
        """Back to the dense model."""
        for block in self.blocks:
            if block.num_awake < block.num_units:
                block.refresh(torch.arange(block.num_units), self.optimizer)

    def scores(
        self, blocks: list[SlicedBlock], batch: Batch, *, metric: str, step: int, seed: int
    ) -> list[Tensor]:
        """Importance of every unit of `blocks`, float32 [U] each; one dense forward unless the metric is `uniform`."""
        if metric == "uniform" or not blocks:
            return [
                importance.uniform(b.num_units, seed=seed, step=step, layer=b.layer, kind=b.kind)
                for b in blocks
            ]
        found: dict[int, Tensor] = {}
        valid_BT = (
            torch.arange(batch.input_ids_BT.shape[1], device=batch.lengths_B.device)
            < batch.lengths_B[:, None]
        )
        hooks = [h for b in blocks for h in self._probe_hooks(b, valid_BT, metric, found)]
        try:
            with torch.no_grad(), self.dense_forward():
                self.model(input_ids=batch.input_ids_BT, logits_to_keep=1, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[id(b)] for b in blocks]

    @contextmanager
    def dense_forward(self) -> Iterator[None]:
        """Within, a forward without gradient is that of the dense model, widened one block at a time."""
        hooks = []
        for block in self.blocks:
            hooks.append(
                block.module.register_forward_pre_hook(lambda *_, b=block: b.widen(), prepend=True)
            )
            hooks.append(
                block.module.register_forward_hook(lambda *_, b=block: b.narrow(), always_call=True)
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in self.blocks:
                block.narrow()

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The dense model's state dict; tensors that are not sliced are the model's own."""
        state = dict(self.model.state_dict())
        for block in self.blocks:
            state.update({part.name: block.dense(part) for part in block.parts})
        return state

    def _block(self, layer: int, kind: str) -> SlicedBlock:
        family, shape = self.family, self.shape
        module = self.model.get_submodule(f"{family.layers}.{layer}")
        rows = {
            "channel": 1,
            "head": shape.head_dim,
            "group": shape.head_dim * shape.heads_per_group,
        }
        parts = []
        for item in family.mlp if kind == "mlp" else family.attention:
            path, _, leaf = item.name.rpartition(".")
            owner = module.get_submodule(path)
            parameter: Any = getattr(owner, leaf, None)
            if parameter is None and item.optional:
                continue
            name = f"{family.layers}.{layer}.{item.name}"
            parts.append(SlicedParameter(name, parameter, owner, item.dim, rows[item.per]))
        units = shape.intermediate if kind == "mlp" else shape.num_kv_heads
        inner = module.get_submodule(
            family.mlp_module if kind == "mlp" else family.attention_module
        )
        return SlicedBlock(layer, kind, inner, parts, units)

    def _probe_hooks(
        self, block: SlicedBlock, valid_BT: Tensor, metric: str, found: dict[int, Tensor]
    ) -> list[Any]:
        """Hooks that see the widened block: `dense_forward` registers before (`prepend`) and after these."""
        layer = self.model.get_submodule(f"{self.family.layers}.{block.layer}")
        out = layer.get_submodule(
            self.family.mlp_out if block.kind == "mlp" else self.family.attention_out
        )

        def at_output(module: Any, args: tuple[Tensor, ...]) -> None:
            found[id(block)] = importance.activation(
                args[0][valid_BT], module.weight, block.num_units
            )

        def at_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean_H = args[0][valid_BT].mean(0)
            weights = [part.parameter.data for part in block.parts if part.name.endswith("weight")]
            if block.kind == "mlp":
                gate, up, down = weights
                found[id(block)] = importance.maxip_mlp(mean_H, gate, up, down, block.module.act_fn)  # type: ignore[arg-type]
            else:
                *inputs, output = weights
                found[id(block)] = importance.maxip_attention(
                    mean_H, inputs, output, block.num_units
                )

        if metric == "activation":
            return [out.register_forward_pre_hook(at_output)]
        return [block.parts[0].owner.register_forward_pre_hook(at_input)]
