"""The report on a run, and the same run once more with changes."""

from __future__ import annotations

import pytest

from api.routes.after import merge_patch

from .conftest import create, upload
from .finished import claim_job, fail_job, finish_job, new_job, train_job

JOBS = "/v1/fine_tuning/jobs"


def selection(step: int, gap: float | None) -> dict:
    return {
        "seq": 9000 + step,
        "time": 1.0,
        "kind": "selection",
        "step": step,
        "stage_begins": True,
        "share": 1.0,
        "dense_loss": 2.0,
        "sparse_loss": None if gap is None else 2.0 + gap,
        "gap": gap,
        "seconds": 0.1,
        "errors": [],
        "blocks": [
            {"kind": "mlp", "layer": 0, "awake_share": 0.5, "coverage": 0.5},
            {"kind": "mlp", "layer": 1, "awake_share": 0.5, "coverage": 0.7},
        ],
    }


def test_the_configuration_is_there_at_any_time_and_makes_the_same_job(client, services, file_id):
    asked = {"sat": {"omission_rate": {"mlp": 0.3}}, "suffix": "x", "seed": 7}
    job = create(client, file_id, **asked).json()
    waiting = client.get(f"{JOBS}/{job['id']}/config").json()
    assert (waiting["resolved"], waiting["hardware"]) == (None, None)
    again = client.post(JOBS, json=waiting["body"])
    assert again.status_code == 200, again.text
    assert client.get(f"{JOBS}/{again.json()['id']}/config").json()["body"] == waiting["body"]
    claim_job(services, 40)
    assert client.get(f"{JOBS}/{job['id']}/config").json()["resolved"]["total_steps"] == 40
    (file,) = waiting["files"]
    assert (file["id"], len(file["sha256"])) == (file_id, 64)
    for one in (job, again.json()):
        client.post(f"{JOBS}/{one['id']}/cancel")
    for claim in services.store.leases():
        services.store.expire(claim, max_failures=1, retry_seconds=0)
    client.delete(f"/v1/files/{file_id}")
    gone = {"id": file_id, "filename": None, "sha256": None}
    assert client.get(f"{JOBS}/{job['id']}/config").json()["files"] == [gone]
    assert client.get(f"{JOBS}/ftjob-none/config").json()["error"]["code"] == "job_not_found"


def test_the_report_of_a_run_says_what_it_cost_and_saved(client, services):
    job = new_job(services)
    claim = train_job(services, steps=10, total=40)
    unfinished = client.get(f"{JOBS}/{job}/report")
    assert (unfinished.status_code, unfinished.json()["error"]["code"]) == (409, "not_finished")
    told = [selection(11, 0.05), selection(12, None)]
    services.store.record(claim, told, run="runs/x/2", read_position=2)
    services.store.spent(claim, 5000.0)
    name = finish_job(services, steps=40, claim=claim, first=11)

    report = client.get(f"{JOBS}/{job}/report").json()
    assert (report["status"], report["fine_tuned_model"]) == ("succeeded", name)
    assert report["steps"] == 40
    assert report["time"]["quoted_seconds"] == {"low": 600, "expected": 700, "high": 800}
    assert 0 <= report["time"]["queue_seconds"] < 60
    assert report["time"]["training_seconds"] == 745.0
    assert report["time"]["speed_up"] == pytest.approx(1003.0 / 745.0)
    assert report["flops"]["saved"] == pytest.approx(0.8e14)
    assert report["flops"]["share_of_dense"] == pytest.approx(1.9 / 2.7)
    assert report["flops"]["quoted"] == 2e14
    assert report["memory"]["peak_bytes"] == 1 << 30
    assert report["memory"]["quoted_bytes"]["expected"] == 1e9
    assert report["energy"] == {"quoted_joules": None, "joules": 5000.0}
    assert report["held_out_loss"] == {"before": 4.75, "after": 2.23}
    assert report["forgetting_loss"] == {"before": None, "after": None}
    (gap,) = report["dense_gaps"]
    assert (gap["step"], gap["gap"]) == (11, 0.05)
    assert report["coverage"] == [{"kind": "mlp", "blocks": 2, "mean": 0.6, "least": 0.5}]
    assert [(a["stage"], a["outcome"]) for a in report["attempts"]] == [
        ("prepare", "prepared"),
        ("train", "succeeded"),
    ]
    assert len(report["samples"]) == 1


def test_a_run_that_failed_has_a_report_of_what_was_measured(client, services):
    job = new_job(services)
    fail_job(services, "loss_not_finite", "The loss is not finite.")
    report = client.get(f"{JOBS}/{job}/report").json()
    assert (report["status"], report["error"]["code"]) == ("failed", "loss_not_finite")
    assert report["time"]["training_seconds"] > 0
    assert report["flops"]["spent"] == 3e12
    assert report["flops"]["saved"] is None
    assert report["coverage"] == []
    assert report["energy"]["joules"] is None, "no meter told of it"


def test_a_job_that_never_came_so_far_was_quoted_nothing(client, services):
    job = new_job(services)
    services.store.cancel_job("default", job)
    report = client.get(f"{JOBS}/{job}/report").json()
    assert report["time"]["quoted_seconds"] is report["flops"]["quoted"] is None
    assert report["time"]["queue_seconds"] is None


