"""Schedules, rates, FLOPs and settings: pure data."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sat_core.loss import token_loss
from sat_core.plan.accounting import Cost, preview, run_flops_ratio, step_flops
from sat_core.plan.config import SatConfig
from sat_core.plan.errors import ConfigError
from sat_core.plan.request import RunRequest, sat_json_schema
from sat_core.plan.resolve import resolve
from sat_core.plan.schedule import Ladder, awake_units, exempt_layers, layer_rates
from tests.sat_core.tiny import random_batch, sparsity_of, tiny_model


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 9),
    st.sampled_from(["ladder", "linear", "cosine"]),
)
def test_phases_cover_every_step_once_and_end_dense(
    total: int, start: float, share: float, rungs: int, type: str
) -> None:
    ladder = Ladder(
        total_steps=total, dense_start=start, sparse_share=share, rungs=rungs, type=type
    )
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


@given(st.floats(0, 0.99), st.integers(1, 80), st.integers(0, 40))
def test_layers_share_the_rate_the_user_set(rate: float, layers: int, exempt: int) -> None:
    rates = layer_rates(rate, layers, exempt)
    assert len(rates) == layers
    assert sum(rates) / layers == pytest.approx(rate, abs=1e-9)
    assert all(0 <= r < 1 for r in rates)


def test_exempt_layers_stay_dense() -> None:
    assert exempt_layers("exempt", None, 6) == 1
    assert exempt_layers("sensitivity", None, 6) == 0
    assert exempt_layers("sensitivity", 2, 6) == 2
    assert layer_rates(0.5, 6, 1) == (0, 0.75, 0.75, 0.75, 0.75, 0)


@given(st.integers(1, 20000), st.floats(0, 0.999), st.sampled_from([1, 8, 128]))
def test_at_least_one_unit_stays_awake(units: int, rate: float, multiple: int) -> None:
    awake = awake_units(units, rate, multiple)
    assert 1 <= awake <= units
    assert awake == units or awake % multiple == 0


@pytest.mark.parametrize("type", ["ladder", "linear", "cosine"])
def test_every_schedule_has_as_few_widths_as_the_ladder(type: str) -> None:
    ladder = Ladder(total_steps=1000, dense_start=0.1, sparse_share=0.5, rungs=4, type=type)
    assert {p.share for p in ladder.phases()} == {0, 0.25, 0.5, 0.75, 1}


def test_a_preview_is_the_run_that_will_be() -> None:
    shape = sparsity_of(tiny_model()).shape
    sat = SatConfig(total_steps=100, mlp_rate=0.5, allotment="uniform")
    rows = preview(shape, sat, multiple=8, seq_len=16)
    assert [(r["first_step"], r["last_step"], r["omission_rate_mlp"]) for r in rows] == [
        (1, 5, 0), (6, 70, 0.5), (71, 78, 0.375), (79, 85, 0.25), (86, 93, 0.125), (94, 100, 0),
    ]  # fmt: skip
    assert [r["mlp_channels"] for r in rows] == [48, 24, 32, 32, 40, 48]
    assert rows[0]["flops_share"] == 1
    assert 0 < rows[1]["flops_share"] < run_flops_ratio(shape, sat, multiple=8, seq_len=16) < 1


@pytest.mark.parametrize(
    ("model_type", "unit"),
    [("llama", "kv_group"), ("llama", "query_head"), ("gpt2", "kv_group"), ("falcon", "kv_group")],
)
def test_flops_agree_with_torchs_own_counter(model_type: str, unit: str) -> None:
    model = tiny_model(model_type)
    batch = random_batch(0, rows=2, width=16)
    sparsity = sparsity_of(model, attention_unit=unit)
    for narrow in (False, True):
        if narrow:
            sparsity.choose(0, batch)
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            found = token_loss(model, batch)
            found.total.backward()
        model.zero_grad()
        rows, width = batch.input_ids_BT.shape
        cost = Cost(tokens=rows * width, attended_pairs=rows * width * width, labels=found.labels)
        counted = step_flops(sparsity.shape, sparsity.widths, cost)
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
        (
            {"sat": {"importance": {"metric": "wnda"}}},
            "sat.importance.metric",
            "allowed: activation",
        ),
        ({"sat": {"train": {"max_steps": 1.5}}}, "sat.train.max_steps", "an integer"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "at least 1"),
        ({"method": {"type": "dpo"}}, "method.type", "only 'supervised'"),
        ({"seed": -1}, "seed", "2147483647"),
        ({"sat": []}, "sat", "an object"),
        ({"sat": {"compensation": 1}}, "sat.compensation", "true or false"),
        ({"sat": {"data": {"mix": [{"weight": 1, "fil": "x"}]}}}, "sat.data.mix.0.fil", "'file'"),
        ({"sat": {"data": {"mix": [{"file": ""}]}}}, "sat.data.mix.0.file", "not empty"),
        ({"sat": {"eval": {"prompts": ["a", ""]}}}, "sat.eval.prompts.1", "not empty"),
        ({"sat": {"eval": {"prompts": [None]}}}, "sat.eval.prompts.0", "not empty"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(
    body: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunRequest.from_dict({"model": "m", **body})
    assert caught.value.param == param
    assert words in caught.value.message


FIGURES = {"sequences": 100, "seq_len": 16, "longest": 16, "rows": 100, "packed": True, "format": "text"}  # fmt: skip


@pytest.mark.parametrize(
    ("sat", "rates"),
    [
        ({"mode": "on"}, (0.5, 0.0)),
        ({"mode": "on", "preset": "safe"}, (0.3, 0.0)),
        ({"mode": "on", "preset": "fast"}, (0.65, 0.25)),
        ({"preset": "fast", "omission_rate": {"mlp": 0.4}}, (0.4, 0.0)),
        ({"preset": "fast", "omission_rate": {"attention": 0.5}}, (0.0, 0.5)),
        ({"mode": "off", "preset": "fast"}, (0.0, 0.0)),
    ],
)
def test_a_preset_stands_where_no_rate_is_given(
    sat: dict[str, object], rates: tuple[float, float]
) -> None:
    request = RunRequest.from_dict({"model": "m", "sat": sat})
    shape = sparsity_of(tiny_model()).shape
    made = resolve(request, shape, FIGURES, model_path=None, revision=None, corpus="c").config.sat
    assert (made.mlp_rate, made.attention_rate) == rates


@pytest.mark.parametrize(
    ("hidden", "seq_len", "said"),
    [(64, 16, "width 64 has no channel to spare"), (128, 16, None), (128, 16384, "bound the speed-up")],
)  # fmt: skip
def test_auto_trains_dense_where_sparsity_is_not_worth_it(
    hidden: int, seq_len: int, said: str | None
) -> None:
    shape = sparsity_of(tiny_model(hidden_size=hidden, intermediate_size=4 * hidden)).shape
    figures = {**FIGURES, "seq_len": seq_len, "sequences": 1000}
    made = resolve(
        RunRequest.from_dict({"model": "m"}), shape, figures, model_path=None, revision=None, corpus="c"
    )  # fmt: skip
    assert (made.config.sat.mlp_rate == 0) == (said is not None)
    assert said is None or any(said in warning for warning in made.warnings)


@pytest.mark.parametrize(("sparse_share", "warned"), [(1.0, True), (0.99, False)])
def test_a_run_that_ends_sparse_is_warned_of(sparse_share: float, warned: bool) -> None:
    sat = {"omission_rate": {"mlp": 0.5}, "schedule": {"sparse_share": sparse_share}}
    request = RunRequest.from_dict({"model": "m", "sat": sat})
    shape = sparsity_of(tiny_model()).shape
    made = resolve(request, shape, FIGURES, model_path=None, revision=None, corpus="c")
    assert any("the run ends sparse" in w for w in made.warnings) == warned
    assert (made.config.sat.ladder.phases()[-1].share == 0) != warned


def test_as_many_layers_are_exempt_as_the_others_can_make_up_for() -> None:
    shape = sparsity_of(tiny_model(num_hidden_layers=6)).shape

    def stated(asked: int | None) -> int | None:
        sat = {"omission_rate": {"mlp": 0.5}, "exempt_layers": asked}
        request = RunRequest.from_dict({"model": "m", "sat": sat})
        made = resolve(request, shape, FIGURES, model_path=None, revision=None, corpus="c")
        return made.config.sat.exempt_layers

    assert (stated(None), stated(1)) == (0, 1)
    with pytest.raises(ConfigError, match="at most 1 of 6 layers"):
        stated(2)


@pytest.mark.parametrize(("tuning", "base"), [("full", 1e-3), ("lora", 4e-3)])
def test_the_multiplier_scales_a_base_for_the_tuning(tuning: str, base: float) -> None:
    shape = sparsity_of(tiny_model()).shape

    def stated(train: dict[str, object], multiplier: float | None = None) -> tuple[float, float]:
        hyper = {"learning_rate_multiplier": multiplier}
        sat = {"mode": "off", "train": {"tuning": tuning, **train}}
        request = RunRequest.from_dict({"model": "m", "hyperparameters": hyper, "sat": sat})
        made = resolve(request, shape, FIGURES, model_path=None, revision=None, corpus="c")
        return made.config.learning_rate, made.hyperparameters["learning_rate_multiplier"]

    assert stated({}) == (base, 1)
    assert stated({}, 0.5) == (base / 2, 0.5)
    assert stated({"learning_rate": 2 * base}) == (2 * base, 2)


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
    metrics = schema["properties"]["importance"]["properties"]["metric"]["enum"]
    assert metrics[0] == "activation"
    assert len(metrics) == 8
    assert schema["properties"]["data"]["properties"]["mix"]["items"]["type"] == "object"
    assert schema["properties"]["eval"]["properties"]["prompts"]["items"]["minLength"] == 1


def test_the_plan_loads_no_torch() -> None:
    code = "import sat_core, sat_core.plan.resolve, sat_io.formats, sys; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsupported_families_are_named(tmp_path: object) -> None:
    from sat_core.plan.errors import ModelError
    from sat_core.plan.families import shape_of

    with pytest.raises(ModelError, match=r"'bert' is not supported; supported: llama"):
        shape_of({"model_type": "bert"})
    assert torch.get_default_dtype() == torch.float32
