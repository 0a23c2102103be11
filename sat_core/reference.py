"""The method in its plainest form: a dense model, masks instead of slices, AdamW written out. Slow, readable, the oracle.

`Sparsity` with torch's AdamW must do exactly what this does; the tests hold them together in float64. A masked unit's
output weights are multiplied by zero, so it adds nothing and its rows receive no gradient; the update then leaves its rows
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sat_core.loss import token_loss

if TYPE_CHECKING:
    from sat_core.corpus import Batch
    from sat_core.sparsity import Sparsity

Masks = dict[tuple[str, int], Tensor]
"""(kind, layer) -> bool [U], true where awake."""


def masks_of(sparsity: Sparsity) -> Masks:
    """Who is awake now."""
    masks: Masks = {}
    for block in sparsity.blocks:
        mask = torch.zeros(block.num_units, dtype=torch.bool)
        mask[block.awake_K.cpu()] = True
        masks[block.kind, block.layer] = mask
    return masks


def masked_loss(sparsity: Sparsity, masks: Masks, batch: Batch) -> Tensor:
    """Mean loss of the dense model with sleepers masked; `sparsity` only says where the units are."""
    masked = {}
    for block in sparsity.blocks:
        mask_U = masks[block.kind, block.layer]
        for part in (p for p in block.parts if p.out):
            mask = part.spread(mask_U.to(part.parameter.dtype))
            masked[f"model.{part.name}"] = part.parameter * mask
    loss: Tensor = torch.func.functional_call(_Loss(sparsity.model), masked, (batch,))
    return loss


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        found = token_loss(self.model, batch)
        return found.total / found.labels


class MaskedAdamW:
    """AdamW written out (Loshchilov and Hutter 2019), frozen where a unit sleeps.

    An asleep row keeps its weight and its second moment and loses its first; the step count is global. A row that never
    trained takes the mean second moment of the awake rows when it wakes.
    """

    def __init__(self, sparsity: Sparsity, *, learning_rate: float, weight_decay: float) -> None:
        self.sparsity, self.learning_rate, self.weight_decay = sparsity, learning_rate, weight_decay
        self.step_count = 0
        self.average = {n: torch.zeros_like(p) for n, p in sparsity.model.named_parameters()}
        self.square = {n: torch.zeros_like(p) for n, p in sparsity.model.named_parameters()}
        self.trained = {
            (b.kind, b.layer): torch.zeros(b.num_units, dtype=torch.bool) for b in sparsity.blocks
        }
        self.sliced = {
            part.name: (block, part) for block in sparsity.blocks for part in block.parts
        }

    @torch.no_grad()
    def wake(self, before: Masks, after: Masks) -> None:
        """Apply a new selection: drop the sleepers' first moment, give the untrained a second one."""
        for name, (block, part) in self.sliced.items():
            key = block.kind, block.layer
            self.average[name] *= part.spread(after[key].to(part.parameter.dtype))
            if self.step_count:
                awake = part.spread(before[key].to(part.parameter.dtype))
                square = self.square[name]
                mean = (square * awake).sum(part.dim, keepdim=True)
                mean = mean / awake.sum(part.dim, keepdim=True)
                never = part.spread(~self.trained[key])
                self.square[name] = torch.where(never, mean.expand_as(square), square)

    @torch.no_grad()
    def step(self, masks: Masks) -> None:
        """One update of the awake rows from `.grad`."""
        self.step_count += 1
        for name, parameter in self.sparsity.model.named_parameters():
            if parameter.grad is None:
                continue
            awake = torch.ones((), dtype=torch.bool)
            if name in self.sliced:
                block, part = self.sliced[name]
                awake = part.spread(masks[block.kind, block.layer])
            decay = self.weight_decay if parameter.dim() >= 2 else 0.0
            average = 0.9 * self.average[name] + 0.1 * parameter.grad
            square = 0.999 * self.square[name] + 0.001 * parameter.grad**2
            moved = parameter * (1 - self.learning_rate * decay)
            size = self.learning_rate / (1 - 0.9**self.step_count)
            root = square.sqrt() / (1 - 0.999**self.step_count) ** 0.5 + 1e-8
            parameter.copy_(torch.where(awake, moved - size * average / root, parameter))
            self.average[name] = torch.where(awake, average, self.average[name])
            self.square[name] = torch.where(awake, square, self.square[name])
        for key, mask in masks.items():
            self.trained[key] |= mask


def train_step(sparsity: Sparsity, optimizer: MaskedAdamW, batch: Batch, masks: Masks) -> float:
    """Forward, backward and update of one batch; the mean loss before the update."""
    loss = masked_loss(sparsity, masks, batch)
    torch.autograd.backward(loss)
    optimizer.step(masks)
    sparsity.model.zero_grad(set_to_none=True)
    return float(loss.detach())
