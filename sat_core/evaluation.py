"""Held-out loss and samples, always of the merged dense model: what a person takes home is what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sat_core.model import Sparsity, token_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Mean loss (nats a token) and share of tokens predicted right, over `tokens` labels."""

    loss: float
    token_accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(
    sparsity: Sparsity, corpus: Corpus, *, batch_size: int, device: str, alive: Callable[[], bool]
) -> HeldOut | None:
    """Loss over the whole split; None where it is empty, or where `alive` turned false on the way."""
    total, correct, labels = 0.0, 0, 0
    with sparsity.dense_forward():
        for indices in corpus.in_order(batch_size):
            if not alive():
                return None
            found = token_loss(sparsity.model, corpus.batch(indices, device))
            total, correct, labels = (
                total + float(found.total),
                correct + int(found.correct),
                labels + found.labels,
            )
    return (
        HeldOut(loss=total / labels, token_accuracy=correct / labels, tokens=labels)
        if labels
        else None
    )


@torch.no_grad()
def sample(
    sparsity: Sparsity, tokenizer: Any, prompt: str, *, max_new_tokens: int, chat: bool
) -> str:
    """Greedy continuation of `prompt` (as a user's turn where the run is supervised on messages)."""
    model = sparsity.model
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(next(model.parameters()).device)
    model.eval()
    try:
        with sparsity.dense_forward():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else tokenizer.eos_token_id,
            )
    finally:
        model.train()
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
