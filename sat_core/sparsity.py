"""Which units of a model are awake: the method, as something a person's own loop can hold.

    sparsity = sparsify(model, optimizer, SatConfig(total_steps=1000, mlp_rate=0.5))
    for step, batch in enumerate(batches):
        sparsity.begin_step(step, batch)       # between optimizer steps: maybe probe, select, narrow or widen
        ...                                    # your own forward, backward and optimizer step
    sparsity.wake_all()                        # and the dense model is back

A step begins by asking the ladder for its share of the omission rate. Where a stage of the ladder begins the rate is
allotted to the layers anew; there, and every `refresh_every` steps inside a stage, units are scored and chosen anew.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sat_core import importance
from sat_core.allotment import Curve
from sat_core.blocks import Anatomy, attention_block, mlp_block
from sat_core.optim import check_optimizer
from sat_core.parallel import Parallel
from sat_core.pieces import out_rows, probe_grid, weight_score
from sat_core.plan.accounting import Widths, unit_cost
from sat_core.plan.config import GRADIENT_METRICS, SatConfig
from sat_core.plan.quote import probe_passes
from sat_core.plan.schedule import CPU_WIDTH_MULTIPLE, GPU_WIDTH_MULTIPLE
from sat_core.probe import Inputs, Probe, Seen
from sat_core.selection import select
from sat_core.slicing import SlicedBlock, moving
from sat_core.widths import stage_widths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sat_core.plan.families import Family


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What `begin_step` changed.

    Attributes:
        share: share of the full omission rate from this step on.
        stage_begins: whether the rate was allotted anew, not only the choice made anew.
        dense_loss: mean loss of the probe's batch on the dense model, nats; None where no probe ran.
        passes: forwards' worth of FLOPs that the probe spent on the batch.
        errors: (kind, layer) -> (omission rate, cost) pairs, where the rate was allotted by sensitivity.
        churn: by `id` of each block that was chosen anew, share of its awake units that slept before.
    """

    share: float
    stage_begins: bool
    dense_loss: float | None = None
    passes: int = 0
    errors: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)
    churn: dict[int, float] = field(default_factory=dict)


def sparsify(
    model: Any, optimizer: torch.optim.Optimizer | None = None, config: SatConfig | None = None
) -> Sparsity:
    """The blocks of `model`, a stock causal LM of a supported family or a peft model around one; nobody sleeps yet.

    `optimizer` is an AdamW over its parameters, whose moments will follow their units.

    Raises:
        ModelError: for a family that is not supported, or a model that is narrow already.
        ConfigError: for what the model cannot do, or an optimizer whose state cannot follow its units.
    """
    return Sparsity(model, optimizer, config or SatConfig(total_steps=1))


