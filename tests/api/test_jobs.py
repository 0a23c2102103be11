"""Jobs: what is refused and how it is said, lists, idempotency, cancel, metrics, result."""

from __future__ import annotations

import io
import tarfile

import pytest

from .conftest import ROW, create, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.mark.parametrize(
    ("more", "code", "param", "said"),
    [
        (
            {"sat": {"omission_rate": {"mlp": 1.0}}},
            "invalid_value",
            "sat.omission_rate.mlp",
            "below 1",
        ),
        (
            {"sat": {"omission_rate": {"mlp": -1}}},
            "invalid_value",
            "sat.omission_rate.mlp",
            "at least 0",
        ),
        (
            {"sat": {"importance": {"metric": "maxi"}}},
            "invalid_value",
            "sat.importance.metric",
            "maxip",
        ),
        ({"sat": {"omision_rate": {}}}, "unknown_parameter", "sat.omision_rate", "omission_rate"),
        ({"trainingfile": "x"}, "unknown_parameter", "trainingfile", "training_file"),
        (
            {"hyperparameters": {"n_epochs": 0}},
            "invalid_value",
            "hyperparameters.n_epochs",
            "at least 1",
        ),
        ({"method": {"type": "dpo"}}, "unsupported_parameter", "method.type", "supervised"),
        (
            {"method": {"type": "reinforcement"}},
            "unsupported_parameter",
            "method.type",
            "supervised",
        ),
        ({"integrations": {"type": "wandb"}}, "invalid_value", "integrations", "a list"),
        ({"model": "local/none"}, "unknown_model", "model", "local/tiny"),
        ({"model": "gpt-4o"}, "unknown_model", "model", "local/tiny"),
        ({"model": "local/../tiny"}, "unknown_model", "model", "local/"),
        ({"model": "ft:none"}, "unknown_model", "model", "local/tiny"),
        ({"model": None}, "missing_required_parameter", "model", ""),
        ({"suffix": "a b"}, "invalid_value", "suffix", "letters"),
        ({"metadata": {"k": 1}}, "invalid_value", "metadata", "strings"),
        ({"training_file": 7}, "invalid_value", "training_file", "string"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(client, file_id, more, code, param, said):
    response = create(client, file_id, **more)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert said in error["message"]
    assert client.get(JOBS).json()["data"] == []


def test_a_missing_file_is_404_and_names_the_parameter(client, file_id):
    for name in ("training_file", "validation_file"):
        response = create(client, file_id, **{name: "file-none"})
        assert (response.status_code, response.json()["error"]["param"]) == (404, name)


def test_a_job_says_what_was_asked_and_what_is_auto(client, file_id):
    response = create(
        client,
        file_id,
        suffix="qa",
        seed=7,
        metadata={"team": "a"},
        sat={"omission_rate": {"mlp": 0.5}},
    )
    job = response.json()
    assert response.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["object"], job["status"], job["seed"]) == ("fine_tuning.job", "validating_files", 7)
    assert job["hyperparameters"]["n_epochs"] == "auto"
    assert job["sat"]["omission_rate"]["attention"] is None
    assert (job["error"], job["progress"], job["report"]) == (None, None, None)
    assert job["user_provided_suffix"] == "qa"


def test_lists_filter_by_metadata_and_status(client, file_id):
    first = create(client, file_id, metadata={"team": "a"}).json()["id"]
    second = create(client, file_id, metadata={"team": "b"}).json()["id"]
    client.post(f"{JOBS}/{second}/cancel")

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"{JOBS}?{query}").json()["data"]]

    assert found("") == [second, first]
    assert found("metadata[team]=a") == [first]
    assert found("metadata%5Bteam%5D=c") == []
    refused = client.get("/v1/fine_tuning/jobs?metadata[]=a").json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_value", "metadata")
    assert found("status=cancelled") == [second]
    assert client.get(f"{JOBS}?status=done").json()["error"]["param"] == "status"


