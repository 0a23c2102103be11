"""What followers, the queue and pins ask of the store, on both databases."""

from __future__ import annotations

import pytest

from jobs.errors import InvalidCursor, NotFound
from jobs.names import checkpoint_name, is_checkpoint, result_name
from jobs.spec import CheckpointRecord
from jobs.states import Stage
from jobs.store import Store

from .test_store import PREPARED, add_job, claimed, step, training

SAVED = {
    "seq": 1,
    "time": 1.0,
    "kind": "checkpoint",
    "path": "checkpoints/step-000003",
    "step": 3,
    "size_bytes": 9,
    "metrics": {},
}


def test_pulses_and_events_tell_everything_once(store: Store) -> None:
    job, other = add_job(store), add_job(store)
    before = store.pulse("default", job.id)
    known = store.last_event(job.id)
    claim = training(store)
    store.record(claim, [step(1)], run="r", read_position=1)
    found = store.pulses([job.id, other.id, "ftjob-none"])
    assert set(found) == {job.id, other.id}
    assert found[job.id].version > before.version
    assert (found[job.id].progress_step, found[job.id].ended) == (1, False)
    events = store.events_after(job.id, known, limit=100)
    listed = store.events("default", job.id, limit=100, newest_first=False).items
    assert [e.id for e in events] == [e.id for e in listed[1:]]
    assert store.events_after(job.id, known, limit=1) == events[:1]
    assert (
        store.event_number(job.id, listed[0].id) == known == store.event_number(job.id, str(known))
    )
    with pytest.raises(InvalidCursor):
        store.event_number(other.id, listed[0].id)
    with pytest.raises(NotFound):
        store.pulse("other", job.id)
    store.cancel_job("default", other.id)
    assert store.pulse("default", other.id).ended


def test_the_queue_is_in_the_order_of_claims(store: Store) -> None:
    own = [add_job(store).id for _ in range(3)]
    others = [add_job(store, project="other").id for _ in range(2)]
    held = claimed(store, Stage.PREPARE)
    line = store.lines()[Stage.PREPARE]
    assert len(line.left) == 1
    assert line.past_seconds == ()
    told = [waiter.job_id for waiter in line.waiting]
    assert told == [others[0], own[1], others[1], own[2]]
    assert [claimed(store, Stage.PREPARE).job_id for _ in told] == told
    assert store.lines()[Stage.PREPARE].waiting == ()
    store.finish_prepare(held, PREPARED)
    lines = store.lines()
    assert [waiter.job_id for waiter in lines[Stage.TRAIN].waiting] == [own[0]]
    assert len(lines[Stage.PREPARE].past_seconds) == 1


def only(store: Store, job_id: str) -> CheckpointRecord:
    (found,) = store.checkpoints("default", job_id).items
    return found


def test_a_pin_is_out_of_reach_of_the_run(store: Store) -> None:
    job = add_job(store, suffix="s")
    claim = training(store)
    store.record(claim, [SAVED], run="runs/j/2", read_position=1)
    found = only(store, job.id)
    version = store.pulse("default", job.id).version
    pinned = store.pin_checkpoint("default", found, "pinned/j/c/step-000003")
    assert (pinned.path, pinned.pinned_from) == ("pinned/j/c/step-000003", found.path)
    assert store.pulse("default", job.id).version > version
    assert store.pin_checkpoint("default", found, "elsewhere") == pinned
    store.record(claim, [{**SAVED, "kind": "checkpoint_deleted"}], run="runs/j/2", read_position=2)
    store.record(claim, [SAVED], run="runs/j/3", read_position=3)
    assert only(store, job.id) == pinned
    with pytest.raises(NotFound):
        store.pin_checkpoint("other", found, "x")

    name = checkpoint_name(store.get_job("default", job.id), 3)
    assert is_checkpoint(name)
    assert not is_checkpoint(result_name(job))
    model = store.get_model("default", name)
    assert (model.path, model.base) == ("pinned/j/c/step-000003/model", "local/tiny")
    for project, wrong in (("other", name), ("default", name + "0"), ("default", name[:-1] + "4")):
        with pytest.raises(NotFound):
            store.get_model(project, wrong)

    assert store.unpin_checkpoint("default", pinned, still_there=True).path == found.path
    assert only(store, job.id).pinned_from is None
    store.unpin_checkpoint("default", pinned, still_there=False)
    assert store.checkpoints("default", job.id).items == ()
    with pytest.raises(NotFound):
        store.get_checkpoint("default", job.id, found.id)


def test_tags_with_odd_names_are_found(store: Store) -> None:
    odd = {'a"b': "1", "c\\d": "2", "e.f": "3", "g[0]": "4", "$": "5", "ü": "ß"}
    job = add_job(store, metadata=odd)
    plain = add_job(store)
    for name, value in odd.items():
        assert [j.id for j in store.list_jobs("default", metadata={name: value}).items] == [job.id]
        assert store.list_jobs("default", metadata={name: "x"}).items == ()
    assert [j.id for j in store.list_jobs("default", metadata=odd).items] == [job.id]
    assert [j.id for j in store.list_jobs("default", metadata={}).items] == [plain.id]
