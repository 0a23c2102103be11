"""torch's own AdamW, so that rate 0 is stock training bit for bit; its moments follow their unit in `slicing`.

The road not taken is an own AdamW with a step count per unit: it is not bit-equal to torch's and a steady gradient wakes
gently enough without it (`slicing` says how). Asleep units are frozen wholly: not in the parameter, they meet neither
weight decay nor momentum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (betas .9, .999, eps 1e-8, fused) over all parameters; vectors (norms, biases) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
