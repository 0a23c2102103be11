"""What may be asked, and what a ladder would do, without any work done."""

from __future__ import annotations

import json

import pytest

from sat_core.plan.config import SatConfig
from sat_core.plan.families import shape_of
from sat_core.plan.quote import schedule_preview

from .conftest import create

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
PREVIEW = "/v1/sat/schedules/preview"


def preview(client, **body):
    return client.post(PREVIEW, json={"config": CONFIG} | body)


def test_a_preview_is_the_cores_own_plan(client):
    sat = {"omission_rate": {"mlp": 0.5}, "schedule": {"rungs": 4}}
    answer = preview(client, sat=sat, steps=1000, seq_len=256).json()
    edges = [(r["first_step"], r["last_step"]) for r in answer["rungs"]]
    assert edges == [(1, 50), (51, 700), (701, 775), (776, 850), (851, 925), (926, 1000)]
    rates = [r["omission_rate_mlp"] for r in answer["rungs"]]
    assert rates == [0, 0.5, 0.375, 0.25, 0.125, 0]
    assert answer["mean_omission_rate_mlp"] == pytest.approx(0.38125)
    planned = schedule_preview(
        shape_of(CONFIG), SatConfig(total_steps=1000, mlp_rate=0.5), gpu=True, seq_len=256
    )
    assert answer["speedup_bound"] == pytest.approx(planned["speedup_bound"])
    assert sum(r["steps"] for r in answer["rungs"]) == 1000
    assert all(r["speedup_bound"] >= 1 for r in answer["rungs"])
    assert answer["sparse"] is True


def test_a_local_model_is_read_and_warnings_are_said(client, settings):
    (settings.data_dir / "models/tiny/config.json").write_text(json.dumps(CONFIG))
    body = {"model": "local/tiny", "sat": {"omission_rate": {"mlp": 0.9}}}
    answer = client.post(PREVIEW, json=body).json()
    assert answer["num_parameters"] == shape_of(CONFIG).num_parameters
    assert "0.9" in answer["warnings"][0]
    assert answer["seq_len"] == 1024


@pytest.mark.parametrize(
    ("sat", "code", "param"),
    [
        ({"mode": "off", "omission_rate": {"mlp": 0.5}}, "conflicting_parameters", "sat.mode"),
        ({"train": {"max_seq_len": 2048}}, "invalid_value", "sat.train.max_seq_len"),
        (
            {"omission_rate": {"mlp": 0.5}, "exempt_layers": 4},
            "invalid_value",
            "sat.exempt_layers",
        ),
    ],
)
def test_what_prepare_would_refuse_is_refused_before(client, settings, file_id, sat, code, param):
    (settings.data_dir / "models/tiny/config.json").write_text(json.dumps(CONFIG))
    body = {"model": "local/tiny", "training_file": file_id, "sat": sat}
    good = create(client, file_id).json()["id"]
    answers = [
        create(client, file_id, sat=sat),
        client.post("/v1/fine_tuning/estimates", json=body),
        client.post(f"/v1/fine_tuning/jobs/{good}/clone", json={"sat": sat}),
        client.post(PREVIEW, json={"model": "local/tiny", "sat": sat}),
    ]
    for name in ("validation", "preview") if "train" in sat else ():
        asked = {"model": "local/tiny", **sat["train"]}
        answers.append(client.get(f"/v1/files/{file_id}/{name}", params=asked))
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert len(client.get("/v1/fine_tuning/jobs").json()["data"]) == 1


def test_what_contradicts_itself_is_refused_of_a_model_that_is_here(client, settings, file_id):
    (settings.data_dir / "models/tiny/config.json").write_text(json.dumps(CONFIG))
    both = {
        "hyperparameters": {"learning_rate_multiplier": 2},
        "sat": {"train": {"learning_rate": 1e-3, "max_steps": 10**300}},
    }
    error = create(client, file_id, **both).json()["error"]
    assert (error["code"], error["param"]) == ("conflicting_parameters", "sat.train.learning_rate")
    sharded = {"sat": {"train": {"sharding": "fsdp", "tuning": "lora"}}}
    error = create(client, file_id, **sharded).json()["error"]
    assert (error["code"], error["param"]) == ("conflicting_parameters", "sat.train.sharding")


def test_mode_off_is_one_dense_phase(client):
    answer = preview(client, sat={"mode": "off"}).json()
    assert answer["sparse"] is False
    assert answer["speedup_bound"] == 1


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"config": None}, "missing_required_parameter", "model"),
        ({"model": "local/tiny"}, "conflicting_parameters", "model"),
        ({"config": None, "model": "local/none"}, "unknown_model", "model"),
        ({"config": {"model_type": "rnn"}}, "model_unsupported", "model"),
        ({"config": CONFIG | {"num_hidden_layers": 10**9}}, "invalid_value", "config"),
        ({"sat": {"omision_rate": {}}}, "unknown_parameter", "sat.omision_rate"),
        ({"steps": 0}, "invalid_value", "steps"),
        ({"steps": 10**9}, "invalid_value", "steps"),
        ({"seq_len": 4096}, "invalid_value", "seq_len"),
        ({"ladder": 1}, "unknown_parameter", "ladder"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(client, body, code, param):
    answer = preview(client, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_capabilities_say_what_the_code_knows(client):
    found = client.get("/v1/sat/capabilities").json()
    assert "llama" in found["families"]
    assert found["presets"]["balanced"] == {"mlp": 0.5, "attention": 0.0}
    assert "activation" in found["metrics"]
    assert found["sat"]["properties"]["schedule"]["properties"]["rungs"]["maximum"] == 64
    assert found["limits"]["max_file_bytes"] == 1 << 20
    assert found["workers"]["slots_free"] == {"prepare": 0, "train": 0}
