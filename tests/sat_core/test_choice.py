"""How units are scored and chosen, and how a rate is spread over layers."""

import copy
import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat_core.allotment import GRID, Curve, allot
from sat_core.corpus import IGNORED_LABEL
from sat_core.loss import token_loss
from sat_core.plan.accounting import Cost, step_flops
from sat_core.plan.config import Metric
from sat_core.probe import Probe
from sat_core.selection import select
from sat_core.sparsity import Sparsity
from tests.sat_core.tiny import random_batch, sparsity_of, tiny_model

METRICS = get_args(Metric)


def scores(sparsity: Sparsity, batch: Any, step: int = 0) -> list[torch.Tensor]:
    probe = Probe(sparsity, sparsity.blocks, step, with_errors=False)
    probe.run(batch)
    return [probe.seen[id(b)].score_U for b in sparsity.blocks]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral", "opt", "gpt_neox"])
def test_a_score_is_one_finite_number_a_unit_and_ignores_padding(
    model_type: str, metric: str
) -> None:
    sparsity = sparsity_of(tiny_model(model_type), metric=metric)
    batch = random_batch(3)
    found = scores(sparsity, batch)
    wider = batch._replace(
        input_ids_BT=torch.nn.functional.pad(batch.input_ids_BT, (0, 8), value=9),
        labels_BT=torch.nn.functional.pad(batch.labels_BT, (0, 8), value=-100),
    )
    for block, one, other in zip(sparsity.blocks, found, scores(sparsity, wider), strict=True):
        assert one.shape == (block.num_units,)
        assert one.dtype == torch.float32
        assert bool((one >= 0).all() and one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert len({tuple(s.tolist()) for s in found}) == len(found)
    assert all(p.grad is None for p in sparsity.model.parameters())


def test_scores_are_what_their_formulas_say() -> None:
    model, batch = tiny_model("llama"), random_batch(0)
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[2].mlp
    hooks = [
        mlp.register_forward_pre_hook(lambda _, a: seen.update(x=a[0])),
        mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.update(a=a[0])),
    ]
    with torch.no_grad():
        model(input_ids=batch.input_ids_BT)
    for hook in hooks:
        hook.remove()
    valid = torch.arange(16) < batch.lengths_B[:, None]
    x, a = seen["x"][valid], seen["a"][valid]
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    norm = down.norm(dim=0)
    silu = torch.nn.functional.silu
    wanda = [(w.abs() @ x.norm(dim=0)) for w in (gate, up)]
    expected = {
        "activation": a.abs().mean(0) * norm,
        "fluctuation": a.var(0, correction=0) * norm**2,
        "magnitude": (gate.norm(dim=1) * up.norm(dim=1)).sqrt() * norm,
        "wanda": (wanda[0] * wanda[1]).sqrt() * norm,
        "maxip": (silu(gate @ x.mean(0)) * (up @ x.mean(0))).abs() * norm,
    }
    for metric, wanted in expected.items():
        found = scores(sparsity_of(model, metric=metric), batch)[2]
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-8, msg=metric)


def gate_gradients(model: Any, batch: Any, layer: int) -> torch.Tensor:
    """dL / dm_u at each token, the slow way: a factor on every channel at every token."""
    gates = torch.ones(*batch.input_ids_BT.shape, 48, dtype=torch.float64, requires_grad=True)
    down = model.model.layers[layer].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: (args[0] * gates,))
    total = token_loss(model, batch).total
    hook.remove()
    return torch.autograd.grad(total, gates)[0].flatten(0, 1)


