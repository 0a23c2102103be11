"""Blocks that narrow and widen: what moves with a unit, what is refused, other units than whole KV groups."""

from typing import Any

import pytest
import torch

from sat_core.loss import token_loss
from sat_core.optim import build_optimizer
from sat_core.plan.errors import ConfigError
from sat_core.reference import masked_loss, masks_of
from sat_core.sparsity import Sparsity
from tests.sat_core.beside import train_beside_the_reference
from tests.sat_core.tiny import random_batch, sparsity_of, tiny_model


def test_a_unit_that_wakes_keeps_its_second_moment_and_starts_without_momentum() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    sparsity = sparsity_of(model, optimizer)
    weight = model.model.layers[1].mlp.gate_proj.weight
    found = token_loss(model, random_batch(0))
    found.total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    square, rows = optimizer.state[weight]["exp_avg_sq"].clone(), weight.detach().clone()
    block = sparsity.mlp[1]
    block.refresh(torch.arange(8, 48), optimizer)
    assert optimizer.state[weight]["exp_avg"].shape == (40, 32)
    assert model.model.layers[1].mlp.gate_proj.out_features == 40
    block.refresh(torch.arange(48), optimizer)
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], square)
    assert torch.equal(weight, rows)
    assert not optimizer.state[weight]["exp_avg"][:8].any()
    assert optimizer.state[weight]["exp_avg"][8:].all()


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("gpt2", {"attention_unit": "query_head"}, "for gpt2 only 'kv_group' is supported"),
        ("mixtral", {"compensation": True}, "inside experts it is not supported"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    model_type: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        sparsity_of(tiny_model(model_type), **settings)


def test_refresh_is_refused_while_a_gradient_exists() -> None:
    model = tiny_model()
    sparsity = sparsity_of(model)
    token_loss(model, random_batch(0)).total.backward()
    with pytest.raises(RuntimeError, match="gradient"):
        sparsity.mlp[0].refresh(torch.arange(8))


@pytest.mark.parametrize("units", [[], [0, 0], [48], [-1, 2]])
def test_refresh_refuses_what_is_not_a_set_of_units(units: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        sparsity_of(tiny_model()).mlp[0].refresh(torch.tensor(units, dtype=torch.long))


def test_refresh_refuses_experts_of_different_widths() -> None:
    block = sparsity_of(tiny_model("mixtral")).mlp[0]
    with pytest.raises(ValueError, match=r"equally many .* \[3, 1, 0, 0\]"):
        block.refresh(torch.tensor([0, 1, 2, 48]))


def test_every_expert_keeps_channels_of_its_own() -> None:
    sparsity = sparsity_of(tiny_model("mixtral"))
    sparsity.choose(0, random_batch(0))
    chosen = (sparsity.mlp[0].awake_K.view(4, -1) - torch.arange(4)[:, None] * 48).tolist()
    assert len({tuple(units) for units in chosen}) == 4
    assert sparsity.model.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 24)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_equally_many_query_heads_of_every_group_may_sleep(model_type: str, kv_heads: int) -> None:
    model = tiny_model(model_type, kv_heads=kv_heads).double()

    def look(step: int, sparsity: Sparsity) -> None:
        if step == 0:
            assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
            assert model.model.layers[0].self_attn.k_proj.weight.shape == (8 * kv_heads, 32)
            per_group = sparsity.attention[0].awake_K // (4 // kv_heads)
            assert per_group.bincount().tolist() == [2 // kv_heads] * kv_heads

    ours, theirs = train_beside_the_reference(
        model, steps=6, rel=1e-10, look=look, attention_unit="query_head"
    )
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_sleepers_may_wait_in_host_memory() -> None:
    runs = []
    for where in ("device", "host"):
        model = tiny_model()
        optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1)
        sparsity = sparsity_of(model, optimizer, asleep_on=where, total_steps=6, refresh_every=2)
        for step in range(6):
            sparsity.begin_step(step, random_batch(step))
            token_loss(model, random_batch(step)).total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sparsity.wake_all()
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_probe_sees_the_dense_model_and_leaves_the_narrow_one_as_it_was() -> None:
    model = tiny_model()
    sparsity, batch = sparsity_of(model), random_batch(2)
    first = sparsity.choose(0, batch)
    dense = [b.score_U.clone() for b in sparsity.blocks if b.score_U is not None]
    kept = [p.detach().clone() for p in model.parameters()]
    again = sparsity.choose(0, batch)
    assert first.dense_loss == again.dense_loss
    assert len(dense) == 8
    for block, before in zip(sparsity.blocks, dense, strict=True):
        assert block.score_U is not None
        torch.testing.assert_close(before, block.score_U)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_compensation_adds_what_sleepers_give_on_average() -> None:
    model, batch = tiny_model().double(), random_batch(1)
    valid = torch.arange(16) < batch.lengths_B[:, None]
    sparsity = sparsity_of(model, compensation=True, attention_rate=0.0)

    def mean_output() -> torch.Tensor:
        seen = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            model(input_ids=batch.input_ids_BT)
        hook.remove()
        return seen[0][valid].mean(0)

    dense = mean_output()
    sparsity.choose(0, batch)
    torch.testing.assert_close(mean_output(), dense, rtol=1e-5, atol=1e-9)
    bias = sparsity.bias.copy()
    sparsity.bias.clear()
    assert not torch.allclose(mean_output(), dense, rtol=1e-3)
    sparsity.bias.update(bias)
    sparsity.wake_all()
    assert torch.equal(mean_output(), dense)


def test_the_masked_twin_is_a_different_model() -> None:
    """The oracle is only worth something where masking changes the loss."""
    sparsity = sparsity_of(tiny_model().double())
    dense = masks_of(sparsity)
    sparsity.choose(0, random_batch(1))
    masks = masks_of(sparsity)
    sparsity.wake_all()
    a, b = (float(masked_loss(sparsity, m, random_batch(1)).detach()) for m in (dense, masks))
    assert abs(a - b) > 1e-5
