"""Who may send a job's metrics to a tracker, and what is remembered of it; secrets beside it."""

from __future__ import annotations

import pytest

from jobs import integrations
from jobs.errors import LeaseLost, NotFound
from jobs.spec import Claim, NewFile, NewJob
from jobs.states import Stage
from jobs.store import Store
from sat_core.plan.request import RunRequest

PREPARED = {"config": {}, "hyperparameters": {}, "figures": {}, "total_steps": 3, "warnings": []}
TOLD = ({"type": "tensorboard", "tensorboard": {}}, {"type": "wandb", "wandb": {"project": "p"}})


def training(store: Store) -> Claim:
    file = NewFile(id="file-1", filename="d", purpose="fine-tune", bytes=1, sha256="")
    store.add_file("default", file)
    request = RunRequest.from_dict({"model": "m"}).to_dict()
    new = NewJob(request=request, model="m", training_file="file-1", integrations=TOLD)
    job = store.create_job("default", new)
    assert store.claim_integration(["wandb"]) is None, "nothing is measured yet"
    prepare = store.claim("w", Stage.PREPARE)
    assert prepare is not None
    store.finish_prepare(prepare, PREPARED)
    claim = store.claim("w", Stage.TRAIN)
    assert claim is not None
    assert claim.job_id == job.id
    return claim


def test_one_sends_and_whoever_came_before_writes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training(store)
    first = store.claim_integration(["wandb"])
    assert first is not None
    assert (first.number, first.settings, first.step) == (1, {"project": "p"}, -1)
    assert store.claim_integration(["wandb"]) is None
    known = store.pulse("default", job.job_id).version
    first = store.integration_sent(first, 5, "https://there/1")
    assert store.pulse("default", job.job_id).version == known + 1, "followers hear of it"
    store.release_integration(first)

    monkeypatch.setattr(integrations, "SENDING_SECONDS", -1)
    lost = store.claim_integration(["wandb"])
    second = store.claim_integration(["wandb"])
    assert lost is not None
    assert second is not None, "the one before has not said a word in time"
    assert second.step == 5
    for late in (
        lambda: store.integration_sent(lost, 9, None),
        lambda: store.end_integration(lost),
        lambda: store.fail_integration(lost, "x"),
    ):
        with pytest.raises(LeaseLost):
            late()
    store.end_integration(second)
    assert store.claim_integration(["wandb"]) is None
    told = [i.status for i in store.list_integrations("default", job.job_id)]
    assert told == ["open", "done"]
    messages = [e.message for e in store.events("default", job.job_id, limit=50).items]
    assert messages.count("Metrics go to wandb: https://there/1") == 1


def test_failures_in_a_row_are_told_once_and_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrations, "BACK_OFF", (0, 0))
    job = training(store)
    known = store.pulse("default", job.job_id).version
    for _ in range(2):
        claim = store.claim_integration(["tensorboard"])
        assert claim is not None
        store.fail_integration(claim, "disk full " + 1000 * "x")
    assert store.pulse("default", job.job_id).version == known + 1
    claim = store.claim_integration(["tensorboard"])
    assert claim is not None
    claim = store.integration_sent(claim, 3, None)
    assert store.list_integrations("default", job.job_id)[0].error is None, "it went on"
    for status in ("open", "open", "failed"):
        store.fail_integration(claim, "disk full")
        assert store.list_integrations("default", job.job_id)[0].status == status
        claim = store.claim_integration(["tensorboard"]) or claim
    warned = [e for e in store.events("default", job.job_id, limit=50).items if e.level == "warn"]
    assert len(warned) == 2, "one for each time that it began to fail"


def test_jobs_of_others_have_no_trackers_to_be_seen(store: Store) -> None:
    job = training(store)
    with pytest.raises(NotFound):
        store.list_integrations("other", job.job_id)


def test_secrets_belong_to_a_project(store: Store) -> None:
    store.put_secret("default", "wandb_api_key", "one")
    store.put_secret("default", "wandb_api_key", "two")
    assert store.secret_values("default") == {"wandb_api_key": "two"}
    assert store.secret_values("other") == {}
    with pytest.raises(NotFound):
        store.delete_secret("other", "wandb_api_key")
    store.delete_secret("default", "wandb_api_key")
    assert store.list_secrets("default") == []
