"""Sliced equals masked, in float64: forward, backward, update, over several selections."""

import copy

import pytest
import torch

from sat_core.model import Sparsity, token_loss
from sat_core.optim import build_optimizer
from sat_core.reference import MaskedAdamW, Masks, masked, train_step
from tests.sat_core.tiny import FAMILIES, random_batch, tiny_model


def masks_of(sparsity: Sparsity) -> Masks:
    masks = {}
    for block in sparsity.blocks:
        mask = torch.zeros(block.num_units, dtype=torch.bool)
        mask[block.awake_K] = True
        masks[block.kind, block.layer] = mask
    return masks


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_narrowed_model_computes_what_a_masked_one_does(model_type: str, kv_heads: int) -> None:
    model = tiny_model(model_type, kv_heads=kv_heads).double()
    twin = Sparsity(copy.deepcopy(model))
    sparsity, batch = Sparsity(model), random_batch(1)
    sparsity.select(mlp_rate=0.5, attention_rate=0.5, allotment="uniform", batch=batch, step=0)
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (24, 32)
    assert (model.model.layers[0].self_attn.k_proj.weight.shape[0] < 8 * kv_heads) == (kv_heads > 1)
    found = token_loss(model, batch)
    found.total.backward()
    with masked(twin, masks_of(sparsity)):
        expected = token_loss(twin.model, batch)
    expected.total.backward()
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    for block, other in zip(sparsity.blocks, twin.blocks, strict=True):
        for part, full in zip(block.parts, other.parts, strict=True):
            grad = full.parameter.grad.index_select(part.dim, part.row_indices(block.awake_K))
            torch.testing.assert_close(part.parameter.grad, grad, rtol=1e-9, atol=1e-14)
            asleep = full.parameter.grad.index_select(
                part.dim, part.row_indices(block.asleep_units)
            )
            assert not asleep.any()


@pytest.mark.parametrize("dense_start", [True, False])
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("llama", True), ("qwen2", False)]
)
def test_training_through_several_selections_equals_the_reference(
    model_type: str, tied: bool, dense_start: bool
) -> None:
    model = tiny_model(model_type, tied=tied).double()
    twin = Sparsity(copy.deepcopy(model))
    oracle = MaskedAdamW(twin, learning_rate=3e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, learning_rate=3e-3, weight_decay=0.1)
    sparsity = Sparsity(model, optimizer)
    before = masks_of(sparsity)
    for step in range(12):
        batch = random_batch(step)
        rate = 0.0 if (dense_start and step < 2) or step >= 10 else 0.5 if step < 6 else 0.75
        if step % 2 == 0:
            sparsity.select(
                mlp_rate=rate,
                attention_rate=rate,
                allotment="exempt",
                batch=batch,
                step=step,
                metric="uniform",
                seed=7,
            )
            after = masks_of(sparsity)
            oracle.wake(before, after)
            before = after
        found = token_loss(model, batch)
        (found.total / found.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = train_step(twin, oracle, batch, before)
        assert float(found.total.detach()) / found.labels == pytest.approx(loss, rel=1e-10)
    sparsity.wake_all()
    for (name, ours), theirs in zip(model.named_parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=name)


def test_a_unit_that_wakes_keeps_its_second_moment_and_starts_without_momentum() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    sparsity = Sparsity(model, optimizer)
    weight = model.model.layers[1].mlp.gate_proj.weight
    batch = random_batch(0)
    found = token_loss(model, batch)
    found.total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    square, rows = optimizer.state[weight]["exp_avg_sq"].clone(), weight.detach().clone()
    block = sparsity.mlp[1]
    block.refresh(torch.arange(8, 48), optimizer)
    assert optimizer.state[weight]["exp_avg"].shape == (40, 32)
    block.refresh(torch.arange(48), optimizer)
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], square)
    assert torch.equal(weight, rows)
    assert not optimizer.state[weight]["exp_avg"][:8].any()
    assert optimizer.state[weight]["exp_avg"][8:].all()


def test_refresh_is_refused_while_a_gradient_exists() -> None:
    model = tiny_model()
    sparsity = Sparsity(model)
    token_loss(model, random_batch(0)).total.backward()
    with pytest.raises(RuntimeError, match="gradient"):
        sparsity.mlp[0].refresh(torch.arange(8))


@pytest.mark.parametrize("units", [[], [0, 0], [48], [-1, 2]])
def test_refresh_refuses_what_is_not_a_set_of_units(units: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        Sparsity(tiny_model()).mlp[0].refresh(torch.tensor(units, dtype=torch.long))


def test_a_probe_sees_the_dense_model_and_leaves_the_narrow_one_as_it_was() -> None:
    model = tiny_model()
    sparsity, batch = Sparsity(model), random_batch(2)
    dense = [
        s.clone()
        for s in sparsity.scores(sparsity.blocks, batch, metric="activation", step=0, seed=0)
    ]
    sparsity.select(mlp_rate=0.5, attention_rate=0.5, batch=batch, step=0)
    kept = [p.detach().clone() for p in model.parameters()]
    again = sparsity.scores(sparsity.blocks, batch, metric="activation", step=0, seed=0)
    for before, after in zip(dense, again, strict=True):
        torch.testing.assert_close(before, after)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


@pytest.mark.parametrize("metric", ["activation", "maxip", "uniform"])
def test_selection_keeps_the_highest_scores_and_ignores_padding(metric: str) -> None:
    model = tiny_model()
    sparsity, batch = Sparsity(model), random_batch(3)
    scores = sparsity.scores(sparsity.mlp, batch, metric=metric, step=1, seed=0)
    wider = batch._replace(
        input_ids_BT=torch.nn.functional.pad(batch.input_ids_BT, (0, 8), value=9)
    )
    for a, b in zip(
        scores, sparsity.scores(sparsity.mlp, wider, metric=metric, step=1, seed=0), strict=True
    ):
        torch.testing.assert_close(a, b)
    sparsity.select(
        mlp_rate=0.5, attention_rate=0, allotment="uniform", metric=metric, batch=batch, step=1
    )
    for block, score in zip(sparsity.mlp, scores, strict=True):
        asleep = block.asleep_units
        assert score[block.awake_K].min() >= score[asleep].max()
