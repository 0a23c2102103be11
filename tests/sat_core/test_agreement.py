"""What ranks must agree on where their sequences differ; ranks are threads here, each with a model of its own."""

import copy
import threading
from typing import Any

import pytest
import torch

from sat_core import probe
from sat_core.corpus import IGNORED_LABEL, Batch
from sat_core.optim import build_optimizer
from sat_core.parallel import Parallel
from sat_core.plan.config import SatConfig
from sat_core.sparsity import Refresh, Sparsity
from tests.sat_core.tiny import random_batch, sparsity_of, tiny_model


class Thread(Parallel):
    """One of two ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, said: dict[int, torch.Tensor]):
        super().__init__()
        self.rank, self.world, self.device = rank, 2, "cpu"
        self.barrier, self.said = barrier, said

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.said[self.rank] = tensor.clone()
        self.barrier.wait(30)
        total = self.said[0] + self.said[1]
        self.barrier.wait(30)
        return total


def choose_together(batches: list[Batch], **settings: Any) -> list[tuple[Sparsity, Refresh]]:
    """Two ranks of a tiny model, after a first choice on a batch each."""
    config = SatConfig(total_steps=10, dense_start=0, mlp_rate=0.5, attention_rate=0.5, **settings)
    model, barrier, said = tiny_model(kv_heads=4), threading.Barrier(2), {}
    found: dict[int, tuple[Sparsity, Refresh]] = {}

    def choose(rank: int, model: Any) -> None:
        optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
        sparsity = Sparsity(model, optimizer, config, Thread(rank, barrier, said))
        try:
            refresh = sparsity.begin_step(0, batches[rank])
        except BaseException:
            barrier.abort()
            raise
        assert refresh is not None
        found[rank] = (sparsity, refresh)

    threads = [threading.Thread(target=choose, args=(r, copy.deepcopy(model))) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


def awake(sparsity: Sparsity) -> list[list[int]]:
    return [b.awake_K.tolist() for b in sparsity.blocks]


def unlabelled(batch: Batch) -> Batch:
    return batch._replace(labels_BT=torch.full_like(batch.labels_BT, IGNORED_LABEL))


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("labelled", [0, 1])
def test_what_a_gradient_tells_is_asked_of_ranks_with_a_label(labelled: int, ema: float) -> None:
    batches = [random_batch(1), unlabelled(random_batch(2))]
    settings = {"metric": "taylor", "allotment": "sensitivity", "ema": ema}
    one, other = choose_together(batches[:: 1 - 2 * labelled], **settings)
    alone = sparsity_of(tiny_model(kv_heads=4), **settings)
    refresh = alone.begin_step(0, batches[0])
    assert refresh is not None
    assert awake(one[0]) == awake(other[0]) == awake(alone)
    assert one[1].errors == other[1].errors == refresh.errors


def test_ranks_without_a_label_choose_by_what_they_have() -> None:
    batches = [unlabelled(random_batch(s)) for s in (1, 2)]
    by_fisher = choose_together(batches, metric="fisher", allotment="sensitivity")
    by_activation = choose_together(batches, metric="activation", allotment="sensitivity")
    assert len({str(awake(s)) for s, _ in (*by_fisher, *by_activation)}) == 1


def test_every_rank_drops_out_other_values_and_the_same_again_on_resume() -> None:
    def drawn(rank: int, step: int, before: int = 0) -> list[float]:
        torch.manual_seed(3)
        torch.rand(before)
        Thread(rank, threading.Barrier(2), {}).reseed(3, step)
        return torch.rand(8).tolist()

    alone = torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()
    assert drawn(0, 5) == alone
    assert len({str(drawn(rank, step)) for rank, step in ((0, 5), (1, 5), (2, 5), (1, 6))}) == 4
    assert drawn(1, 5) == drawn(1, 5, before=4)


def test_a_loss_that_is_no_number_on_one_rank_finishes_all_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches, mean_loss = [random_batch(1), random_batch(2)], probe.mean_loss

    def told(model: Any, inputs: probe.Inputs) -> float | None:
        loss = mean_loss(model, inputs)
        return float("nan") if inputs is batches[1] else loss

    monkeypatch.setattr(probe, "mean_loss", told)
    found = choose_together(batches, allotment="uniform")
    assert [(s.cap, s.share, r.share) for s, r in found] == [(0, 0, 0)] * 2
