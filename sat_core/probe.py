"""The dense model on a training micro-batch, watched: scores, what each width would cost, mean contributions, the loss.

In a stage of the ladder one forward is enough, with blocks widened one at a time as it passes them, so that the peak is one
layer more. Where a stage begins and the rate is to be allotted by sensitivity, and for the metrics that need a gradient,
the whole model is widened for one forward and backward; the weights' own gradients are not made. Everything is reduced
where it is seen.

What a width would cost is estimated to second order by the diagonal of the empirical Fisher matrix (Theis et al. 2018,
arXiv 1801.05787): with a factor m_u = 1 on each unit's output and d_tu = dL / dm_u at token t, the loss rises by about
sum_u sum_t d_tu^2 / 2 over the units that sleep. Where ranks hold slices of the model, or the batch has no label, it is
the local error instead: the squared share of the residual stream that would go missing, which a forward alone can see.
A metric that needs the gradient then keeps the last scores; before there are any, `activation` stands in for it.

Axes: B sequences, T valid tokens, H hidden, I inner values of a piece (values of a unit follow each other), U units of a
block, J rates of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sat_core import importance
from sat_core.corpus import IGNORED_LABEL, Batch
from sat_core.loss import token_loss
from sat_core.pieces import (
    Piece,
    activation_function,
    effects,
    expert_pieces,
    inner_rows,
    input_rows,
    out_rows,
    reached,
    weight_score,
)
from sat_core.plan.config import GRADIENT_METRICS, WEIGHT_METRICS

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sat_core.plan.config import SatConfig
    from sat_core.slicing import SlicedBlock

ERROR_TOKENS = 512

Inputs = Batch | Mapping[str, Tensor]
"""A batch of ours, or keyword arguments of the model's forward, `labels` and `attention_mask` among them."""


class Subject(Protocol):
    """What a probe has to know of a sparse model; `sat_core.sparsity.Sparsity` is one."""

    model: Any
    config: SatConfig

    @property
    def whole(self) -> bool: ...  # noqa: D102
    @property
    def blocks(self) -> list[SlicedBlock]: ...  # noqa: D102
    def layer(self, index: int) -> nn.Module: ...  # noqa: D102
    def dense_forward(self, *, probing: bool) -> AbstractContextManager[None]: ...  # noqa: D102
    def dense_model(self) -> AbstractContextManager[None]: ...  # noqa: D102
    def smoothed(self, block: SlicedBlock, seen: Seen) -> Tensor: ...  # noqa: D102
    def grid(self, block: SlicedBlock) -> list[int]: ...  # noqa: D102


@dataclass
class Seen:
    """What the probe saw of one block.

    Attributes:
        score_U: raw score, float32.
        stands_in: whether it is there for want of a label, not by the metric.
        missing_JT: squared norm of what would go missing at each rate of the grid, per token, until the layer ends.
        errors: what each rate of the grid would cost; empty where it was not asked.
        mean_I: mean inner values, for compensation.
    """

    score_U: Tensor
    stands_in: bool = False
    missing_JT: Tensor | None = None
    errors: tuple[float, ...] = ()
    mean_I: Tensor | None = None