def test_gradient_scores_are_those_of_a_factor_on_every_unit() -> None:
    model, batch = tiny_model("llama").double(), random_batch(0)
    effect = gate_gradients(model, batch, 1)
    labels = token_loss(model, batch).labels
    taylor = scores(sparsity_of(model, metric="taylor"), batch)[1]
    fisher = scores(sparsity_of(model, metric="fisher"), batch)[1]
    torch.testing.assert_close(taylor, effect.sum(0).abs().float(), rtol=1e-5, atol=1e-7)
    wanted = (effect.square().sum(0) / (2 * labels)).float()
    torch.testing.assert_close(fisher, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("metric", ["taylor", "fisher"])
def test_without_a_label_the_last_scores_stand(metric: Any) -> None:
    batch = random_batch(0)
    unlabelled = batch._replace(labels_BT=torch.full_like(batch.labels_BT, IGNORED_LABEL))

    def choose(*batches: Any, **settings: Any) -> Any:
        settings = {"attention_rate": 0.0, "allotment": "sensitivity", "ema": 0.5, **settings}
        sparsity = sparsity_of(tiny_model(), **settings)
        for step, each in enumerate(batches):
            report = sparsity.choose(step, each)
        return report.errors, sparsity.mlp[1].awake_K.tolist(), sparsity.mlp[1].score_U

    first, by_activation = choose(unlabelled, metric=metric), choose(unlabelled)
    assert first[:2] == by_activation[:2]
    assert first[2] is None
    graded, then = choose(batch, metric=metric), choose(batch, unlabelled, metric=metric)
    assert torch.equal(graded[2], then[2])
    assert torch.equal(graded[2], choose(unlabelled, batch, metric=metric)[2])
    assert all(errors[-1][1] > 0 for errors in then[0].values())


def test_taylor_is_the_weights_times_their_gradients() -> None:
    model, batch = tiny_model("llama").double(), random_batch(0)
    token_loss(model, batch).total.backward()
    out = model.model.layers[1].self_attn.o_proj.weight
    groups = (out * out.grad).sum(0).view(2, -1).sum(1).abs()
    model.zero_grad()
    got = scores(sparsity_of(model, metric="taylor"), batch)
    torch.testing.assert_close(got[5], groups.float().detach(), rtol=1e-5, atol=1e-7)


def test_taylor_of_experts_is_their_weights_times_their_gradients() -> None:
    model, batch = tiny_model("mixtral").double(), random_batch(0)
    token_loss(model, batch).total.backward()
    down_EHI = model.model.layers[1].mlp.experts.down_proj
    channels = (down_EHI * down_EHI.grad).sum(1).flatten().abs()
    model.zero_grad()
    sparsity = sparsity_of(model, metric="taylor")
    torch.testing.assert_close(
        scores(sparsity, batch)[1], channels.float().detach(), rtol=1e-5, atol=1e-7
    )
    assert sparsity.choose(0, batch).passes == 3


def test_the_price_of_a_width_is_the_sum_of_its_sleepers() -> None:
    model, batch = tiny_model("llama").double(), random_batch(0)
    sparsity = sparsity_of(model, allotment="sensitivity")
    effect = gate_gradients(model, batch, 2)
    fisher = effect.square().sum(0) / (2 * token_loss(model, batch).labels)
    report = sparsity.choose(0, batch)
    score = sparsity.mlp[2].score_U
    assert report.passes == 2
    assert score is not None
    for rate, cost in report.errors["mlp", 2]:
        sleepers = score.argsort(stable=True)[: round(rate * 48)]
        assert cost == pytest.approx(float(fisher[sleepers].sum()), rel=1e-5)


def test_top_k_keeps_the_best_and_breaks_ties_by_index() -> None:
    assert select(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert select(torch.zeros(5), 3).tolist() == [0, 1, 2]
    assert select(torch.tensor([1.0, 2.0, 9.0, 8.0]), 2, stretches=2).tolist() == [1, 2]


def test_sampling_follows_the_scores_and_its_temperature() -> None:
    weights, random = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.Generator().manual_seed(0)
    draws = [select(weights, 1, selector="sample", random=random).item() for _ in range(4000)]
    share = torch.tensor(draws).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, weights / 10, rtol=0, atol=0.03)
    cold = [
        select(weights, 2, selector="sample", temperature=1e-3, random=random).tolist()
        for _ in range(20)
    ]
    assert all(c == [2, 3] for c in cold)


def test_mixed_keeps_the_best_and_draws_the_rest() -> None:
    random = torch.Generator().manual_seed(1)
    weights = torch.arange(1.0, 21.0)
    picks = [
        select(weights, 10, selector="mixed", explore=0.3, random=random).tolist()
        for _ in range(50)
    ]
    assert all(set(range(13, 20)) <= set(p) and len(set(p)) == 10 for p in picks)
    assert len({tuple(p) for p in picks}) > 10


def test_a_choice_is_a_function_of_seed_and_step() -> None:
    def awake(seed: int, step: int) -> list[list[int]]:
        sparsity = sparsity_of(tiny_model(), selector="sample", seed=seed)
        sparsity.choose(step, random_batch(0))
        return [b.awake_K.tolist() for b in sparsity.blocks]

    assert awake(1, 5) == awake(1, 5)
    assert awake(1, 5) != awake(1, 6)
    assert awake(1, 5) != awake(2, 5)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        select(torch.tensor([1.0, math.nan]), 1)


def test_older_scores_keep_their_weight() -> None:
    sparsity = sparsity_of(tiny_model(), ema=0.75)
    sparsity.choose(0, random_batch(0))
    old = [b.score_U.clone() for b in sparsity.blocks if b.score_U is not None]
    raw = scores(sparsity, random_batch(1))
    sparsity.choose(1, random_batch(1), allot_anew=False)
    for block, before, fresh in zip(sparsity.blocks, old, raw, strict=True):
        torch.testing.assert_close(block.score_U, 0.75 * before + 0.25 * fresh)


curve = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(
    lambda e: Curve(num_units=8, awake=(6, 4, 2), errors=tuple(itertools.accumulate(e)))
)


@given(st.lists(curve, min_size=1, max_size=4), st.sampled_from([0.125, 0.25, 0.5, 0.75]))
def test_allotment_meets_the_budget(curves: list[Curve], rate: float) -> None:
    awake = allot(curves, rate)
    assert sum(8 - k for k in awake) == round(rate * 8 * len(curves))
    assert all(2 <= k <= 8 for k in awake)


@given(st.lists(curve, min_size=2, max_size=3))
def test_allotment_is_the_best_split_of_convex_curves(curves: list[Curve]) -> None:
    convex = [
        Curve(num_units=8, awake=(6, 4, 2), errors=tuple(itertools.accumulate(sorted(_steps(c)))))
        for c in curves
    ]
    table = [dict(zip((8, *c.awake), (0.0, *c.errors), strict=True)) for c in convex]
    budget = 2 * len(convex)
    best = min(
        sum(t[k] for t, k in zip(table, split, strict=True))
        for split in itertools.product((8, 6, 4, 2), repeat=len(convex))
        if sum(8 - k for k in split) == budget
    )
    found = allot(convex, budget / (8 * len(convex)))
    assert sum(t[k] for t, k in zip(table, found, strict=True)) == pytest.approx(best)


def _steps(curve: Curve) -> list[float]:
    return [b - a for a, b in itertools.pairwise((0.0, *curve.errors))]


def test_without_a_gradient_the_price_is_what_goes_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sparsity, "whole", property(lambda _: False))
    model, batch = tiny_model("llama").double(), random_batch(0)
    sparsity = sparsity_of(model, allotment="sensitivity")
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.update(a=a[0])),
        layer.register_forward_hook(lambda _, __, out: seen.update(stream=out)),
    ]
    report = sparsity.choose(0, batch)
    for hook in hooks:
        hook.remove()
    valid = torch.arange(16) < batch.lengths_B[:, None]
    block = sparsity.mlp[1]
    assert block.score_U is not None
    weakest = block.score_U.argsort(stable=True)
    down = block.dense(block.out)
    for rate, error in report.errors["mlp", 1]:
        gone = weakest[: round(rate * 48)]
        missing = seen["a"][valid][:, gone] @ down[:, gone].T
        wanted = (missing.square().sum(1) / seen["stream"][valid].square().sum(1)).mean()
        assert error == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox"])
