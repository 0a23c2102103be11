"""Narrow a stock model in place: awake units are the model's own, smaller, Parameters; asleep ones wait here.

A Hugging Face model's weights are made narrower and its own forward runs unchanged, so every kernel, attention backend
and compile trick of the stock model works, and rate 0 is the stock model itself. The roads not taken: masks save no
arithmetic; a gather inside forward pays for itself at every micro-batch and leaves full-size gradients.

`.data` of each Parameter is swapped, the Parameter stays: optimizer and scheduler keep their references. AdamW's
moments follow their unit: `exp_avg_sq` of a sleeper is kept as it was, `exp_avg` is dropped and zero on waking, and the
global step counts, so a steady gradient wakes with updates of .10, .19, .27 of the learning rate, a ramp for nothing.
A unit that never trained takes the mean `exp_avg_sq` of the awake ones.

Axes: U units of a block, K awake units, R rows of a parameter along the dimension that narrows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class SlicedParameter:
    """One parameter and what of it is asleep.

    Attributes:
        name: full name in the model.
        parameter: holds the awake rows, [.., K * rows, ..] along `dim`.
        owner: module that carries it, whose in_features / out_features are kept true.
        dim: dimension that narrows.
        rows: rows of that dimension in one unit.
        asleep: rows of the sleeping units, in ascending unit order; None while all are awake.
        asleep_sq: their `exp_avg_sq`; None where the optimizer has not stepped yet.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    dim: int
    rows: int
    asleep: Tensor | None = None
    asleep_sq: Tensor | None = None

    def row_indices(self, units_K: Tensor) -> Tensor:
        """Rows of `units_K`, int64 [K * rows]."""
        offsets_R = torch.arange(self.rows, device=units_K.device)
        return (units_K[:, None] * self.rows + offsets_R).flatten()


