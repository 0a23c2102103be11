"""Schedules, rates, FLOPs and settings: pure data."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sat_core.model import Sparsity, token_loss
from sat_core.plan.accounting import step_flops
from sat_core.plan.errors import ConfigError
from sat_core.plan.request import RunRequest, sat_json_schema
from sat_core.plan.schedule import Ladder, awake_units, layer_rates
from tests.sat_core.tiny import random_batch, tiny_model


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.integers(1, 9))
def test_phases_cover_every_step_once_and_end_dense(
    total: int, start: float, share: float, rungs: int
) -> None:
    ladder = Ladder(total_steps=total, dense_start=start, sparse_share=share, rungs=rungs)
    phases = ladder.phases()
    assert [s for p in phases for s in range(p.first_step, p.last_step + 1)] == list(range(total))
    assert all(ladder.share_at(s) == p.share for p in phases for s in (p.first_step, p.last_step))
    shares = [p.share for p in phases if p.state != "training_dense_start"]
    assert shares == sorted(shares, reverse=True)
    if total > int(share * total):
        assert phases[-1].share == 0


def test_the_ladder_of_the_documentation() -> None:
    ladder = Ladder(total_steps=1000, dense_start=0.05, sparse_share=0.7, rungs=4)
    found = [(p.first_step, p.last_step, p.share) for p in ladder.phases()]
    assert found == [
        (0, 49, 0),
        (50, 699, 1),
        (700, 774, 0.75),
        (775, 849, 0.5),
        (850, 924, 0.25),
        (925, 999, 0),
    ]


@given(st.floats(0, 0.99), st.integers(1, 80), st.sampled_from(["uniform", "exempt"]))
def test_layers_share_the_rate_the_user_set(rate: float, layers: int, allotment: str) -> None:
    rates = layer_rates(rate, layers, allotment)
    assert len(rates) == layers
    assert sum(rates) / layers == pytest.approx(rate, abs=1e-9)
    assert all(0 <= r < 1 for r in rates)


def test_exempt_layers_stay_dense() -> None:
    assert layer_rates(0.5, 6, "exempt") == (0, 0.75, 0.75, 0.75, 0.75, 0)


@given(st.integers(1, 20000), st.floats(0, 0.999), st.sampled_from([1, 8, 128]))
def test_at_least_one_unit_stays_awake(units: int, rate: float, multiple: int) -> None:
    awake = awake_units(units, rate, multiple)
    assert 1 <= awake <= units
    assert awake == units or awake % multiple == 0


def test_flops_agree_with_torchs_own_counter() -> None:
    model = tiny_model()
    sparsity, batch = Sparsity(model), random_batch(0, rows=2, width=16)
    for rate in (0.0, 0.5):
        sparsity.select(
            mlp_rate=rate, attention_rate=rate, batch=batch, step=0, allotment="uniform"
        )
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            found = token_loss(model, batch)
            found.total.backward()
        model.zero_grad()
        rows, width = batch.input_ids_BT.shape
        counted = step_flops(
            sparsity.shape, sparsity.widths,
            tokens=rows * width, attended_pairs=rows * width * width, labels=found.positions,
        )  # fmt: skip
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"sat": {"omision_rate": {}}}, "sat.omision_rate", "Did you mean 'omission_rate'"),
        ({"sat": {"omission_rate": {"mlp": 1.0}}}, "sat.omission_rate.mlp", "below 1"),
        (
            {"sat": {"omission_rate": {"attention": -1}}},
            "sat.omission_rate.attention",
            "at least 0",
        ),
        ({"sat": {"omission_rate": {"mlp": float("nan")}}}, "sat.omission_rate.mlp", "a number"),
        ({"sat": {"omission_rate": {"mlp": True}}}, "sat.omission_rate.mlp", "a number"),
        ({"sat": {"importance": {"metric": "wnda"}}}, "sat.importance.metric", "allowed: maxip"),
        ({"sat": {"train": {"max_steps": 1.5}}}, "sat.train.max_steps", "an integer"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "at least 1"),
        ({"method": {"type": "dpo"}}, "method.type", "only 'supervised'"),
        ({"seed": -1}, "seed", "2147483647"),
        ({"sat": []}, "sat", "an object"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(
    body: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunRequest.from_dict({"model": "m", **body})
    assert caught.value.param == param
    assert words in caught.value.message


def test_a_request_survives_its_json_form() -> None:
    body = {
        "model": "m",
        "seed": 1,
        "hyperparameters": {"n_epochs": 2},
        "sat": {"eval": {"prompts": ["x"]}},
    }
    request = RunRequest.from_dict(body)
    assert RunRequest.from_dict(request.to_dict()) == request


def test_the_schema_lists_every_setting_with_its_limits() -> None:
    schema = sat_json_schema()
    rate = schema["properties"]["omission_rate"]["properties"]["mlp"]["anyOf"][0]
    assert (rate["minimum"], rate["exclusiveMaximum"]) == (0, 1)
    assert schema["properties"]["importance"]["properties"]["metric"]["enum"] == [
        "maxip",
        "activation",
        "uniform",
    ]


def test_the_plan_loads_no_torch() -> None:
    code = "import sat_core, sat_core.plan.resolve, sat_core.plan.formats, sys; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsupported_families_are_named(tmp_path: object) -> None:
    from sat_core.plan.errors import ModelError
    from sat_core.plan.families import shape_of

    with pytest.raises(ModelError, match=r"'bert' is not supported; supported: llama"):
        shape_of({"model_type": "bert"})
    assert torch.get_default_dtype() == torch.float32