def test_sensitivity_spends_the_users_rate_on_few_widths(model_type: str) -> None:
    sparsity = sparsity_of(tiny_model(model_type, kv_heads=4), allotment="sensitivity")
    report = sparsity.choose(0, random_batch(0))
    assert sparsity.realised_rates() == pytest.approx((0.5, 0.5), abs=0.05)
    widths = {b.num_awake for b in sparsity.mlp}
    assert len(widths) <= len(GRID) + 2
    errors = [e for _, e in report.errors["mlp", 0]]
    assert errors == sorted(errors)
    assert report.dense_loss is not None


@pytest.mark.parametrize(
    ("allotment", "pooled"), [("uniform", False), ("sensitivity", False), ("sensitivity", True)]
)
def test_exempt_layers_stay_dense_and_the_others_give_their_share(
    allotment: Any, pooled: bool
) -> None:
    model = tiny_model("llama", kv_heads=4, num_hidden_layers=6)
    sparsity = sparsity_of(model, mlp_rate=0.5, attention_rate=0.25, allotment=allotment, exempt_layers=1, pooled=pooled)  # fmt: skip
    sparsity.choose(0, random_batch(0))
    for blocks in (sparsity.mlp, sparsity.attention):
        assert [b.num_awake == b.num_units for b in (blocks[0], blocks[-1])] == [True, True]
    assert any(b.num_awake < b.num_units for b in sparsity.blocks)
    if not pooled:
        # Tiles of eight are coarse on 48 channels.
        assert sparsity.realised_rates()[0] == pytest.approx(0.5, abs=0.06)


def test_one_budget_is_spent_on_either_kind() -> None:
    model, batch = tiny_model("llama", kv_heads=4), random_batch(0)
    apart = sparsity_of(
        copy.deepcopy(model), mlp_rate=0.5, attention_rate=0.25, allotment="sensitivity"
    )
    pooled = sparsity_of(
        model, mlp_rate=0.5, attention_rate=0.25, allotment="sensitivity", pooled=True
    )
    reports = [s.choose(0, batch) for s in (apart, pooled)]
    cost = Cost(tokens=1, attended_pairs=0, labels=0)
    flops = [step_flops(s.shape, s.widths, cost) for s in (apart, pooled)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    assert pooled.realised_rates() != apart.realised_rates()

    def lost(sparsity: Sparsity, report: Any) -> float:
        total = 0.0
        for block in sparsity.blocks:
            rate = 1 - block.num_awake / block.num_units
            points = [(0.0, 0.0), *report.errors[block.kind, block.layer]]
            total += float(np.interp(rate, *zip(*points, strict=True)))
        return total

    assert lost(pooled, reports[1]) < lost(apart, reports[0])
