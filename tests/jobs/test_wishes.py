"""Cancel, pause and resume in every state, on both databases."""

from __future__ import annotations

import pytest

from jobs.errors import JobNotPausable, JobTerminal, NotFound
from jobs.states import Stage
from jobs.store import Store

from .test_store import ERROR, LIMITS, PREPARED, add_job, claimed, saved, step, training


def state(store: Store, job_id: str) -> tuple[str, str]:
    job = store.get_job("default", job_id)
    return job.status, job.detail_state


def test_a_waiting_job_pauses_at_once_and_resumes_to_where_it_was(store: Store) -> None:
    job = add_job(store)
    assert store.pause_job("default", job.id).status == "paused"
    assert store.pause_job("default", job.id).status == "paused"
    assert store.claim("w", Stage.PREPARE) is None
    assert store.resume_job("default", job.id).status == "validating_files"
    assert store.resume_job("default", job.id).status == "validating_files"
    store.finish_prepare(claimed(store, Stage.PREPARE), PREPARED)
    assert store.pause_job("default", job.id).status == "paused"
    assert store.claim("w", Stage.TRAIN) is None
    assert store.resume_job("default", job.id).status == "queued"
    assert claimed(store, Stage.TRAIN).job_id == job.id
    told = [e.message for e in store.events("default", job.id, limit=50).items]
    assert sum(message.startswith("Paused") for message in told) == 2
    assert sum(message.startswith("Resumed") for message in told) == 2


def test_a_held_job_is_asked_and_its_pause_is_no_failure(store: Store) -> None:
    job = add_job(store)
    prepare = claimed(store, Stage.PREPARE)
    assert store.pause_job("default", job.id).status == "validating_files"
    assert store.heartbeat(prepare) == "pause"
    # The data were ready before the pause was seen: nothing is done twice.
    store.finish_prepare(prepare, PREPARED)
    assert state(store, job.id) == ("paused", "by_user")
    store.resume_job("default", job.id)
    claim = claimed(store, Stage.TRAIN)
    told = [step(3), saved(3), step(4)]
    assert store.record(claim, told, run="r", read_position=1) == "run"
    assert store.pause_job("default", job.id).detail_state == "pausing"
    assert store.heartbeat(claim) == "pause"
    store.release(claim, "stopped")
    paused = store.get_job("default", job.id)
    assert (paused.status, paused.owner, paused.failures) == ("paused", None, 0)
    assert paused.detail_message == "Paused; resume goes on from step 3"
    assert store.resume_job("default", job.id).status == "queued"
    assert claimed(store, Stage.TRAIN).attempt == 3


def test_a_pause_in_prepare_goes_back_to_prepare(store: Store) -> None:
    job = add_job(store)
    prepare = claimed(store, Stage.PREPARE)
    store.pause_job("default", job.id)
    store.release(prepare, "stopped")
    assert state(store, job.id)[0] == "paused"
    assert store.resume_job("default", job.id).status == "validating_files"


def test_a_resume_that_overtakes_the_pause_withdraws_it(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    store.pause_job("default", job.id)
    assert store.resume_job("default", job.id).status == "running"
    assert store.heartbeat(claim) == "run"
    store.release(claim, "stopped")
    assert state(store, job.id)[0] == "queued"


def test_a_crash_while_pausing_pauses(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    store.pause_job("default", job.id)
    store.crash(claim, ERROR, **LIMITS)
    assert state(store, job.id)[0] == "paused"


def test_what_has_ended_or_is_ending_is_refused(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    store.cancel_job("default", job.id)
    for wish in (store.pause_job, store.resume_job):
        with pytest.raises(JobNotPausable, match="being cancelled"):
            wish("default", job.id)
    store.release(claim, "stopped")
    for wish in (store.pause_job, store.resume_job):
        with pytest.raises(JobTerminal, match="been cancelled"):
            wish("default", job.id)
        with pytest.raises(NotFound):
            wish("other", job.id)
    paused = add_job(store)
    store.pause_job("default", paused.id)
    assert store.cancel_job("default", paused.id).status == "cancelled"
