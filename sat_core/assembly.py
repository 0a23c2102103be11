"""Model, optimizer and sparsity put together as a `TrainConfig` says; what a run holds while it lasts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sat_core.model import compile_layers, load_model, with_adapters
from sat_core.optim import build_optimizer
from sat_core.plan.errors import ConfigError
from sat_core.sharding import Sharding
from sat_core.sparsity import Sparsity

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sat_core.parallel import Parallel
    from sat_core.plan.config import TrainConfig


@dataclass
class Assembly:
    """The parts of a run.

    Attributes:
        model: stock, or a peft model around a stock one.
        tokenizer: the model's.
        optimizer: over its trained parameters.
        sparsity: its sliced blocks.
        sharding: what cuts the layers between ranks; None where every rank has all of them.
        parallel: the ranks.
        half: whether matrices are multiplied in bfloat16.
    """

    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    sparsity: Sparsity
    sharding: Sharding | None
    parallel: Parallel
    half: bool

    @property
    def device(self) -> str:
        """This rank's device, as in "cpu" or "cuda:0"."""
        return self.parallel.device

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products over float32 parameters, where the run has them."""
        kind = self.device.partition(":")[0]
        if self.half:
            _cast_experts(kind)
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.half)


@functools.cache
def _cast_experts(kind: str) -> None:
    """Tell autocast of the products that stock experts are made of, which it would leave in the parameters' precision.

    Their eager form, which it knows, makes a gradient of the size of all experts for each one. The second product is
    transformers' own, for compiled layers.
    """
    for product in ("aten::_grouped_mm", "transformers::grouped_mm_fallback"):
        torch.library.register_autocast(product, kind, torch.bfloat16)


def assemble(config: TrainConfig, parallel: Parallel, resume: Path | None) -> Assembly:
    """Load the base model, or with full tuning that of the checkpoint `resume`, and put the rest around it.

    Raises:
        PlanError: where the model or a library cannot be used, or there are more ranks than sequences in a batch.
    """
    if config.batch_size < parallel.world:
        raise ConfigError(
            f"batch_size is {config.batch_size}; with {parallel.world} processes it must be at least that many.",
            "hyperparameters.batch_size",
        )
    torch.manual_seed(config.seed)
    half = config.precision == "bf16" or (config.precision == "auto" and parallel.device != "cpu")
    shared = config.sharding == "fsdp" and parallel.world > 1
    model, tokenizer = _load(config, resume, "cpu" if shared else parallel.device)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.tuning == "lora":
        model = with_adapters(
            model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed
        )
    optimizer = build_optimizer(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        kind=config.optimizer,
    )
    sparsity = Sparsity(model, optimizer, config.sat, parallel)
    sharding = None
    if shared:
        layers: Any = sparsity.core.get_submodule(sparsity.family.layers)
        sharding = Sharding(model, layers, sparsity.blocks, parallel, half=half)
    if config.compile:
        compile_layers(sparsity.layers)
    return Assembly(model, tokenizer, optimizer, sparsity, sharding, parallel, half)


def _load(config: TrainConfig, resume: Path | None, device: str) -> tuple[Any, Any]:
    if resume and config.tuning == "full":
        return load_model(str(resume / "model"), device=device)
    revision = None if config.model_path else config.model_revision
    return load_model(config.model_path or config.model_name, revision=revision, device=device)