@dataclass
class SlicedBlock:
    """The MLP or the attention of one layer: `num_units` units, of which `awake_K` (ascending) compute.

    Attributes:
        layer: 0-based layer.
        kind: "mlp" or "attention".
        module: the submodule whose forward uses these parameters and no other block's.
        parts: its sliced parameters.
        trained_U: bool [U], units that were awake in an optimizer step.
    """

    layer: int
    kind: str
    module: nn.Module
    parts: list[SlicedParameter]
    num_units: int
    awake_K: Tensor = field(init=False)
    trained_U: Tensor = field(init=False)
    _narrow: list[Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        device = self.parts[0].parameter.device
        self.awake_K = torch.arange(self.num_units, device=device)
        self.trained_U = torch.zeros(self.num_units, dtype=torch.bool, device=device)

    @property
    def num_awake(self) -> int:
        """K."""
        return len(self.awake_K)

    @property
    def asleep_units(self) -> Tensor:
        """Ascending units that sleep, int64 [U - K]."""
        return _complement(self.awake_K, self.num_units)

    @torch.no_grad()
    def refresh(self, awake_K: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Merge and part anew, weights and moments alike; only between optimizer steps.

        Args:
            awake_K: units to be awake, int64 [K], distinct, in [0, U).
            optimizer: AdamW over the model's parameters, whose moments move with their units.

        Raises:
            ValueError: for indices that are not distinct units of this block.
            RuntimeError: while a gradient exists, or while the block is widened.
        """
        awake_K = awake_K.to(self.awake_K.device).sort().values
        if (
            len(awake_K) < 1
            or awake_K[0] < 0
            or awake_K[-1] >= self.num_units
            or bool((awake_K.diff() < 1).any())
        ):
            raise ValueError(
                f"awake units must be distinct and in [0, {self.num_units}); got {awake_K.tolist()}"
            )
        if self._narrow is not None or any(part.parameter.grad is not None for part in self.parts):
            raise RuntimeError(
                "refresh between optimizer steps only: a gradient exists or a probe is running"
            )
        states = [optimizer.state.get(part.parameter) if optimizer else None for part in self.parts]
        if any(states):
            self.trained_U[self.awake_K] = True
        if torch.equal(awake_K, self.awake_K):
            return
        sleepers = _complement(awake_K, self.num_units)
        for part, state in zip(self.parts, states, strict=True):
            if state:
                self._move_moments(part, state, awake_K, sleepers)
            full = self.dense(part)
            awake, part.asleep = _part(part, full, awake_K, sleepers)
            _replace(part.parameter, awake)
            _state_features(part)
        self.awake_K = awake_K

    def dense(self, part: SlicedParameter) -> Tensor:
        """The full parameter, awake and asleep rows in their places; the parameter's own tensor while all are awake."""
        if self._narrow is not None:
            return part.parameter.data
        return self._merge(part, part.parameter.data, part.asleep)

    def dense_moments(self, part: SlicedParameter, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`exp_avg` (zero where asleep) and `exp_avg_sq` of the full parameter."""
        average, square = state["exp_avg"], state["exp_avg_sq"]
        if part.asleep is None:
            return average, square
        asleep_sq = torch.zeros_like(part.asleep) if part.asleep_sq is None else part.asleep_sq
        return self._merge(part, average, torch.zeros_like(part.asleep)), self._merge(
            part, square, asleep_sq
        )

    @torch.no_grad()
    def widen(self) -> None:
        """Put the full weights in place for a forward without gradient; `narrow` undoes it."""
        if self.num_awake == self.num_units or self._narrow is not None:
            return
        full = [self.dense(part) for part in self.parts]
        self._narrow = [part.parameter.data for part in self.parts]
        for part, tensor in zip(self.parts, full, strict=True):
            part.parameter.data = tensor

    def narrow(self) -> None:
        """Put the awake rows back after `widen`."""
        if self._narrow is None:
            return
        for part, tensor in zip(self.parts, self._narrow, strict=True):
            part.parameter.data = tensor
        self._narrow = None

    def _merge(self, part: SlicedParameter, awake: Tensor, asleep: Tensor | None) -> Tensor:
        if self.num_awake == self.num_units:
            return awake
        if asleep is None:
            raise AssertionError("units sleep, but their rows are nowhere")
        size = list(awake.shape)
        size[part.dim] = self.num_units * part.rows
        full = awake.new_empty(size)
        full.index_copy_(part.dim, part.row_indices(self.awake_K), awake)
        return full.index_copy_(part.dim, part.row_indices(self.asleep_units), asleep)

    def _move_moments(
        self, part: SlicedParameter, state: dict[str, Any], awake_K: Tensor, sleepers: Tensor
    ) -> None:
        average, square = state["exp_avg"], state["exp_avg_sq"]
        kept = (
            average
            if part.asleep is None
            else self._merge(part, average, torch.zeros_like(part.asleep))
        )
        state["exp_avg"] = kept.index_select(part.dim, part.row_indices(awake_K))
        full = self._merge(part, square, self._asleep_square(part, square))
        state["exp_avg_sq"], part.asleep_sq = _part(part, full, awake_K, sleepers)

    def _asleep_square(self, part: SlicedParameter, square: Tensor) -> Tensor | None:
        """Second moments of the sleepers; those that never trained get the mean over the awake ones."""
        if part.asleep is None:
            return None
        never = ~self.trained_U[self.asleep_units]
        kept = part.asleep_sq
        if kept is None or bool(never.any()):
            mean = square.mean(part.dim, keepdim=True).expand_as(part.asleep)
            rows = never.repeat_interleave(part.rows)
            shape = [-1 if d == part.dim else 1 for d in range(square.dim())]
            kept = mean.clone() if kept is None else torch.where(rows.view(shape), mean, kept)
        return kept


def _complement(units_K: Tensor, num_units: int) -> Tensor:
    mask_U = torch.ones(num_units, dtype=torch.bool, device=units_K.device)
    mask_U[units_K] = False
    return mask_U.nonzero().flatten()


def _part(
    part: SlicedParameter, full: Tensor, awake_K: Tensor, sleepers: Tensor
) -> tuple[Tensor, Tensor | None]:
    if len(sleepers) == 0:
        return full, None
    awake = full.index_select(part.dim, part.row_indices(awake_K))
    return awake, full.index_select(part.dim, part.row_indices(sleepers))


def _replace(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Swap `.data`, and with it the gradient accumulator.

    A loss that somebody still holds keeps the old accumulator alive, and with it the old shape; torch forgets it only when
    the type changes, so the type changes for a moment.
    """
    parameter.data = tensor.new_empty(
        0, dtype=torch.float16 if tensor.dtype != torch.float16 else torch.float32
    )
    parameter.data = tensor


def _state_features(part: SlicedParameter) -> None:
    if isinstance(part.owner, nn.Linear):
        part.owner.out_features, part.owner.in_features = part.owner.weight.shape
