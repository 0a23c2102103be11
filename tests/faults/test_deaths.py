"""Children, workers and bells die; jobs do not. Real worker processes, the real core, both databases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.settings import Settings
from jobs.spec import JobRecord, NewFile, NewJob
from jobs.store import Store
from sat_core.plan.request import RunRequest
from tests.sat_core.tiny import run_core, write_model, write_text
from tests.servers import alive
from tests.service import Worker, eventually

SHA256 = "f" * 64
STEPS = 600


@pytest.fixture
def settings(quick: Settings, broker_url: str) -> Settings:
    return quick.model_copy(update={"broker_url": broker_url, "lease_seconds": 4.0})


@pytest.fixture
def workers(settings: Settings) -> Iterator[list[Worker]]:
    """Workers that a test starts; whatever still lives is ended."""
    started: list[Worker] = []
    yield started
    for worker in started:
        for child in worker.children():
            child.kill()
        worker.kill()


def submit(settings: Settings, store: Store) -> str:
    """A job of `STEPS` steps on a tiny model, its files in place as an upload leaves them."""
    write_model(settings.data_dir / "models" / "tiny")
    (settings.data_dir / "files").mkdir()
    size = write_text(settings.data_dir / "files" / SHA256).stat().st_size
    store.add_file(
        "default",
        NewFile(id="file-1", filename="d.jsonl", purpose="fine-tune", bytes=size, sha256=SHA256),
    )
    request = RunRequest.from_dict(
        {
            "model": "local/tiny",
            "seed": 5,
            "hyperparameters": {"batch_size": 4},
            "sat": {
                "omission_rate": {"mlp": 0.5, "attention": 0.25},
                "train": {"max_seq_len": 32, "max_steps": STEPS, "learning_rate": 1e-3},
                "checkpoints": {"every": 25},
                "data": {"validation_split": 0},
            },
        }
    ).to_dict()
    return store.create_job(
        "default", NewJob(request=request, model="local/tiny", training_file="file-1")
    ).id


def job_of(store: Store, job_id: str) -> JobRecord:
    return store.get_job("default", job_id)


def reaches(store: Store, job_id: str, step: int) -> None:
    def there() -> bool:
        job = job_of(store, job_id)
        assert job.status not in ("failed", "cancelled"), job.error
        return job.status == "running" and (job.progress_step or 0) >= step

    eventually(there, seconds=90)


def test_a_job_outlives_its_child_its_worker_and_a_restart(
    settings: Settings, store: Store, workers: list[Worker], tmp_path: Path
) -> None:
    job_id = submit(settings, store)

    workers.append(Worker(settings))
    reaches(store, job_id, 60)
    (child,) = workers[0].children()
    child.kill()
    eventually(lambda: job_of(store, job_id).failures == 1, seconds=20)
    assert workers[0].process.poll() is None, "the worker outlives its child"

    reaches(store, job_id, 150)
    # What the first one had told may reach so far by itself.
    (orphan,) = eventually(workers[0].children, seconds=20)
    workers[0].kill()
    eventually(lambda: not alive(orphan), seconds=30)

    workers.append(Worker(settings))
    eventually(lambda: job_of(store, job_id).failures == 2, seconds=60)
    reaches(store, job_id, 250)
    workers[1].stop()
    stopped = job_of(store, job_id)
    assert (stopped.status, stopped.failures, stopped.owner) == ("queued", 2, None)
    saved = store.checkpoints("default", job_id).items[0].step
    assert saved == stopped.progress_step, "a restart loses no step"

    workers.append(Worker(settings))
    done = eventually(
        lambda: (j := job_of(store, job_id)).status in ("succeeded", "failed") and j, seconds=120
    )
    assert isinstance(done, JobRecord)
    assert done.status == "succeeded", done.error
    assert done.failures == 2
    columns, rows, _ = store.metrics("default", job_id, limit=STEPS + 10)
    assert [row[columns.index("step")] for row in rows] == list(range(1, STEPS + 1))
    same_as_uninterrupted(settings, store, done, tmp_path)


def same_as_uninterrupted(settings: Settings, store: Store, job: JobRecord, tmp_path: Path) -> None:
    """The same configuration, run at one go, ends with the same bytes and told the same losses."""
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(job.config))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_core("train", whole) == 0
    finally:
        torch.set_num_threads(threads)
    assert job.fine_tuned_model is not None
    model = settings.data_dir / store.get_model("default", job.fine_tuned_model).path
    ours, theirs = (
        load_file(model / "model.safetensors"),
        load_file(whole / "model/model.safetensors"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    told = {}
    for line in (whole / "events.jsonl").read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        if event["kind"] == "metrics":
            told[event["step"]] = event["loss"]
    columns, rows, _ = store.metrics("default", job.id, limit=STEPS + 10)
    kept = {row[columns.index("step")]: row[columns.index("loss")] for row in rows}
    assert kept == told


def test_cancelling_ends_the_child_and_keeps_the_checkpoint(
    settings: Settings, store: Store, workers: list[Worker]
) -> None:
    job_id = submit(settings, store)
    workers.append(Worker(settings))
    reaches(store, job_id, 30)
    store.cancel_job("default", job_id)
    eventually(lambda: job_of(store, job_id).status == "cancelled", seconds=60)
    eventually(lambda: not workers[0].children(), seconds=60)
    newest = store.checkpoints("default", job_id).items[0]
    assert (settings.data_dir / newest.path / "model" / "model.safetensors").exists()
