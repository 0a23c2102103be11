"""One dense forward on a training micro-batch, watched: scores, local errors, mean contributions and the dense loss.

Blocks are widened one at a time as the forward passes them, so the peak is one layer more. Everything is reduced where it
is seen; no activation outlives its layer. `taylor` needs a gradient and is the one metric that widens the whole model, for
one forward and backward of its own.

Axes: B sequences, T valid tokens, H hidden, I inner values of a piece (values of a unit follow each other), U units of a
block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sat_core import importance
from sat_core.allotment import GRID
from sat_core.data.corpus import Batch
from sat_core.loss import token_loss
from sat_core.plan.schedule import awake_units

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sat_core.plan.config import SatConfig
    from sat_core.slicing import SlicedBlock

ERROR_TOKENS = 512
WEIGHT_METRICS = ("magnitude", "uniform")

Inputs = Batch | Mapping[str, Tensor]
"""A batch of ours, or keyword arguments of the model's forward, `labels` and `attention_mask` among them."""


class Subject(Protocol):
    """What a probe has to know of a sparse model; `sat_core.sparsity.Sparsity` is one."""

    model: Any
    config: SatConfig

    @property
    def blocks(self) -> list[SlicedBlock]: ...  # noqa: D102
    def layer(self, index: int) -> nn.Module: ...  # noqa: D102
    def dense_forward(self) -> AbstractContextManager[None]: ...  # noqa: D102
    def smoothed(self, block: SlicedBlock, score_U: Tensor) -> Tensor: ...  # noqa: D102
    def grid(self, block: SlicedBlock) -> list[int]: ...  # noqa: D102
    def activation_function(self, block: SlicedBlock) -> Callable[[Tensor], Tensor]: ...  # noqa: D102


class Piece(NamedTuple):
    """Inner values of one output projection; a block has one, or one an expert.

    Attributes:
        tokens_t: which of the T valid tokens the rows are.
        inner_tI: its input.
        out_IH: its weight.
        first_unit: the piece's first unit in the block.
    """

    tokens_t: Tensor
    inner_tI: Tensor
    out_IH: Tensor
    first_unit: int


@dataclass
class Seen:
    """What the probe saw of one block.

    Attributes:
        score_U: raw score, float32.
        missing_JT: squared norm of what would go missing at each rate of the grid, per token; None where not measured.
        errors: the same relative to the residual stream after the layer, averaged; filled when the layer ends.
        mean_I: mean inner values, for compensation.
    """

    score_U: Tensor
    missing_JT: Tensor | None = None
    errors: tuple[float, ...] = ()
    mean_I: Tensor | None = None


