"""torch's own AdamW, so that rate 0 is stock training bit for bit; its moments follow their unit in `slicing`.

The road not taken is an own AdamW with a step count per unit: it is not bit-equal to torch's and a steady gradient wakes
gently enough without it (`slicing` says how). Asleep units are frozen wholly: not in the parameter, they meet neither
weight decay nor momentum.

torchao's AdamW holds moments of eight bits in blocks that do not follow units. When units move, the moments of their
parameter are made plain, moved, and stored again in eight bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sat_core.plan.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (betas .9, .999, eps 1e-8) over what requires a gradient; vectors (norms, biases) are not decayed.

    Args:
        model: whose parameters to train.
        learning_rate: initial rate of both groups.
        weight_decay: decoupled decay of matrices.
        kind: "adamw" is torch's fused one; "adamw_8bit" is torchao's, with moments of eight bits.

    Raises:
        ConfigError: where torchao is wanted and not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "sat.train.optimizer is 'adamw_8bit', which needs the torchao library: pip install torchao.",
            "sat.train.optimizer",
            "missing_dependency",
        ) from error
    optimizer: Any = AdamW8bit(groups, lr=learning_rate)
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse one that does not train the model, or whose state cannot follow units.

    Raises:
        ConfigError: saying which.
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    stateless = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in groups)
    if any(g.get("amsgrad") or "betas" not in g for g in groups) and not stateless:
        raise ConfigError(
            f"optimizer is {kind}; allowed is AdamW or Adam without amsgrad, whose moments can follow their units."
        )
    held = {id(p) for g in groups for p in g["params"]}
    if held.isdisjoint(id(p) for p in model.parameters() if p.requires_grad):
        raise ConfigError(f"optimizer, {kind}, holds no trainable parameter of this model.")


def clip(parameters: list[nn.Parameter], limit: float, norm: torch.Tensor) -> float:
    """Scale gradients whose norm is `norm` down to `limit`; the norm as a number.

    As torch's `clip_grad_norm_`, which goes through all gradients also where its factor is 1.
    """
    found = float(norm)
    if not found + 1e-6 <= limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return found


def plain(moment: torch.Tensor) -> torch.Tensor:
    """A moment as a float tensor; itself where it is one."""
    is_plain = type(moment) is torch.Tensor
    return moment if is_plain else moment.dequantize()


def store(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """Put plain moments back in the form that the optimizer keeps for a parameter of this size."""
    new_buffer = getattr(optimizer, "_new_buffer", None)
    if new_buffer is None:
        return
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        state[key] = new_buffer(parameter, signed).copy_(state[key])