@dataclass
class Probe:
    """Watch one dense pass of `blocks`.

    Attributes:
        sparsity: whose model and settings.
        blocks: those to look at.
        step: enters random scores.
        with_errors: whether to estimate what each rate would cost.
        seen: by `id` of the block, after `run`.
        loss: mean dense loss of the batch, nats; None without labels.
        passes: forwards' worth of FLOPs spent: 1, or with a backward 2; 3 where there are experts.
    """

    sparsity: Subject
    blocks: list[SlicedBlock]
    step: int
    with_errors: bool
    seen: dict[int, Seen] = field(default_factory=dict)
    loss: float | None = None
    passes: int = 1
    _inputs: dict[int, Tensor] = field(default_factory=dict)
    _pieces: dict[int, list[Piece]] = field(default_factory=dict)

    def run(self, inputs: Inputs) -> None:
        """Look; fills `seen` and `loss`.

        Raises:
            ValueError: where a gradient is needed and the inputs carry no labels.
        """
        self._valid = valid_tokens(inputs)
        wanted = self.sparsity.config.metric in GRADIENT_METRICS or self.with_errors
        if wanted and self.sparsity.whole:
            self._run_with_gradients(inputs)
        if self.loss is None:
            # No gradient was wanted, could be had, or, without a label in these inputs, would say anything.
            self.passes = 1
            self.seen.clear()
            self._pieces.clear()
            self._run_forward(inputs)

    @property
    def graded(self) -> bool:
        """Whether a gradient was seen."""
        return self.passes > 1

    @property
    def finite(self) -> bool:
        """Whether loss, scores and errors are numbers."""
        losses = [self.loss] if self.loss is not None else []
        errors = (e for s in self.seen.values() for e in s.errors)
        scores = (bool(s.score_U.isfinite().all()) for s in self.seen.values())
        return all(map(math.isfinite, (*losses, *errors))) and all(scores)

    def _run_forward(self, inputs: Inputs) -> None:
        hooks = [h for block in self.blocks for h in self._hooks(block)]
        if self.with_errors:
            layers = {block.layer for block in self.blocks}
            hooks += [
                self.sparsity.layer(i).register_forward_hook(self._at_layer_end(i)) for i in layers
            ]
        with _removing(hooks), torch.no_grad(), self.sparsity.dense_forward(probing=True):
            self.loss = mean_loss(self.sparsity.model, inputs)

    def _run_with_gradients(self, inputs: Inputs) -> None:
        self.passes = 2 + any(block.out.experts > 1 for block in self.blocks)
        embedded: list[Tensor] = []

        def at_embedding(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            embedded.append(output if output.requires_grad else output.requires_grad_())
            return embedded[0]

        embeddings = self.sparsity.model.get_input_embeddings()
        hooks = [h for block in self.blocks for h in self._hooks(block)]
        hooks += [embeddings.register_forward_hook(at_embedding)]
        hooks += [self._at_gradient(block) for block in self.blocks]
        with _removing(hooks), torch.enable_grad(), self.sparsity.dense_model():
            total, self._labels = summed_loss(self.sparsity.model, inputs)
            if self._labels:
                self.loss = float(total.detach()) / self._labels
                torch.autograd.grad(total, embedded)

    def _at_gradient(self, block: SlicedBlock) -> Any:
        """A hook to look at the gradient of a block's inner values when the backward passes them.

        Experts keep theirs to themselves, so that there it is computed again from the gradient of their output.
        """
        experts = block.out.experts > 1

        def arrived(gradient: Tensor) -> None:
            pieces = self._pieces.pop(id(block), None)
            if pieces is None:
                return
            valid = gradient.reshape(-1, gradient.shape[-1])[self._valid].float()
            gradients_tI = [reached(p, valid) if experts else valid for p in pieces]
            effect_tU = [effects(p, g, block) for p, g in zip(pieces, gradients_tI, strict=True)]
            found = self.seen[id(block)]
            fisher_U = torch.cat([importance.fisher(e, self._labels) for e in effect_tU])
            if self.sparsity.config.metric == "taylor":
                found.score_U = importance.taylor(torch.cat([e.sum(0) for e in effect_tU]))
            elif self.sparsity.config.metric == "fisher":
                found.score_U = fisher_U
            if self.with_errors:
                ranked = self.sparsity.smoothed(block, found)
                found.errors = self._fisher_errors(block, fisher_U, ranked)

        def at_output(_: nn.Module, __: Any, output: Any) -> None:
            output.register_hook(arrived)

        def at_inner(_: nn.Module, args: tuple[Any, ...]) -> None:
            args[0].register_hook(arrived)

        if experts:
            return block.module.register_forward_hook(at_output)
        return block.out.owner.register_forward_pre_hook(at_inner)

    def _fisher_errors(
        self, block: SlicedBlock, fisher_U: Tensor, score_U: Tensor
    ) -> tuple[float, ...]:
        order_SU = score_U.view(block.stretches, -1).argsort(dim=1, stable=True)
        ranked_SU = fisher_U.view(block.stretches, -1).gather(1, order_SU)
        lost_U = ranked_SU.sum(0).cumsum(0)
        asleep = [(block.num_units - k) // block.stretches for k in self.sparsity.grid(block)]
        return tuple(lost_U[[n - 1 for n in asleep]].tolist())

    def _hooks(self, block: SlicedBlock) -> list[Any]:
        """Hooks that see the widened block: `dense_forward` registers before (`prepend`) and after these."""

        def at_experts(module: Any, args: tuple[Tensor, ...]) -> None:
            self._inputs[id(block)] = args[0][self._valid]
            self._look(block, expert_pieces(module, block, args, self._valid))

        def at_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs[id(block)] = args[0].reshape(-1, args[0].shape[-1])[self._valid]

        def at_output(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inner = args[0].reshape(-1, args[0].shape[-1])[self._valid]
            out_IH = out_rows(block).reshape(inner.shape[1], -1)
            everywhere = torch.arange(len(inner), device=inner.device)
            self._look(block, [Piece(everywhere, inner, out_IH, 0)])

        if block.out.experts > 1:
            return [block.module.register_forward_pre_hook(at_experts)]
        into = next(part.owner for part in block.parts if not part.out)
        return [
            into.register_forward_pre_hook(at_input),
            block.out.owner.register_forward_pre_hook(at_output),
        ]

    @torch.no_grad()
    def _look(self, block: SlicedBlock, pieces: list[Piece]) -> None:
        if id(block) in self.seen:
            return  # seen before: gradient checkpointing computes it again
        config = self.sparsity.config
        stands_in = config.metric in GRADIENT_METRICS and not self.graded
        found = Seen(self._score(block, pieces, self._inputs.pop(id(block))), stands_in)
        if self.graded:
            self._pieces[id(block)] = [
                p._replace(inner_tI=p.inner_tI.detach(), out_IH=p.out_IH.detach()) for p in pieces
            ]
        if config.compensation:
            found.mean_I = torch.cat([p.inner_tI.float().mean(0) for p in pieces])
        if self.with_errors and not self.graded:
            ranked = self.sparsity.smoothed(block, found)
            found.missing_JT = self._missing(block, pieces, ranked)
        self.seen[id(block)] = found

    def _score(self, block: SlicedBlock, pieces: list[Piece], input_TH: Tensor) -> Tensor:
        config = self.sparsity.config
        metric, units, kind = config.metric, block.num_units, block.kind
        num_tokens = len(input_TH)
        if metric in GRADIENT_METRICS:
            if self.graded:
                return torch.zeros(units, device=input_TH.device)  # until the backward passes
            if block.score_U is not None:
                return block.score_U
            metric = "activation"
        if metric in ("activation", "fluctuation"):
            score = getattr(importance, metric)
            inner_I = torch.cat([score(p.inner_tI, p.out_IH, num_tokens) for p in pieces])
            return importance.per_unit(inner_I, units)
        if metric in WEIGHT_METRICS:
            return weight_score(block, metric, seed=config.seed, step=self.step)
        rows = input_rows(block, input_TH.shape[1])
        if metric == "maxip" and kind == "mlp":
            score_U = importance.maxip_mlp(input_TH.mean(0), rows, activation_function(block))
        else:
            of_rows: Callable[[Tensor, Tensor], Tensor] = getattr(importance, f"{metric}_rows")
            seen_H = input_TH.mean(0) if metric == "maxip" else input_TH.norm(dim=0)
            scored = [of_rows(seen_H, r).reshape(units, -1) for r in rows]
            score_U = importance.joined(scored, kind)
        return score_U * importance.out_norm(out_rows(block), kind)

    def _missing(self, block: SlicedBlock, pieces: list[Piece], score_U: Tensor) -> Tensor:
        """Squared norms of the contributions that would go missing, [rates, tokens]; a subset of the tokens."""
        stride = max(1, int(self._valid.sum()) // ERROR_TOKENS)
        hidden = pieces[0].out_IH.shape[1]
        size = -(-int(self._valid.sum()) // stride)
        missing_TH = pieces[0].inner_tI.new_zeros(size, hidden)
        order_SU = score_U.view(block.stretches, -1).argsort(dim=1, stable=True)
        first_S1 = torch.arange(block.stretches, device=order_SU.device)[:, None]
        order_SU = order_SU + first_S1 * order_SU.shape[1]
        norms, asleep = [], 0
        for awake in self.sparsity.grid(block):
            now = (block.num_units - awake) // block.stretches
            fresh = order_SU[:, asleep:now].flatten()
            asleep = now
            for piece in pieces:
                rows = inner_rows(piece, fresh, block)
                picked = piece.tokens_t % stride == 0
                part_tH = piece.inner_tI[picked][:, rows] @ piece.out_IH[rows].to(
                    piece.inner_tI.dtype
                )
                missing_TH.index_add_(
                    0, piece.tokens_t[picked] // stride, part_tH.to(missing_TH.dtype)
                )
            norms.append(missing_TH.float().square().sum(1))
        return torch.stack(norms) if norms else missing_TH.new_zeros(0, size)

    def _at_layer_end(self, layer: int) -> Any:
        def end(_: nn.Module, __: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            stream_TH = stream.reshape(-1, stream.shape[-1])[self._valid]
            for block in self.blocks:
                found = self.seen.get(id(block))
                if block.layer != layer or found is None or found.missing_JT is None:
                    continue
                stride = max(1, len(stream_TH) // ERROR_TOKENS)
                size_T = stream_TH[::stride].float().square().sum(1).clamp_min(1e-12)
                found.errors = tuple((found.missing_JT / size_T).mean(1).tolist())
                found.missing_JT = None

        return end


@contextmanager
def _removing(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def summed_loss(model: Any, inputs: Inputs) -> tuple[Tensor, int]:
    """Summed loss, with its graph, and labels.

    Raises:
        ValueError: where the inputs carry no labels.
    """
    if isinstance(inputs, Batch):
        found = token_loss(model, inputs, train_head=False)
        return found.total, found.labels
    if "labels" not in inputs:
        raise ValueError(
            "the probe's inputs have no labels, which this metric or allotment needs; allotment 'exempt' needs none"
        )
    labels = int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
    return model(**inputs).loss * labels, labels


def mean_loss(model: Any, inputs: Inputs) -> float | None:
    """Mean loss of a forward, nats; None where the inputs carry no labels."""
    if isinstance(inputs, Batch):
        found = token_loss(model, inputs)
        return float(found.total) / found.labels if found.labels else None
    if "labels" not in inputs:
        model(**inputs)
        return None
    total, labels = summed_loss(model, inputs)
    return float(total) / labels if labels else None


def valid_tokens(inputs: Inputs) -> Tensor:
    """Bool [B * T], false at padding."""
    if isinstance(inputs, Batch):
        width = inputs.input_ids_BT.shape[1]
        places_T = torch.arange(width, device=inputs.lengths_B.device)
        return (places_T < inputs.lengths_B[:, None]).flatten()
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    return mask.bool().flatten()