@dataclass
class Probe:
    """Watch one dense forward of `blocks`.

    Attributes:
        sparsity: whose model and settings.
        blocks: those to look at.
        step: enters random scores.
        with_errors: whether to measure local errors.
        seen: by `id` of the block, after `run`.
        loss: mean dense loss of the batch, nats; None without labels.
    """

    sparsity: Subject
    blocks: list[SlicedBlock]
    step: int
    with_errors: bool
    seen: dict[int, Seen] = field(default_factory=dict)
    loss: float | None = None
    _inputs: dict[int, Tensor] = field(default_factory=dict)
    _taylor: dict[int, Tensor] = field(default_factory=dict)

    def run(self, inputs: Inputs) -> None:
        """The forward; fills `seen` and `loss`."""
        metric = self.sparsity.config.metric
        if metric == "taylor":
            self._taylor = taylor_scores(self.sparsity, self.blocks, inputs)
        self._valid = valid_tokens(inputs)
        hooks = [h for block in self.blocks for h in self._hooks(block)]
        if self.with_errors:
            layers = {block.layer for block in self.blocks}
            hooks += [
                self.sparsity.layer(i).register_forward_hook(self._at_layer_end(i)) for i in layers
            ]
        try:
            with torch.no_grad(), self.sparsity.dense_forward():
                self.loss = mean_loss(self.sparsity.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, block: SlicedBlock) -> list[Any]:
        """Hooks that see the widened block: `dense_forward` registers before (`prepend`) and after these."""

        def at_experts(module: Any, args: tuple[Tensor, ...]) -> None:
            self._inputs[id(block)] = args[0][self._valid]
            self._look(block, _expert_pieces(module, block, args, self._valid))

        def at_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs[id(block)] = args[0].reshape(-1, args[0].shape[-1])[self._valid]

        def at_output(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inner = args[0].reshape(-1, args[0].shape[-1])[self._valid]
            out_IH = _out_rows(block).reshape(inner.shape[1], -1)
            everywhere = torch.arange(len(inner), device=inner.device)
            self._look(block, [Piece(everywhere, inner, out_IH, 0)])

        if block.out.experts > 1:
            return [block.module.register_forward_pre_hook(at_experts)]
        into = next(part.owner for part in block.parts if not part.out)
        return [
            into.register_forward_pre_hook(at_input),
            block.out.owner.register_forward_pre_hook(at_output),
        ]

    def _look(self, block: SlicedBlock, pieces: list[Piece]) -> None:
        found = Seen(self._score(block, pieces, self._inputs.pop(id(block))))
        config = self.sparsity.config
        if config.compensation:
            found.mean_I = torch.cat([p.inner_tI.float().mean(0) for p in pieces])
        if self.with_errors:
            ranked = self.sparsity.smoothed(block, found.score_U)
            found.missing_JT = self._missing(block, pieces, ranked)
        self.seen[id(block)] = found

    def _score(self, block: SlicedBlock, pieces: list[Piece], input_TH: Tensor) -> Tensor:
        config = self.sparsity.config
        metric, units, kind = config.metric, block.num_units, block.kind
        num_tokens = len(input_TH)
        if metric == "taylor":
            return self._taylor[id(block)]
        if metric in ("activation", "fluctuation"):
            score = getattr(importance, metric)
            inner_I = torch.cat([score(p.inner_tI, p.out_IH, num_tokens) for p in pieces])
            return importance.per_unit(inner_I, units)
        if metric in WEIGHT_METRICS:
            return weight_score(block, metric, seed=config.seed, step=self.step)
        rows = _input_rows(block, input_TH.shape[1])
        if metric == "maxip" and kind == "mlp":
            act = self.sparsity.activation_function(block)
            score_U = importance.maxip_mlp(input_TH.mean(0), rows, act)
        elif metric == "maxip":
            mean_H = input_TH.mean(0)
            scored = [importance.maxip_rows(mean_H, r).reshape(units, -1) for r in rows]
            score_U = importance.joined(scored, kind)
        else:
            norm_H = input_TH.norm(dim=0)
            scored = [importance.wanda_rows(norm_H, r).reshape(units, -1) for r in rows]
            score_U = importance.joined(scored, kind)
        return score_U * importance.out_norm(_out_rows(block), kind)

    def _missing(self, block: SlicedBlock, pieces: list[Piece], score_U: Tensor) -> Tensor:
        """Squared norms of the contributions that would go missing, [rates, tokens]; a subset of the tokens."""
        stride = max(1, int(self._valid.sum()) // ERROR_TOKENS)
        hidden = pieces[0].out_IH.shape[1]
        size = -(-int(self._valid.sum()) // stride)
        missing_TH = pieces[0].inner_tI.new_zeros(size, hidden)
        order_SU = score_U.view(block.stretches, -1).argsort(dim=1, stable=True)
        order_SU = (
            order_SU
            + torch.arange(block.stretches, device=order_SU.device)[:, None] * (order_SU.shape[1])
        )
        norms, asleep = [], 0
        for awake in self.sparsity.grid(block):
            now = (block.num_units - awake) // block.stretches
            fresh = order_SU[:, asleep:now].flatten()
            asleep = now
            for piece in pieces:
                rows = _inner_rows(piece, fresh, block)
                picked = piece.tokens_t % stride == 0
                part_tH = piece.inner_tI[picked][:, rows] @ piece.out_IH[rows].to(
                    piece.inner_tI.dtype
                )
                missing_TH.index_add_(
                    0, piece.tokens_t[picked] // stride, part_tH.to(missing_TH.dtype)
                )
            norms.append(missing_TH.float().square().sum(1))
        return torch.stack(norms)

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


def weight_score(block: SlicedBlock, metric: str, *, seed: int, step: int) -> Tensor:
    """Scores that need no forward: `uniform` and `magnitude`; float32 [U]."""
    if metric == "uniform":
        scores = importance.uniform(
            block.num_units, seed=seed, step=step, layer=block.layer, kind=block.kind
        )
        return scores.to(block.awake_K.device)
    out_rows = _out_rows(block)
    rows = _input_rows(block, out_rows.shape[1] * block.num_units // _num_inner(block))
    scored = [importance.magnitude_rows(r).reshape(block.num_units, -1) for r in rows]
    return importance.joined(scored, block.kind) * importance.out_norm(out_rows, block.kind)


def taylor_scores(
    sparsity: Subject, blocks: list[SlicedBlock], inputs: Inputs
) -> dict[int, Tensor]:
    """|dL / dm_u| of a factor on each unit's output projection, by `id` of the block; one dense forward and backward."""
    for block in sparsity.blocks:
        block.widen()
    try:
        gates = {
            id(b): torch.ones(b.num_units, device=b.awake_K.device, requires_grad=True)
            for b in blocks
        }
        loss = gated_loss(sparsity.model, blocks, gates, inputs)
        gradients = torch.autograd.grad(loss, list(gates.values()))
    finally:
        for block in sparsity.blocks:
            block.narrow()
    return {key: importance.taylor(g) for key, g in zip(gates, gradients, strict=True)}


def gated_loss(
    model: Any, blocks: list[SlicedBlock], gates: Mapping[int, Tensor], inputs: Inputs
) -> Tensor:
    """Mean loss with every unit's output multiplied by its gate [U]; gradients reach gates and parameters."""
    scaled = {
        f"model.{b.out.name}": b.out.parameter
        * b.out.spread(gates[id(b)].to(b.out.parameter.dtype))
        for b in blocks
    }
    result: Tensor = torch.func.functional_call(_Loss(model), scaled, (inputs,))
    return result


class _Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Batch):
            found = token_loss(self.model, inputs)
            return found.total / max(found.labels, 1)
        loss: Tensor = self.model(**inputs).loss
        return loss


def mean_loss(model: Any, inputs: Inputs) -> float | None:
    """Mean loss of a forward, nats; None where the inputs carry no labels."""
    if isinstance(inputs, Batch):
        found = token_loss(model, inputs)
        return float(found.total) / found.labels if found.labels else None
    loss = model(**inputs).loss
    return None if loss is None else float(loss)


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


def _out_rows(block: SlicedBlock) -> Tensor:
    """Output weights of the widened block, [U, values * H]."""
    return block.out.unit_rows(block.whole(block.out))[0]


def _num_inner(block: SlicedBlock) -> int:
    return block.num_units * block.out.segments[0]


def _input_rows(block: SlicedBlock, hidden: int) -> list[Tensor]:
    """Input weights of the widened block, [U * rows, H] for each segment, gate before up."""
    weights = [p for p in block.parts if not p.out and p.parameter.dim() > 1]
    return [m.reshape(-1, hidden) for p in weights for m in p.unit_rows(block.whole(p))]


def _inner_rows(piece: Piece, units: Tensor, block: SlicedBlock) -> Tensor:
    """Inner values of those of `units` that are in `piece`."""
    values = block.out.segments[0]
    here = units - piece.first_unit
    here = here[(here >= 0) & (here < piece.inner_tI.shape[1] // values)]
    return (here[:, None] * values + torch.arange(values, device=here.device)).flatten()


def _expert_pieces(
    module: Any, block: SlicedBlock, args: tuple[Tensor, ...], valid: Tensor
) -> list[Piece]:
    """Inner values of each expert, weighted by the router, from the inputs of a stock experts module."""
    hidden_TH, index_Tk, weight_Tk = (a[valid] for a in args)
    per_expert = block.num_units // block.out.experts
    out_UH = _out_rows(block)
    pieces = []
    for expert in range(block.out.experts):
        tokens, slot = torch.where(index_Tk == expert)
        gate, up = nn.functional.linear(hidden_TH[tokens], module.gate_up_proj[expert]).chunk(2, -1)
        inner = module.act_fn(gate) * up * weight_Tk[tokens, slot, None]
        first = expert * per_expert
        pieces.append(Piece(tokens, inner, out_UH[first : first + per_expert], first))
    return pieces


def probe_grid(block: SlicedBlock, multiple: int) -> list[int]:
    """Awake units of the block at each rate of the grid, strictly falling."""
    per_stretch = block.num_units // block.stretches
    counts = [awake_units(per_stretch, rate, multiple) * block.stretches for rate in GRID]
    return [k for k in sorted(set(counts), reverse=True) if k < block.num_units]
