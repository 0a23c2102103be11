"""Cross-entropy at the labelled positions alone, a few of them at a time.

Logits are computed where a label is: exact, and in supervised data much of the head's arithmetic. They never exist all at
once: each chunk's gradient is made while its logits are there, so memory does not grow with the vocabulary times the
batch. `torch.nn.functional.linear_cross_entropy` does the same without token accuracy and without a softcap, and is
therefore not used; gathering positions, not columns, is what makes packed and padded batches cheap alike.

Axes: N labelled positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from sat_core.corpus import IGNORED_LABEL
from sat_core.plan.families import family_of
from sat_core.plan.memory import CHUNK_ELEMENTS

if TYPE_CHECKING:
    from sat_core.corpus import Batch


class TokenLoss(NamedTuple):
    """Loss of one batch.

    Attributes:
        total: summed cross-entropy, scalar with gradient; float32, or float64 where the model is.
        correct: labels predicted right, int64 scalar.
        labels: labels counted.
    """

    total: Tensor
    correct: Tensor
    labels: int


def token_loss(model: Any, batch: Batch, *, train_head: bool = True) -> TokenLoss:
    """Cross-entropy of each labelled token given those before it; of the model as it is, narrow or dense.

    Without `train_head` no gradient of the head's weight is made.
    """
    base = model.get_decoder()
    hidden_BTH = base(**forward_arguments(model, batch))[0]
    targets_BT = batch.labels_BT[:, 1:]
    labelled_BT = targets_BT != IGNORED_LABEL
    hidden_NH, targets_N = hidden_BTH[:, :-1][labelled_BT], targets_BT[labelled_BT]
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    loss = cast("Any", _ChunkedLoss).apply
    weight = head.weight if train_head else head.weight.detach()
    total, correct = loss(hidden_NH, weight, head.bias, targets_N, softcap)
    return TokenLoss(total, correct, len(targets_N))


def forward_arguments(model: Any, batch: Batch) -> dict[str, Any]:
    """What the stock forward is given, so that no document sees another where the batch keeps them apart."""
    arguments = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if (positions_BT := batch.positions_BT) is None:
        return arguments
    arguments["position_ids"] = positions_BT
    if family_of(model.config.model_type).masks_documents:
        document_BT = (positions_BT == 0).cumsum(1)
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        arguments["attention_mask"] = same_BTT.tril()[:, None]
    return arguments


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy and right predictions of a linear head; gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        total = hidden_NH.new_zeros((), dtype=exact)
        correct = targets_N.new_zeros(())
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and wanted[2] else None
        size = max(1, CHUNK_ELEMENTS // len(weight_VH))
        # One chunk even of nothing, whose gradients are zeros.
        for first in range(0, max(1, len(targets_N)), size):
            hidden, target = hidden_NH[first : first + size], targets_N[first : first + size, None]
            logits = functional.linear(hidden, weight_VH, bias_V).to(exact)
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            log_shares = logits.log_softmax(-1)
            correct += (log_shares.argmax(-1, keepdim=True) == target).sum()
            total -= log_shares.gather(1, target).sum()
            if not any(wanted):
                continue
            grad = log_shares.exp_()
            grad.scatter_add_(1, target, grad.new_full((), -1.0).expand(target.shape))
            if softcap:
                grad *= 1 - (logits / softcap) ** 2
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[first : first + size] = grad @ weight_VH
            if wanted[1]:
                of_chunk = grad.T @ hidden
                if grad_weight is None:
                    grad_weight = of_chunk.to(weight_VH.dtype)
                else:
                    grad_weight += of_chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (g if g is None else g.mul_(grad_total.to(g.dtype)) for g in ctx.saved_tensors)
        return (*scaled, None, None)
