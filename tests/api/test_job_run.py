"""While a job runs: pause, resume, metrics in every form, long polls, the queue, pins, HEAD."""

from __future__ import annotations

import csv
import io
import json
import threading
import time

import pytest

from jobs.states import Stage

from .conftest import ROW, create, upload
from .finished import WORKER, claim_job, events, finish_job, train_job

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def job(client, file_id) -> str:
    return create(client, file_id, suffix="run").json()["id"]


def checkpoint(services, claim, step: int, kind: str = "checkpoint") -> None:
    """A checkpoint in the run folder, and what the core tells of it."""
    run = services.artifacts.run(claim.job_id, claim.attempt)
    folder = run / "checkpoints" / f"step-{step:06d}"
    path = str(folder.relative_to(run))
    if kind == "checkpoint":
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text(f'{{"step": {step}}}')
        (folder / "MANIFEST.json").write_text('{"model/config.json": {}}')
    else:
        services.artifacts.delete(services.artifacts.relative(folder))
    told = {"seq": step, "time": 1.0, "kind": kind, "step": step, "path": path}
    told |= {"size_bytes": 9, "metrics": {"loss": 0.5}}
    services.store.record(claim, [told], run=services.artifacts.relative(run), read_position=step)


def test_pause_and_resume_a_waiting_job(client, job):
    paused = client.post(f"{JOBS}/{job}/pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    assert client.post(f"{JOBS}/{job}/pause").json()["status"] == "paused"
    strict = {"x-compat": "strict"}
    assert client.get(f"{JOBS}/{job}", headers=strict).json()["status"] == "queued"
    assert client.get(JOBS, headers=strict).json()["data"][0]["status"] == "queued"
    assert client.get(JOBS, params={"status": "paused"}).json()["data"][0]["id"] == job
    resumed = client.post(f"{JOBS}/{job}/resume").json()
    assert resumed["status"] == "validating_files"
    assert client.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
    for wish in ("pause", "resume"):
        refused = client.post(f"{JOBS}/{job}/{wish}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_terminal")
        assert refused.headers["x-should-retry"] == "false"
        assert client.post(f"{JOBS}/ftjob-none/{wish}").status_code == 404


def test_a_job_that_is_being_cancelled_is_not_pausable(client, services, job):
    train_job(services, steps=3, total=40)
    client.post(f"{JOBS}/{job}/cancel")
    refused = client.post(f"{JOBS}/{job}/pause")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_pausable")
    assert refused.headers["x-should-retry"] == "false"


def test_metrics_as_page_few_points_and_csv(client, services, job):
    claim = claim_job(services, 4000)
    for first in range(1, 4001, 1000):
        told = events(first, first + 999, 4000)
        services.store.record(claim, told, run="r", read_position=first)
    url = f"{JOBS}/{job}/metrics"
    few = client.get(url, params={"resolution": 200}).json()
    assert (few["measured"], few["last_step"], few["has_more"]) == (4001, 4000, False)
    assert 200 <= len(few["rows"]) < 260
    answer = client.get(url, params={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    table = list(csv.reader(io.StringIO(answer.text)))
    assert table[0][:5] == [
        "step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy",
    ]  # fmt: skip
    assert (len(table), table[1][0], table[-1][0]) == (4002, "0", "4000")
    short = client.get(
        url, params={"resolution": 50, "after": 3000}, headers={"accept": "text/csv"}
    ).text.splitlines()
    assert 50 <= len(short) < 80
    for bad in ({"resolution": 1}, {"resolution": 2001}, {"format": "xml"}):
        assert client.get(url, params=bad).json()["error"]["code"] == "invalid_value"
    etag = answer.headers["etag"]
    for path in (url, f"{JOBS}/{job}/events"):
        assert client.get(path, headers={"if-none-match": etag}).status_code == 304
    client.post(f"{JOBS}/{job}/cancel")
    assert client.get(url, headers={"if-none-match": etag}).status_code == 200


def test_a_long_poll_answers_when_something_happens(client, job):
    def ask(wait: float, version: int) -> tuple[dict, float]:
        begin = time.monotonic()
        answer = client.get(f"{JOBS}/{job}", params={"wait": wait, "version": version})
        return answer.json(), time.monotonic() - begin

    body, took = ask(20, 999)
    assert took < 2
    version = body["version"]
    body, took = ask(1, version)
    assert (body["version"], took > 0.9) == (version, True)
    later = threading.Timer(0.5, lambda: client.post(f"{JOBS}/{job}/cancel"))
    later.start()
    body, took = ask(20, version)
    later.join()
    assert (body["status"], took < 5) == ("cancelled", True)
    # An ended job never changes: there is nothing to wait for.
    assert ask(20, body["version"])[1] < 2
    assert client.get(f"{JOBS}/ftjob-none", params={"wait": 5, "version": 1}).status_code == 404
    assert client.get(f"{JOBS}/{job}", params={"wait": 51}).status_code == 400


def test_a_waiting_job_says_why_and_when(client, services, file_id, job):
    def detail(job_id: str) -> dict:
        services.queueing._last = None
        return client.get(f"{JOBS}/{job_id}").json()["status_detail"]

    first = detail(job)
    assert (first["position"], first["reason"]) == (1, "no_worker")
    assert "no worker is alive" in first["message"]
    slots = {"prepare": 1, "train": 1}
    services.store.register_worker(WORKER, hostname="h", pid=1, slots=slots)
    assert detail(job)["reason"] == "starting"
    running = services.store.claim(WORKER, Stage.PREPARE)
    assert (detail(job)["position"], detail(job)["reason"]) == (None, None)
    second = create(client, file_id).json()["id"]
    third = create(client, file_id).json()["id"]
    assert (detail(second)["position"], detail(second)["reason"]) == (1, "slots_busy")
    assert (detail(third)["position"], detail(third)["starts_after"]) == (2, None)
    assert running is not None
    services.store.release(running, "given back")
    for _ in range(8):
        claim = services.store.claim(WORKER, Stage.PREPARE)
        services.store.release(claim, "given back")

    services.queueing._last = None
    queue = client.get("/v1/sat/queue").json()
    assert queue["workers"] == 1
    assert queue["stages"]["train"] == {"waiting": 0, "running": 0, "slots": 1, "slots_free": 1}
    assert {entry["id"] for entry in queue["jobs"]} == {job, second, third}
    services.store.ensure_key("sk-other", name="o", project="other")
    other = client.get("/v1/sat/queue", headers={"authorization": "Bearer sk-other"}).json()
    assert other["jobs"] == []
    assert other["stages"]["prepare"]["waiting"] == 3


def test_a_job_that_no_worker_can_train_says_what_it_lacks(client, services, file_id):
    needs = {"resources": {"device": "gpu", "min_memory_gib": 40}, "priority": "high"}
    job = create(client, file_id, sat=needs).json()["id"]
    hardware = {"device": "cpu", "name": "cpu", "memory_bytes": 2**34}
    more = {"slots": {"prepare": 1, "train": 1}, "hardware": hardware}
    services.store.register_worker(WORKER, hostname="h", pid=1, **more)
    prepare = services.store.claim(WORKER, Stage.PREPARE, hardware)
    services.store.finish_prepare(
        prepare,
        {"config": {}, "hyperparameters": {}, "figures": {}, "total_steps": 3, "warnings": []},
    )
    assert services.store.claim(WORKER, Stage.TRAIN, hardware) is None
    detail = client.get(f"{JOBS}/{job}").json()["status_detail"]
    assert detail["reason"] == "no_fitting_worker"
    assert "no living worker has a GPU with 40 GiB of memory" in detail["message"]


def test_a_range_of_starts_is_told_once_enough_has_run(client, services, file_id):
    slots = {"prepare": 1, "train": 1}
    services.store.register_worker(WORKER, hostname="h", pid=1, slots=slots)
    for _ in range(5):
        create(client, file_id)
        finish_job(services, steps=2)
    running = create(client, file_id).json()["id"]
    train_job(services, steps=10, total=40)
    waiting = create(client, file_id).json()["id"]
    prepare = services.store.claim(WORKER, Stage.PREPARE)
    services.store.finish_prepare(
        prepare,
        {"config": {}, "hyperparameters": {}, "figures": {}, "total_steps": 3, "warnings": []},
    )
    detail = client.get(f"{JOBS}/{waiting}").json()["status_detail"]
    eta = client.get(f"{JOBS}/{running}").json()["progress"]["eta_seconds"]
    assert (detail["reason"], detail["position"]) == ("slots_busy", 1)
    now = time.time()
    assert now < detail["starts_after"] <= now + eta <= detail["starts_before"] < now + 3 * eta


def test_a_pinned_checkpoint_outlives_its_run_and_is_a_model(client, services, file_id, job):
    claim = claim_job(services, 40)
    for step in (10, 20):
        checkpoint(services, claim, step)
    second, first = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    url = f"{JOBS}/{job}/checkpoints/{first['id']}"
    assert (first["pinned"], client.get(url).json()["step_number"]) == (False, 10)
    assert client.post(f"{url}/pin").json()["pinned"]
    assert client.post(f"{url}/pin").json()["pinned"]
    for step in (10, 20):
        checkpoint(services, claim, step, kind="checkpoint_deleted")
    (left,) = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    assert (left["id"], left["pinned"]) == (first["id"], True)

    name = left["fine_tuned_model_checkpoint"]
    model = client.get(f"/v1/models/{name}").json()
    assert (model["id"], model["base"], model["job"]) == (name, "local/tiny", job)
    path = services.model_path("default", name)
    assert json.loads((path / "config.json").read_text()) == {"step": 10}
    child = create(client, file_id, model=name).json()
    assert child["model"] == name
    gone = second["fine_tuned_model_checkpoint"]
    assert create(client, file_id, model=gone).json()["error"]["code"] == "unknown_model"
    assert client.get(f"/v1/models/{gone}").json()["error"]["code"] == "model_not_found"
    deleted = client.delete(f"/v1/models/{name}")
    assert (deleted.status_code, deleted.json()["error"]["code"]) == (409, "model_in_use")
    assert job in deleted.json()["error"]["message"]

    # Training again over the same step leaves the pinned one alone.
    services.store.release(claim, "x")
    again = services.store.claim(WORKER, Stage.TRAIN)
    assert [c.step for c in services.store.checkpoints("default", job).items] == [10]
    checkpoint(services, again, 10)
    assert client.get(url).json()["pinned"]

    needed = client.post(f"{url}/unpin")
    assert (needed.status_code, needed.json()["error"]["code"]) == (409, "model_in_use")
    assert child["id"] in needed.json()["error"]["message"]
    assert path.is_dir()
    client.post(f"{JOBS}/{child['id']}/cancel")
    unpinned = client.post(f"{url}/unpin").json()
    assert (unpinned["pinned"], unpinned["available"]) == (False, False)
    assert not path.exists()
    assert client.get(url).json()["error"]["code"] == "checkpoint_not_found"
    assert client.post(f"{url}/pin").status_code == 404
    assert client.post(f"{JOBS}/ftjob-none/checkpoints/x/pin").status_code == 404


def test_a_job_that_starts_from_a_running_jobs_checkpoint_pins_it(client, services, file_id, job):
    claim = claim_job(services, 40)
    checkpoint(services, claim, 10)
    (saved,) = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    name = saved["fine_tuned_model_checkpoint"]
    assert create(client, file_id, model=name).status_code == 200
    checkpoint(services, claim, 10, kind="checkpoint_deleted")
    assert client.get(f"{JOBS}/{job}/checkpoints/{saved['id']}").json()["pinned"]
    assert (services.model_path("default", name) / "config.json").exists()


def test_a_checkpoint_whose_bytes_are_gone_cannot_be_pinned(client, services, job):
    claim = claim_job(services, 40)
    checkpoint(services, claim, 10)
    (only,) = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    url = f"{JOBS}/{job}/checkpoints/{only['id']}"
    assert client.post(f"{url}/pin").json()["pinned"]
    kept = client.post(f"{url}/unpin").json()
    assert (kept["pinned"], kept["available"]) == (False, True)
    run = services.artifacts.run(claim.job_id, claim.attempt)
    (run / "checkpoints/step-000010/model/config.json").unlink()
    answer = client.post(f"{url}/pin")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "checkpoint_not_found")
    assert not client.get(url).json()["pinned"]


def test_a_checkpoint_of_an_ended_job_can_be_deleted_and_frees_its_storage(client, services, job):
    claim = claim_job(services, 40)
    for step in (10, 20):
        checkpoint(services, claim, step)
    pinned, plain = client.get(f"{JOBS}/{job}/checkpoints").json()["data"]
    assert client.post(f"{JOBS}/{job}/checkpoints/{pinned['id']}/pin").json()["pinned"]
    services.store.fail(claim, {"code": "internal_error", "message": "x", "param": None})
    before = client.get("/v1/sat/limits").json()["usage"]["storage_bytes"]
    for one in (pinned, plain):
        name = one["fine_tuned_model_checkpoint"]
        folder = services.model_path("default", name)
        assert folder.is_dir()
        assert client.delete(f"/v1/models/{name}").json()["deleted"]
        assert not folder.exists()
        assert client.delete(f"/v1/models/{name}").json()["error"]["code"] == "model_not_found"
    assert client.get(f"{JOBS}/{job}/checkpoints").json()["data"] == []
    assert not list(services.artifacts.runs(job).glob("*/checkpoints/*"))
    after = client.get("/v1/sat/limits").json()["usage"]["storage_bytes"]
    assert before - after == pinned["size_bytes"] + plain["size_bytes"]


def test_head_is_get_without_a_body(client, services, job):
    finish_job(services, steps=5)
    paths = (
        "/healthz", JOBS, f"{JOBS}/{job}", f"{JOBS}/{job}/events", f"{JOBS}/{job}/metrics",
        f"{JOBS}/{job}/result", f"{JOBS}/{job}/stream", f"{JOBS}/ftjob-none", "/nothing",
    )  # fmt: skip
    for path in paths:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers.get("content-length") == get.headers.get("content-length")


def test_a_file_of_results_is_no_training_file(client, services, file_id, job):
    record = services.store.get_file("default", file_id)
    results = upload(client, ROW).json()["id"]
    assert record.purpose == "fine-tune"
    from jobs.models import FileRow

    with services.store.writing() as session:
        row = session.query(FileRow).filter_by(id=results).one()
        row.purpose = "fine-tune-results"
    refused = create(client, results).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_value", "training_file")
