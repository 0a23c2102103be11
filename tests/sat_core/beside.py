"""Training a narrowed model beside its masked twin, the one loop that shows an update to be right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from sat_core.loss import token_loss
from sat_core.optim import build_optimizer
from sat_core.reference import MaskedAdamW, masks_of, train_step
from sat_core.sparsity import Sparsity
from tests.sat_core.tiny import random_batch, sparsity_of


def train_beside_the_reference(
    model: Any,
    *,
    steps: int,
    rel: float,
    look: Callable[[int, Sparsity], None] = lambda *_: None,
    **settings: Any,
) -> tuple[Any, Any]:
    """The model and its twin after `steps` of a choice every second one, all awake.

    Losses of every step must agree to `rel`; `look` sees each step after its backward.
    """
    settings |= {"total_steps": steps, "refresh_every": 2}
    twin = sparsity_of(copy.deepcopy(model), **settings)
    oracle = MaskedAdamW(twin, learning_rate=3e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, learning_rate=3e-3, weight_decay=0.1)
    sparsity = sparsity_of(model, optimizer, **settings)
    before = masks_of(sparsity)
    for step in range(steps):
        batch = random_batch(step)
        if sparsity.begin_step(step, batch):
            oracle.wake(before, masks_of(sparsity))
            before = masks_of(sparsity)
        found = token_loss(model, batch)
        (found.total / found.labels).backward()
        look(step, sparsity)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = train_step(twin, oracle, batch, before)
        assert float(found.total.detach()) / found.labels == pytest.approx(loss, rel=rel)
    sparsity.wake_all()
    return model, twin.model
