"""A pause reaches the child, frees its place uncounted, and resume goes on from the checkpoint."""

from __future__ import annotations

import json
import threading

import pytest

from jobs.settings import Settings
from jobs.states import Stage
from jobs.store import Store
from tests.service import eventually

from .test_runner import claim_for, run


@pytest.mark.parametrize("behaviour", ["checkpoint", "slow", "deaf"])
def test_pause_and_resume(store: Store, quick: Settings, behaviour: str) -> None:
    # A pause waits for its checkpoint, longer than a worker that ends would, but not for ever.
    hasty = {"grace_seconds": 0.1, "stall_seconds": 1 if behaviour == "deaf" else 20}
    settings = quick.model_copy(update=hasty)
    claim = claim_for(store, quick, behaviour)
    thread = threading.Thread(target=run, args=(store, settings, claim))
    thread.start()
    folder = quick.data_dir / "runs" / claim.job_id / str(claim.attempt)
    eventually((folder / "pid").exists, seconds=10)
    assert store.pause_job("default", claim.job_id).status == "running"
    thread.join(20)
    assert not thread.is_alive()
    job = store.get_job("default", claim.job_id)
    assert (job.status, job.failures, job.owner) == ("paused", 0, None)
    assert store.claim("w", Stage.TRAIN) is None

    assert store.resume_job("default", claim.job_id).status == "queued"
    again = store.claim("w", Stage.TRAIN)
    assert again is not None
    stopping = threading.Event()
    stopping.set()
    run(store, quick, again, stopping)
    config = folder.with_name(str(again.attempt)) / "config.json"
    resumed_from = json.loads(config.read_text())["resume_from"]
    wanted = [str(folder / "checkpoints/step-000003")] if behaviour != "deaf" else []
    assert resumed_from == wanted
    told = [e.message for e in store.events("default", claim.job_id, limit=50).items]
    assert ("Paused; resume goes on from step 3" in told) == bool(wanted), told
