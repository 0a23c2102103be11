"""What may be asked of trackers, what is shown of them, and that a secret never leaves."""

from __future__ import annotations

import pytest

from .conftest import create

JOBS, SECRETS = "/v1/fine_tuning/jobs", "/v1/sat/secrets"
WANDB = {"type": "wandb", "wandb": {"project": "p", "name": "n", "entity": "e", "tags": ["a"]}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "x", "tags": {"team": "a"}}}
TENSORBOARD = {"type": "tensorboard"}


def test_a_job_says_where_its_metrics_go_as_well(client, file_id):
    made = create(client, file_id, integrations=[WANDB, MLFLOW, TENSORBOARD]).json()
    assert made["integrations"] == [WANDB], "OpenAI's clients know no other type"
    shown = client.get(f"{JOBS}/{made['id']}/integrations").json()["data"]
    assert [(i["type"], i["status"], i["step"]) for i in shown] == [
        ("wandb", "open", None),
        ("mlflow", "open", None),
        ("tensorboard", "open", None),
    ]
    assert shown[1]["settings"] == {"experiment": "x", "name": None, "tags": {"team": "a"}}

    same = client.post(f"{JOBS}/{made['id']}/clone", json={}).json()
    again = client.get(f"{JOBS}/{same['id']}/integrations").json()["data"]
    assert [i["settings"] for i in again] == [i["settings"] for i in shown]
    none = client.post(f"{JOBS}/{made['id']}/clone", json={"integrations": None}).json()
    assert client.get(f"{JOBS}/{none['id']}/integrations").json()["data"] == []


@pytest.mark.parametrize(
    ("entries", "code", "param", "words"),
    [
        ("wandb", "invalid_value", "integrations", "allowed is a list of objects"),
        (["wandb"], "invalid_value", "integrations.0", "allowed is an object"),
        ([{"type": "comet"}], "invalid_value", "integrations.0.type", "one of mlflow, tensorboard, wandb"),
        ([{}], "invalid_value", "integrations.0.type", "one of"),
        ([TENSORBOARD] * 2, "conflicting_parameters", "integrations.1.type", "each type once"),
        ([{"type": "wandb"}], "missing_required_parameter", "integrations.0.wandb.project", "a string"),
        ([{"type": "wandb", "wandb": {"projekt": "p"}}], "unknown_parameter", "integrations.0.wandb.projekt", "Did you mean"),
        ([{"type": "wandb", "mlflow": {}}], "unknown_parameter", "integrations.0.mlflow", ""),
        ([WANDB, {"type": "mlflow", "mlflow": {"experiment": ""}}], "invalid_value", "integrations.1.mlflow.experiment", "1 to 128"),
        ([{"type": "tensorboard", "tensorboard": None}], "invalid_value", "integrations.0.tensorboard", "an object"),
        ([{"type": "mlflow", "mlflow": {"experiment": "a\x01b"}}], "invalid_value", "integrations.0.mlflow.experiment", "can be seen"),
        ([{"type": "mlflow", "mlflow": {"experiment": "x", "tags": {"mlflow.user": "root"}}}], "invalid_value", "integrations.0.mlflow.tags", "not beginning"),
        ([{"type": "mlflow", "mlflow": {"experiment": "x", "tracking_uri": "http://db"}}], "unknown_parameter", "integrations.0.mlflow.tracking_uri", ""),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(client, file_id, entries, code, param, words):
    refused = create(client, file_id, integrations=entries)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, code, param)
    assert words in error["message"]


def test_a_tracker_that_no_worker_can_speak_to_is_refused(client, services, file_id):
    more = {"hostname": "h", "pid": 1, "slots": {"prepare": 1, "train": 1}}
    services.store.register_worker("w-1", **more, integrations=["tensorboard"])
    services.queueing.snapshot(fresh_seconds=0)
    refused = create(client, file_id, integrations=[TENSORBOARD, WANDB])
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "integrations.1.type")
    assert "pip install" in error["message"]
    assert create(client, file_id, integrations=[TENSORBOARD]).status_code == 200


def test_a_secret_is_written_and_never_read(client, services):
    value = "0123456789abcdef"
    put = client.put(f"{SECRETS}/wandb_api_key", json={"value": value})
    assert (put.status_code, put.json()["id"]) == (200, "wandb_api_key")
    assert client.put(f"{SECRETS}/wandb_api_key", json={"value": value[::-1]}).status_code == 200
    listed = client.get(SECRETS)
    assert [s["id"] for s in listed.json()["data"]] == ["wandb_api_key"]
    assert services.store.secret_values("default") == {"wandb_api_key": value[::-1]}
    for answer in (put, listed, client.get("/v1/organization/audit_logs")):
        assert value not in answer.text
        assert value[::-1] not in answer.text
    assert "secret.created" in client.get("/v1/organization/audit_logs").text
    assert client.delete(f"{SECRETS}/wandb_api_key").json()["deleted"] is True
    gone = client.delete(f"{SECRETS}/wandb_api_key")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "secret_not_found")


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("path", {"value": "0123456789"}, "invalid_value"),
        ("wandb_api_key", {}, "missing_required_parameter"),
        ("wandb_api_key", {"value": "short"}, "invalid_value"),
        ("wandb_api_key", {"value": "with a space"}, "invalid_value"),
        ("wandb_api_key", {"value": "0123456789", "scope": 1}, "unknown_parameter"),
    ],
)
def test_secrets_have_names_and_values_that_are_allowed(client, name, body, code):
    refused = client.put(f"{SECRETS}/{name}", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