def test_pages_of_jobs_follow_each_other(client, file_id):
    ids = [create(client, file_id, seed=n).json()["id"] for n in range(5)]
    first = client.get(JOBS, params={"limit": 3}).json()
    rest = client.get(JOBS, params={"limit": 3, "after": first["last_id"]}).json()
    assert [job["id"] for job in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_an_idempotency_key_makes_one_job(client, file_id):
    def send(seed: int):
        return client.post(
            JOBS,
            json={"model": "local/tiny", "training_file": file_id, "seed": seed},
            headers={"idempotency-key": "k1"},
        )

    first, again, other = send(1), send(1), send(2)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(client.get(JOBS).json()["data"]) == 1


def test_a_clients_own_retry_does_not_start_a_second_job(client, file_id):
    body = {"model": "local/tiny", "training_file": file_id}
    first = client.post(JOBS, json=body)
    retry = client.post(JOBS, json=body, headers={"x-stainless-retry-count": "1"})
    assert retry.json()["id"] == first.json()["id"]
    assert retry.headers["idempotent-replayed"] == "inferred"
    deliberate = client.post(JOBS, json=body, headers={"x-stainless-retry-count": "0"})
    assert deliberate.json()["id"] != first.json()["id"]


def test_cancel_is_idempotent_and_an_ended_job_conflicts(client, file_id):
    job = create(client, file_id).json()["id"]
    assert client.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
    assert client.post(f"{JOBS}/{job}/cancel").status_code == 200
    assert client.post(f"{JOBS}/ftjob-none/cancel").json()["error"]["code"] == "job_not_found"


def test_an_unchanged_job_is_304(client, file_id):
    job = create(client, file_id).json()["id"]
    etag = client.get(f"{JOBS}/{job}").headers["etag"]
    assert client.get(f"{JOBS}/{job}", headers={"if-none-match": etag}).status_code == 304
    client.post(f"{JOBS}/{job}/cancel")
    assert client.get(f"{JOBS}/{job}", headers={"if-none-match": etag}).status_code == 200


def test_a_new_job_has_an_event_and_no_metrics_checkpoints_or_result(client, file_id):
    job = create(client, file_id).json()["id"]
    events = client.get(f"{JOBS}/{job}/events").json()["data"]
    assert events[-1]["object"] == "fine_tuning.job.event"
    metrics = client.get(f"{JOBS}/{job}/metrics").json()
    assert (metrics["rows"], metrics["has_more"], metrics["last_step"]) == ([], False, -1)
    assert "loss" in metrics["columns"]
    assert client.get(f"{JOBS}/{job}/checkpoints").json()["data"] == []
    result = client.get(f"{JOBS}/{job}/result")
    assert (result.status_code, result.json()["error"]["code"]) == (409, "result_not_ready")


def test_a_finished_job_gives_metrics_report_and_its_model(client, services, file_id):
    from .finished import finish_job

    job = create(client, file_id, suffix="done").json()["id"]
    model = finish_job(services, steps=30)
    body = client.get(f"{JOBS}/{job}").json()
    assert (body["status"], body["fine_tuned_model"]) == ("succeeded", model)
    assert body["report"]["eval_loss_after"] < body["report"]["eval_loss_before"]
    rest = client.get(f"{JOBS}/{job}/metrics?after=10&limit=5").json()
    step = rest["columns"].index("step")
    assert [row[step] for row in rest["rows"]] == [11, 12, 13, 14, 15]
    assert (rest["last_step"], rest["has_more"]) == (15, True)

    answer = client.get(f"{JOBS}/{job}/result")
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        names = archive.getnames()
        config = archive.extractfile(f"{job}/config.json")
        assert config is not None
        assert config.read() == b'{"kind": "result"}'
    assert f"{job}/model.safetensors" in names

    assert client.get(f"/v1/models/{model}").json()["job"] == job
    child = create(client, file_id, model=model).json()["id"]
    needed = client.delete(f"/v1/models/{model}")
    assert (needed.status_code, needed.json()["error"]["code"]) == (409, "model_in_use")
    client.post(f"{JOBS}/{child}/cancel")
    assert client.delete(f"/v1/models/{model}").json()["deleted"] is True
    assert client.get(f"/v1/models/{model}").json()["error"]["code"] == "model_not_found"
    assert client.get(f"{JOBS}/{job}/result").status_code == 409


def test_local_models_are_listed_and_not_deleted_here(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["local/tiny"]
    assert client.get("/v1/models/local/tiny").json()["owned_by"] == "local"
    assert client.get("/v1/models/local%2Ftiny").json()["id"] == "local/tiny"
    assert client.delete("/v1/models/local/tiny").json()["error"]["code"] == "model_not_deletable"


def test_projects_do_not_see_each_other(client, services, file_id):
    services.store.ensure_key("sk-other", name="other", project="other")
    job = create(client, file_id).json()["id"]
    headers = {"authorization": "Bearer sk-other"}
    assert client.get(f"{JOBS}/{job}", headers=headers).status_code == 404
    assert client.get(f"/v1/files/{file_id}", headers=headers).status_code == 404
    assert client.get(JOBS, headers=headers).json()["data"] == []
    own = upload(client, ROW).json()["id"]
    assert client.delete(f"/v1/files/{own}", headers=headers).status_code == 404