class Sparsity:
    """The sliced blocks of a model, and the choice of who is awake."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer | None,
        config: SatConfig,
        parallel: Parallel | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.parallel = parallel or Parallel()
        if optimizer is not None:
            check_optimizer(optimizer, model)
        self.anatomy = Anatomy.of(model, config)
        self.core, self.shape = self.anatomy.core, self.anatomy.shape
        self.family: Family = self.anatomy.family
        # Layers that several GPUs will share are cut while they are still in the host's memory.
        on_gpu = next(model.parameters()).is_cuda or (
            self.parallel.world > 1 and self.parallel.device != "cpu"
        )
        self.multiple = config.multiple or (GPU_WIDTH_MULTIPLE if on_gpu else CPU_WIDTH_MULTIPLE)
        layers = range(self.shape.num_layers)
        self.mlp = [mlp_block(self.anatomy, i) for i in layers]
        self.attention = (
            [] if self.shape.whole_heads else [attention_block(self.anatomy, i) for i in layers]
        )
        self.share, self.cap = 0.0, 1.0
        self.bias: dict[int, Tensor] = {}
        if config.compensation:
            for block in self.blocks:
                block.out.owner.register_forward_hook(self._compensate(block))

    @property
    def blocks(self) -> list[SlicedBlock]:
        """All blocks, MLP first."""
        return [*self.mlp, *self.attention]

    @property
    def widths(self) -> Widths:
        """Awake units over all layers."""
        shape = self.shape
        dense = Widths.dense(shape)
        awake = sum(b.num_awake for b in self.attention)
        groups, heads = dense.kv_groups, dense.query_heads
        if self.attention and self.config.attention_unit == "kv_group":
            groups, heads = awake, awake * shape.heads_per_group
        elif self.attention:
            heads = awake
        channels = sum(b.num_awake for b in self.mlp) // shape.experts
        return Widths(mlp_channels=channels, kv_groups=groups, query_heads=heads)

    def realised_rates(self) -> tuple[float, float]:
        """Mean omission rate of MLP channels and of attention units as they are."""
        return _rate(self.mlp), _rate(self.attention)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer of the model."""
        return self.anatomy.layer(index)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return [self.layer(i) for i in range(self.shape.num_layers)]

    def begin_step(self, step: int, inputs: Inputs) -> Refresh | None:
        """Follow the ladder to 0-based `step`; None where nothing was to be done.

        Args:
            step: of the optimizer; the same step gives the same choice.
            inputs: a training micro-batch for the probe, a `Batch` or the model's own keyword arguments.

        Raises:
            ConfigError: for a step outside the run.
            RuntimeError: while a gradient exists.
        """
        phase = self.config.ladder.phase_at(step)
        share = min(phase.share, self.cap)
        stage_begins = share != self.share
        every = self.config.refresh_every
        due = bool(every and share > 0 and (step - phase.first_step) % every == 0)
        if not self.config.sparse or not (stage_begins or due):
            return None
        if share == 0:
            self.wake_all()
            self.share = share
            return Refresh(share=0.0, stage_begins=True)
        made = self.choose(step, inputs, share=share, allot_anew=stage_begins)
        self.share = made.share
        return made

    def choose(
        self, step: int, inputs: Inputs, *, share: float = 1.0, allot_anew: bool = True
    ) -> Refresh:
        """Score all units that may sleep and choose anew: `share` times the mean rates sleeps, the lowest scores first.

        Without `allot_anew` every block keeps its width and changes who is awake.
        """
        config = self.config
        rates = {"mlp": config.mlp_rate * share, "attention": config.attention_rate * share}
        by_errors = config.allotment == "sensitivity" and allot_anew
        chosen = [
            b
            for b in self.blocks
            if (config.pooled or rates[b.kind] > 0 if allot_anew else b.num_awake < b.num_units)
        ]
        probe = Probe(self, chosen, step, with_errors=by_errors)
        probed = bool(chosen) and probe_passes(config, self.shape, stage_begins=allot_anew) > 0
        if probed:
            probe.run(inputs)
            self._agree(probe)
        else:
            for b in chosen:
                score = weight_score(b, config.metric, seed=config.seed, step=step)
                probe.seen[id(b)] = Seen(score)
        if self.parallel.any(not probe.finite):
            # The model no longer computes numbers: dense, where the guard of the step will see it too.
            self.finish_dense()
            share, chosen, by_errors = 0.0, [], False
        curves = (
            {id(b): self._curve(b, probe.seen[id(b)].errors) for b in chosen} if by_errors else {}
        )
        widths = stage_widths(config, chosen, curves, share, self.multiple) if allot_anew else {}
        with moving():
            churn = {
                id(b): self._refresh(b, probe.seen[id(b)], widths.get(id(b), b.num_awake), step)
                for b in chosen
            }
            for block in self.blocks:
                if id(block) not in churn:
                    block.wake(self.optimizer)
        return Refresh(
            share=share,
            stage_begins=allot_anew,
            dense_loss=probe.loss,
            passes=probe.passes if probed else 0,
            errors={(b.kind, b.layer): curves[id(b)].rows() for b in chosen if by_errors},
            churn=churn,
        )

    def note_gap(self, gap: float) -> bool:
        """Tell how much higher (nats) the sparse loss was than the dense one on the same batch.

        Beyond `max_gap` the ladder steps down for good, to the rung that would be within it if the gap fell as the share of
        sleepers does; true where it did.
        """
        bound = self.config.max_gap
        if not bound or not math.isfinite(gap) or gap <= bound or self.cap < self.share:
            return False
        shares = [p.share for p in self.config.ladder.phases()]
        self.cap = max((s for s in shares if s <= bound / gap * self.share), default=0.0)
        return self.share > 0

    def finish_dense(self) -> None:
        """Train dense from the next step on."""
        self.cap = 0.0

    def wake_all(self) -> None:
        """Back to the dense model."""
        with moving():
            for block in self.blocks:
                if block.num_awake < block.num_units:
                    block.wake(self.optimizer)
        self.bias.clear()

    def smoothed(self, block: SlicedBlock, seen: Seen) -> Tensor:
        """The score with the older ones' weight in it; alone where it is of another kind."""
        if self.config.ema == 0 or block.score_U is None or seen.stands_in:
            return seen.score_U
        return self.config.ema * block.score_U + (1 - self.config.ema) * seen.score_U

    def grid(self, block: SlicedBlock) -> list[int]:
        """Widths at which the probe measures the block."""
        rate = self.config.mlp_rate if block.kind == "mlp" else self.config.attention_rate
        return probe_grid(block, self._rounding(block), rate)

    def _rounding(self, block: SlicedBlock) -> int:
        return self.multiple if block.kind == "mlp" else 1

    @property
    def whole(self) -> bool:
        """Whether this process can hold the whole dense model at once."""
        return not any(block.shards for block in self.blocks)

    @contextmanager
    def dense_model(self) -> Iterator[None]:
        """Within, the whole model is dense, gradients included."""
        with self.as_probed():
            try:
                for block in self.blocks:
                    block.widen()
                yield
            finally:
                for block in self.blocks:
                    block.narrow()

    def as_probed(self) -> AbstractContextManager[None]:
        """As a probe's loss is measured: without dropout, but where layers are checkpointed, which they are in training only."""
        return self.eager_layers(quiet=not self.core.is_activation_checkpointing)

    @contextmanager
    def eager_layers(self, *, quiet: bool = True) -> Iterator[None]:
        """Compiled layers run eagerly meanwhile: their graphs are of narrow shapes, and hooks would be a recompile.

        `quiet` turns dropout off, which would make two losses of one batch differ and use up random numbers.
        """
        layers, training = self.layers, self.model.training
        compiled = [layer._compiled_call_impl for layer in layers]
        try:
            for layer in layers:
                layer._compiled_call_impl = None
            self.model.train(training and not quiet)
            yield
        finally:
            self.model.train(training)
            for layer, call in zip(layers, compiled, strict=True):
                layer._compiled_call_impl = call

    @contextmanager
    def dense_forward(self, *, probing: bool = False) -> Iterator[None]:
        """Within, a forward without gradient is that of the dense model, widened one block at a time."""
        hooks: list[Any] = []
        try:
            for block in self.blocks:
                hooks += [
                    block.module.register_forward_pre_hook(
                        lambda *_, b=block: b.widen(), prepend=True
                    ),
                    block.module.register_forward_hook(
                        lambda *_, b=block: b.narrow(), always_call=True
                    ),
                ]
            with self.as_probed() if probing else self.eager_layers():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in self.blocks:
                block.narrow()

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The dense model's state dict; tensors that are not sliced are the model's own.

        Where ranks share the layers all must ask, and only the first one gets the sliced tensors.
        """
        state: dict[str, Tensor] = dict(self.model.state_dict())
        for block in self.blocks:
            for part in block.parts:
                full = block.whole(part)
                state[part.name] = block.shards.kept(full) if block.shards else full
        return state

    def _agree(self, probe: Probe) -> None:
        """Every rank looked at its own sequences; all choose by the mean: of what a gradient tells, over ranks with a label."""
        if self.parallel.world == 1:
            return
        even = 1 / self.parallel.world
        graded = int(self.parallel.sum(torch.tensor(int(probe.graded))))
        weight = probe.graded / graded if graded else even
        by_gradient = self.config.metric in GRADIENT_METRICS
        for seen in probe.seen.values():
            seen.score_U = self.parallel.sum(seen.score_U * (weight if by_gradient else even))
            seen.errors = tuple(self.parallel.sum(torch.tensor(seen.errors) * weight).tolist())
            seen.stands_in = seen.stands_in and not graded
            if seen.mean_I is not None:
                seen.mean_I = self.parallel.mean(seen.mean_I)

    def _refresh(self, block: SlicedBlock, seen: Seen, width: int, step: int) -> float:
        """Choose `width` units of the block; the share of them that slept before."""
        config = self.config
        score_U = self.smoothed(block, seen)
        if not seen.stands_in:
            block.score_U = score_U
        awake_K = select(
            score_U,
            width,
            selector=config.selector,
            temperature=config.temperature,
            explore=config.explore,
            stretches=block.stretches,
            random=importance.generator(config.seed, step, block.layer, block.kind),
        ).to(block.awake_K.device)
        before = block.awake_K
        block.refresh(awake_K, self.optimizer)
        self.bias.pop(id(block), None)
        if seen.mean_I is not None and block.num_awake < block.num_units:
            self.bias[id(block)] = self._mean_contribution(block, seen.mean_I)
        return 1.0 - float(torch.isin(awake_K, before).float().mean())

    def _curve(self, block: SlicedBlock, errors: tuple[float, ...]) -> Curve:
        return Curve(
            num_units=block.num_units,
            awake=tuple(self.grid(block)),
            errors=errors,
            unit_cost=unit_cost(self.shape, block.kind, self.config.attention_unit),
            multiple=block.stretches * self._rounding(block),
        )

    def _mean_contribution(self, block: SlicedBlock, mean_I: Tensor) -> Tensor:
        """What the sleepers would add on average, [H]."""
        asleep = block.asleep_units
        asleep_I = mean_I.view(block.num_units, -1)[asleep].flatten()
        out_IH = out_rows(block)[asleep].reshape(len(asleep_I), -1)
        return asleep_I.to(out_IH.dtype) @ out_IH

    def _compensate(self, block: SlicedBlock) -> Any:
        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            bias = self.bias.get(id(block))
            dense = block.widened or block.num_awake == block.num_units
            return output if bias is None or dense else output + bias.to(output.dtype)

        return add


def _rate(blocks: list[SlicedBlock]) -> float:
    units = sum(b.num_units for b in blocks)
    return 1 - sum(b.num_awake for b in blocks) / units if units else 0.0
