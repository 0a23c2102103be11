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

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sat_core.optim import plain, store
from sat_core.plan.errors import ModelError, PlanError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class SlicedParameter:
    """One parameter and what of it is asleep.

    Attributes:
        name: full name in the model.
        parameter: holds the awake rows along `dim`.
        owner: the module that carries it, whose in_features / out_features are kept true.
        dim: dimension that narrows.
        segments: rows of each unit in each stretch of that dimension; stretches follow each other.
        num_units: units of the full parameter.
        out: whether it reads the units' values, as the projection back into the residual stream does.
        adapter: whether it is LoRA's, beside the projection's own.
        experts: size of the leading dimension of experts, 1 where there is none; units then count over all experts.
        asleep: rows of the sleeping units, in ascending unit order; None while all are awake.
        asleep_sq: their `exp_avg_sq`; None where the optimizer has not stepped yet.
    """

    name: str
    parameter: nn.Parameter
    owner: Any
    dim: int
    segments: tuple[int, ...]
    num_units: int
    out: bool = False
    adapter: bool = False
    experts: int = 1
    asleep: Tensor | None = None
    asleep_sq: Tensor | None = None

    def rows(self, units_K: Tensor) -> Tensor:
        """Rows of ascending `units_K` in the full parameter, int64 [R]; [E, R / E] where there are experts."""
        per_expert = self.num_units // self.experts
        local_EK = units_K.view(self.experts, -1) % per_expert
        stretches, first = [], 0
        for size in self.segments:
            offsets_R = torch.arange(size, device=units_K.device)
            rows_EKR = first + local_EK[..., None] * size + offsets_R
            stretches.append(rows_EKR.flatten(1))
            first += per_expert * size
        rows_ER = torch.cat(stretches, dim=1)
        return rows_ER if self.experts > 1 else rows_ER[0]

    def take(self, full: Tensor, units_K: Tensor) -> Tensor:
        """Rows of `units_K`, copied out of a tensor of the full parameter's size."""
        rows = self.rows(units_K.to(full.device))
        if self.experts == 1:
            return full.index_select(self.dim, rows)
        picked = [t.index_select(self.dim - 1, r) for t, r in zip(full, rows, strict=True)]
        return torch.stack(picked)

    def put(self, full: Tensor, units_K: Tensor, values: Tensor) -> None:
        """Write the rows of `units_K` into a tensor of the full parameter's size."""
        rows = self.rows(units_K.to(full.device))
        values = values.to(full.device, non_blocking=True)
        if self.experts == 1:
            full.index_copy_(self.dim, rows, values)
            return
        for t, r, v in zip(full, rows, values, strict=True):
            t.index_copy_(self.dim - 1, r, v)

    def spread(self, values_U: Tensor) -> Tensor:
        """A value for each unit, laid along the parameter's rows so that it broadcasts against the full parameter."""
        values_EU = values_U.view(self.experts, -1)
        rows_ER = torch.cat([values_EU.repeat_interleave(s, dim=1) for s in self.segments], dim=1)
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        if self.experts > 1:
            shape[0] = self.experts
        return rows_ER.reshape(shape)

    def unit_rows(self, full: Tensor) -> list[Tensor]:
        """The full parameter as one matrix [U, rows * rest] for each segment."""
        moved = full.movedim(self.dim, 0 if self.experts == 1 else 1)
        moved = moved.reshape(self.experts, moved.shape[self.experts > 1], -1)
        sizes = [s * self.num_units // self.experts for s in self.segments]
        return [stretch.reshape(self.num_units, -1) for stretch in torch.split(moved, sizes, dim=1)]


class Shards(Protocol):
    """Ranks that hold a slice of every unit each; `sat_core.sharding.Sharding` is one."""

    def gather(self, part: SlicedParameter, local: Tensor) -> Tensor: ...  # noqa: D102
    def cut(self, part: SlicedParameter, full: Tensor) -> Tensor: ...  # noqa: D102
    def spread(self, part: SlicedParameter, local: Tensor) -> Tensor: ...  # noqa: D102
    def kept(self, full: Tensor) -> Tensor: ...  # noqa: D102
    def show(self, block: SlicedBlock) -> None: ...  # noqa: D102
    def hide(self, block: SlicedBlock) -> None: ...  # noqa: D102


@dataclass
class SlicedBlock:
    """The MLP or the attention of one layer: `num_units` units, of which `awake_K` (ascending) compute.

    Attributes:
        layer: 0-based layer.
        kind: "mlp" or "attention".
        module: the submodule whose forward uses these parameters and no other block's.
        parts: its sliced parameters.
        num_units: U; consecutive stretches of U / `stretches` units (one a KV group, or one an expert) have equally many
            awake.
        attributes: (owner, attribute, value per awake unit) that the stock forward reads and that must follow the width.
        asleep_on: device where sleepers wait.
        trained_U: bool [U], units that were awake in an optimizer step.
        score_U: float32 [U], the last scores; None before the first.
        shards: the ranks that share it; None where this process has all of it.
    """

    layer: int
    kind: str
    module: nn.Module
    parts: list[SlicedParameter]
    num_units: int
    stretches: int = 1
    attributes: list[tuple[Any, str, float]] = field(default_factory=list)
    asleep_on: str = "device"
    awake_K: Tensor = field(init=False)
    trained_U: Tensor = field(init=False)
    score_U: Tensor | None = field(default=None, init=False)
    shards: Shards | None = field(default=None, init=False)
    _narrow: list[Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for part in self.parts:
            rows = part.parameter.shape[part.dim]
            full = sum(part.segments) * part.num_units // part.experts
            if rows != full:
                raise ModelError(
                    f"{part.name} has {rows} rows, {full} by its config: narrow since an earlier sparsify, whose wake_all() widens it."
                )
        device = self.parts[0].parameter.device
        self.awake_K = torch.arange(self.num_units, device=device)
        self.trained_U = torch.zeros(self.num_units, dtype=torch.bool, device=device)

    @property
    def num_awake(self) -> int:
        """K."""
        return len(self.awake_K)

    @property
    def widened(self) -> bool:
        """Whether the full weights are in place for a probe or an evaluation."""
        return self._narrow is not None

    @property
    def out(self) -> SlicedParameter:
        """The projection back into the residual stream."""
        return next(part for part in self.parts if part.out)

    @property
    def asleep_units(self) -> Tensor:
        """Ascending units that sleep, int64 [U - K]."""
        return _complement(self.awake_K, self.num_units)

    @torch.no_grad()
    def refresh(
        self,
        awake_K: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stepped: bool = True,
    ) -> None:
        """Merge and part anew, weights and moments alike; only between optimizer steps.

        Args:
            awake_K: units to be awake, int64 [K], distinct, in [0, U), equally many in each stretch.
            optimizer: AdamW over the model's parameters, whose moments move with their units.
            stepped: whether the units that were awake until now were in an optimizer step.

        Raises:
            ValueError: for indices that are not such units of this block.
            RuntimeError: while a gradient exists, or while the block is widened.
        """
        awake_K = awake_K.to(self.awake_K.device).sort().values
        self._check(awake_K)
        states = [optimizer.state.get(part.parameter) if optimizer else None for part in self.parts]
        if stepped and any(states):
            self.trained_U[self.awake_K] = True
        if torch.equal(awake_K, self.awake_K):
            return
        sleepers = _complement(awake_K, self.num_units)
        for part, state in zip(self.parts, states, strict=True):
            if state:
                self._move_moments(part, state, awake_K, sleepers)
            full = self.dense(part)
            part.asleep = self._waiting(part.take(full, sleepers)) if len(sleepers) else None
            awake = part.take(full, awake_K) if len(sleepers) else full
            _replace(part.parameter, awake)
            if state and optimizer:
                store(optimizer, part.parameter, state)
        self.awake_K = awake_K
        self.tell_width()

    def wake(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """`refresh` with all units."""
        self.refresh(torch.arange(self.num_units), optimizer)

    def dense(self, part: SlicedParameter) -> Tensor:
        """The full parameter, awake and asleep rows in their places; the parameter's own tensor while all are awake.

        Where ranks share the block it is this rank's slice; `whole` is all of it.
        """
        if self._narrow is not None:
            return part.parameter.data
        return self._merge(part, part.parameter.data, part.asleep)

    def whole(self, part: SlicedParameter) -> Tensor:
        """The full parameter from all ranks, which must all ask; `dense` where there is but this one."""
        full = self.dense(part)
        return full if self.shards is None or self.widened else self.shards.gather(part, full)

    def dense_moments(self, part: SlicedParameter, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`exp_avg` (zero where asleep) and `exp_avg_sq` of the full parameter."""
        average, square = plain(state["exp_avg"]), plain(state["exp_avg_sq"])
        if part.asleep is None:
            return average, square
        nothing = torch.zeros_like(part.asleep)
        asleep_sq = nothing if part.asleep_sq is None else part.asleep_sq
        return self._merge(part, average, nothing), self._merge(part, square, asleep_sq)

    @torch.no_grad()
    def widen(self) -> None:
        """Put the full weights in place for a forward without gradient; `narrow` undoes it."""
        if self._narrow is not None or (self.num_awake == self.num_units and not self.shards):
            return
        full = [self.whole(part) for part in self.parts]
        self._narrow = [part.parameter.data for part in self.parts]
        for part, tensor in zip(self.parts, full, strict=True):
            _replace(part.parameter, tensor)
        if self.shards:
            self.shards.show(self)
        self.tell_width()

    def narrow(self) -> None:
        """Put the awake rows back after `widen`."""
        if self._narrow is None:
            return
        for part, tensor in zip(self.parts, self._narrow, strict=True):
            _replace(part.parameter, tensor)
        self._narrow = None
        if self.shards:
            self.shards.hide(self)
        self.tell_width()

    def tell_width(self) -> None:
        """Make attributes that the stock forward reads as wide as the parameters are."""
        num_units = self.num_units if self.widened else self.num_awake
        for owner, name, per_unit in self.attributes:
            setattr(owner, name, round(num_units * per_unit))
        for owner in {id(part.owner): part.owner for part in self.parts}.values():
            if isinstance(owner, nn.Linear):
                owner.out_features, owner.in_features = owner.weight.shape
            elif hasattr(owner, "nf"):
                owner.nx, owner.nf = owner.weight.shape

    def _check(self, awake_K: Tensor) -> None:
        good = len(awake_K) > 0 and int(awake_K[0]) >= 0 and int(awake_K[-1]) < self.num_units
        if not good or bool((awake_K.diff() < 1).any()):
            raise ValueError(
                f"awake units must be distinct and in [0, {self.num_units}); got {awake_K.tolist()}"
            )
        counts = (awake_K // (self.num_units // self.stretches)).bincount(minlength=self.stretches)
        if bool((counts != counts[0]).any()):
            raise ValueError(
                f"equally many units must be awake in each of {self.stretches} stretches; got {counts.tolist()}"
            )
        if self._narrow is not None or any(part.parameter.grad is not None for part in self.parts):
            raise RuntimeError(
                "refresh between optimizer steps only, once a step and after zero_grad: a gradient exists or a probe is running"
            )

    def _waiting(self, rows: Tensor) -> Tensor:
        """Sleepers' rows where they wait."""
        if self.asleep_on == "device":
            return rows
        host = rows.cpu()
        return host.pin_memory() if rows.is_cuda else host

    def _merge(self, part: SlicedParameter, awake: Tensor, asleep: Tensor | None) -> Tensor:
        if asleep is None:
            return awake
        size = list(awake.shape)
        size[part.dim] = size[part.dim] * self.num_units // self.num_awake
        full = awake.new_empty(size)
        part.put(full, self.awake_K, awake)
        part.put(full, self.asleep_units, asleep)
        return full

    def _move_moments(
        self, part: SlicedParameter, state: dict[str, Any], awake_K: Tensor, sleepers: Tensor
    ) -> None:
        average, square = plain(state["exp_avg"]), plain(state["exp_avg_sq"])
        if part.asleep is not None:
            average = self._merge(part, average, torch.zeros_like(part.asleep))
            asleep_sq = self._asleep_square(part, part.asleep, square)
            square = self._merge(part, square, asleep_sq)
        state["exp_avg"] = part.take(average, awake_K)
        state["exp_avg_sq"] = part.take(square, awake_K) if len(sleepers) else square
        part.asleep_sq = self._waiting(part.take(square, sleepers)) if len(sleepers) else None

    def _asleep_square(self, part: SlicedParameter, asleep: Tensor, square: Tensor) -> Tensor:
        """Second moments of the sleepers; those that never trained get the mean over the awake ones."""
        kept = part.asleep_sq
        never_U = ~self.trained_U
        if kept is None or bool(never_U[self.asleep_units].any()):
            mean = square.mean(part.dim, keepdim=True).to(asleep.device).expand_as(asleep)
            never = part.take(part.spread(never_U), self.asleep_units).to(asleep.device)
            kept = mean.clone() if kept is None else torch.where(never, mean, kept)
        return kept


@contextmanager
def moving() -> Iterator[None]:
    """Within, lack of memory leaves blocks half moved, so that it is no step to try again but the end of the run.

    Raises:
        PlanError: with code out_of_memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(
            f"Memory ran out while units were put to sleep or woken: {error}. The model in memory is lost, the last "
            "checkpoint is not. Less is needed with sat.asleep_on 'host', where it is not that already.",
            "sat.asleep_on",
            "out_of_memory",
        ) from error


def follow(module: nn.Module, path: str) -> tuple[Any, str]:
    """Owner and name of an attribute below `module`; a config on the way is made this module's own copy."""
    owner: Any = module
    *steps, name = path.split(".")
    for step in steps:
        own = copy.copy(getattr(owner, step))
        setattr(owner, step, own)
        owner = own
    return owner, name


def _complement(units_K: Tensor, num_units: int) -> Tensor:
    mask_U = torch.ones(num_units, dtype=torch.bool, device=units_K.device)
    mask_U[units_K] = False
    return mask_U.nonzero().flatten()


def _replace(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Swap `.data`, and with it the gradient accumulator.

    A loss that somebody still holds keeps the old accumulator alive, and with it the old shape; torch forgets it only when
    the type changes, so the type changes for a moment. Autocast keeps half-precision copies by Parameter, whatever its data.
    """
    torch.clear_autocast_cache()
    parameter.data = tensor.new_empty(
        0, dtype=torch.float16 if tensor.dtype != torch.float16 else torch.float32
    )
    parameter.data = tensor
