"""The method in its plainest form: a dense model, masks instead of slices, AdamW written out. Slow, readable, the oracle.

`Sparsity` with torch's AdamW must do exactly what this does; the tests hold them together in float64. A masked unit's
output is multiplied by zero before its output projection, so it adds nothing and its rows receive no gradient; the
update then leaves its rows alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sat_core.model import Sparsity, token_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sat_core.data.corpus import Batch

Masks = dict[tuple[str, int], Tensor]
"""(kind, layer) -> bool [U], true where awake."""


@contextmanager
def masked(sparsity: Sparsity, masks: Masks) -> Iterator[None]:
    """Within, asleep units add nothing to the residual stream. `sparsity` only says where the units are."""
    hooks = []
    for block in sparsity.blocks:
        mask_U = masks[block.kind, block.layer]
        out = sparsity.family.mlp_out if block.kind == "mlp" else sparsity.family.attention_out
        module = sparsity.model.get_submodule(f"{sparsity.family.layers}.{block.layer}.{out}")

        def apply(
            _: nn.Module, args: tuple[Tensor, ...], mask_U: Tensor = mask_U
        ) -> tuple[Tensor, ...]:
            rows = args[0].shape[-1] // len(mask_U)
            return (args[0] * mask_U.repeat_interleave(rows).to(args[0].dtype), *args[1:])

        hooks.append(module.register_forward_pre_hook(apply))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
            self.average[name][self._rows(part, ~after[key])] = 0
            if self.step_count:
                awake = self.square[name][self._rows(part, before[key])]
                awake = (
                    awake.view(-1, *self._other(part))
                    if part.dim == 0
                    else awake.view(*self._other(part), -1)
                )
                mean = awake.mean(part.dim, keepdim=True)
                never = self._rows(part, ~self.trained[key])
                self.square[name] = torch.where(never, mean.expand_as(never), self.square[name])

    @torch.no_grad()
    def step(self, masks: Masks) -> None:
        """One update of the awake rows from `.grad`."""
        self.step_count += 1
        for name, parameter in self.sparsity.model.named_parameters():
            if parameter.grad is None:
                continue
            awake = torch.ones_like(parameter, dtype=torch.bool)
            if name in self.sliced:
                block, part = self.sliced[name]
                awake = self._rows(part, masks[block.kind, block.layer])
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

    def _rows(self, part: Any, mask_U: Tensor) -> Tensor:
        rows = mask_U.repeat_interleave(part.rows)
        shape = [-1 if d == part.dim else 1 for d in range(part.parameter.dim())]
        return rows.view(shape).expand_as(part.parameter)

    @staticmethod
    def _other(part: Any) -> list[int]:
        return [n for d, n in enumerate(part.parameter.shape) if d != part.dim]


def train_step(sparsity: Sparsity, optimizer: MaskedAdamW, batch: Batch, masks: Masks) -> float:
    """Forward, backward and update of one batch; the mean loss before the update."""
    with masked(sparsity, masks):
        found = token_loss(sparsity.model, batch)
        torch.autograd.backward(found.total / found.labels)
    optimizer.step(masks)
    sparsity.model.zero_grad(set_to_none=True)
    return float(found.total.detach()) / found.labels