def test_the_report_of_no_job_is_404(client):
    assert client.get(f"{JOBS}/ftjob-none/report").json()["error"]["code"] == "job_not_found"


def test_a_clone_is_the_same_job_with_the_changes(client, file_id):
    sat = {"omission_rate": {"mlp": 0.5, "attention": 0.25}, "train": {"max_steps": 9}}
    first = create(
        client,
        file_id,
        suffix="one",
        seed=7,
        metadata={"a": "1", "b": "2"},
        hyperparameters={"n_epochs": 3, "batch_size": 4},
        sat=sat,
    ).json()
    same = client.post(f"{JOBS}/{first['id']}/clone", json={})
    assert same.status_code == 200
    equal = ("model", "training_file", "seed", "metadata", "hyperparameters", "sat")
    assert {k: same.json()[k] for k in equal} == {k: first[k] for k in equal}
    assert same.json()["user_provided_suffix"] == "one"
    assert same.json()["id"] != first["id"]
    assert same.headers["location"] == f"{JOBS}/{same.json()['id']}"

    changes = {
        "suffix": None,
        "metadata": {"a": None, "c": "3"},
        "hyperparameters": {"n_epochs": 5},
        "sat": {"omission_rate": {"mlp": 0.6, "attention": None}},
    }
    changed = client.post(f"{JOBS}/{first['id']}/clone", json=changes).json()
    assert changed["user_provided_suffix"] is None
    assert changed["metadata"] == {"b": "2", "c": "3"}
    assert changed["hyperparameters"]["n_epochs"] == 5
    assert changed["hyperparameters"]["batch_size"] == 4
    assert changed["sat"]["omission_rate"]["mlp"] == 0.6
    assert changed["sat"]["omission_rate"]["attention"] is None
    assert changed["sat"]["train"]["max_steps"] == 9

    method = {"supervised": {"hyperparameters": {"batch_size": 2}}}
    by_method = client.post(f"{JOBS}/{first['id']}/clone", json={"method": method}).json()
    assert by_method["hyperparameters"]["n_epochs"] == 3
    assert by_method["hyperparameters"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"sat": {"omision_rate": {}}}, "unknown_parameter", "sat.omision_rate"),
        ({"sat": {"omission_rate": {"mlp": 2}}}, "invalid_value", "sat.omission_rate.mlp"),
        ({"model": "local/none"}, "unknown_model", "model"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"training_file": "file-none"}, "file_not_found", "training_file"),
        ({"sat": 3}, "invalid_value", "sat"),
    ],
)
def test_a_clone_is_checked_as_a_create_is(client, file_id, changes, code, param):
    job = create(client, file_id).json()["id"]
    error = client.post(f"{JOBS}/{job}/clone", json=changes).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_a_clone_needs_its_files_still(client):
    file_id = upload(client, b'{"text": "hello there"}\n').json()["id"]
    job = create(client, file_id).json()["id"]
    client.post(f"{JOBS}/{job}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    error = client.post(f"{JOBS}/{job}/clone", json={}).json()["error"]
    assert error["code"] == "file_not_found"
    assert client.post(f"{JOBS}/ftjob-none/clone", json={}).status_code == 404


def test_a_clone_is_made_once(client, file_id):
    job = create(client, file_id).json()["id"]
    headers = {"Idempotency-Key": "again"}
    made = [client.post(f"{JOBS}/{job}/clone", json={}, headers=headers) for _ in range(2)]
    assert made[0].json()["id"] == made[1].json()["id"]
    assert made[1].headers["idempotent-replayed"] == "true"
    assert len(client.get(JOBS).json()["data"]) == 2


def test_merge_patch_is_that_of_the_rfc():
    target = {
        "title": "Goodbye!",
        "author": {"givenName": "John", "familyName": "Doe"},
        "tags": [1],
    }
    patch = {"title": "Hello!", "phone": "1", "author": {"familyName": None}, "tags": [2]}
    assert merge_patch(target, patch) == {
        "title": "Hello!",
        "author": {"givenName": "John"},
        "tags": [2],
        "phone": "1",
    }
    assert merge_patch({"a": 1}, {"a": {"b": {"c": None}}}) == {"a": {"b": {}}}


def test_a_model_says_where_it_comes_from(client, services):
    job = new_job(services)
    claim = train_job(services, steps=10, total=40)
    saved = {
        "seq": 900,
        "time": 1.0,
        "kind": "checkpoint",
        "step": 10,
        "path": "checkpoints/step-000010",
        "size_bytes": 1,
        "metrics": {},
    }
    services.store.record(claim, [saved], run="runs/x/2", read_position=2)
    result = finish_job(services, steps=40, claim=claim, first=11)
    found = [client.get(f"/v1/models/{name}").json() for name in (result, f"{result}:ckpt-step-10")]
    assert [(m["base"], m["job"], m["checkpoint"]) for m in found] == [
        ("local/tiny", job, None),
        ("local/tiny", job, 10),
    ]
    assert client.get("/v1/models/local/tiny").json()["checkpoint"] is None
