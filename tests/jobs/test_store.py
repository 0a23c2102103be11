"""The store keeps its promises on both databases."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from jobs.errors import (
    FileInUse,
    InvalidCursor,
    JobTerminal,
    LeaseLost,
    NotFound,
    StoreUnavailable,
)
from jobs.moves import LACKED_MEMORY
from jobs.names import checkpoint_name
from jobs.settings import Settings
from jobs.spec import Claim, JobRecord, NewFile, NewJob
from jobs.states import Stage
from jobs.store import Store
from sat_core.plan.request import RunRequest

RUN = RunRequest.from_dict({"model": "m"}).to_dict()

PREPARED = {
    "config": {"a": 1},
    "hyperparameters": {"n_epochs": 1},
    "figures": {"rows": 3},
    "total_steps": 9,
    "warnings": ["w"],
}
LIMITS: dict[str, Any] = {"max_failures": 3, "retry_seconds": 0.0}
ERROR = {"code": "internal_error", "message": "The run ended by signal 9", "param": None}


def add_job(store: Store, project: str = "default", **changes: Any) -> JobRecord:
    new = NewJob(
        **{
            "request": RUN,
            "model": "local/tiny",
            "training_file": "file-1",
            **changes,
        }
    )
    return store.create_job(project, new)


def claimed(store: Store, stage: Stage, worker: str = "w1") -> Claim:
    claim = store.claim(worker, stage)
    assert claim is not None
    return claim


def training(store: Store) -> Claim:
    store.finish_prepare(claimed(store, Stage.PREPARE), PREPARED)
    return claimed(store, Stage.TRAIN)


def step(number: int, **changes: Any) -> dict[str, Any]:
    figures = {
        "loss": 1.0 / number, "token_accuracy": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0, "omission_rate_mlp": 0.5,
        "omission_rate_attention": 0.0, "awake_share": 0.7, "tokens_per_second": 100.0, "step_seconds": 0.5,
        "flops": 1e12, "memory_bytes": 5, "tokens": 10 * number,
    }  # fmt: skip
    return {
        "seq": number,
        "time": 1.0,
        "kind": "metrics",
        "step": number,
        "total_steps": 9,
        **figures,
        **changes,
    }


def saved(number: int) -> dict[str, Any]:
    return {
        "seq": number,
        "time": 1.0,
        "kind": "checkpoint",
        "path": f"checkpoints/step-{number}",
        "step": number,
        "size_bytes": 9,
        "metrics": {},
    }


def test_a_job_lives_from_acceptance_to_success(store: Store) -> None:
    job = add_job(store, suffix="s", metadata={"team": "a"})
    assert (job.status, job.attempt) == ("validating_files", 0)
    first = claimed(store, Stage.PREPARE)
    assert store.get_job("default", job.id).status == "validating_files"
    store.finish_prepare(first, PREPARED)
    assert store.get_job("default", job.id).status == "queued"
    claim = claimed(store, Stage.TRAIN)
    assert (claim.attempt, claim.job.config) == (2, {"a": 1})
    store.record(claim, [step(1), step(2)], run="runs/x/2", read_position=10)
    running = store.get_job("default", job.id)
    assert (running.status, running.progress_step, running.loss) == ("running", 2, 0.5)
    assert running.eta_seconds == pytest.approx(0.5 * 7)
    store.finish_train(claim, model="ft:m", path="results/x", summary={"trained_tokens": 20})
    done = store.get_job("default", job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens, done.owner) == (
        "succeeded",
        "ft:m",
        20,
        None,
    )
    assert store.get_model("default", "ft:m").path == "results/x"
    messages = [
        e.message for e in store.events("default", job.id, limit=50, newest_first=False).items
    ]
    assert messages[0] == "Job accepted"
    assert messages[-1] == "Succeeded: ft:m"


def test_an_older_claim_changes_nothing(store: Store) -> None:
    job = add_job(store)
    old = training(store)
    (lease,) = store.leases()
    assert store.expire(lease, **LIMITS)
    new = claimed(store, Stage.TRAIN, "w2")
    before = store.get_job("default", job.id)
    writes = [
        lambda: store.heartbeat(old),
        lambda: store.record(old, [step(5, loss=99.0)], run="r", read_position=1),
        lambda: store.fail(old, ERROR),
        lambda: store.release(old, "x"),
        lambda: store.crash(old, ERROR, **LIMITS),
        lambda: store.finish_train(old, model="ft:zombie", path="p", summary={}),
    ]
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert store.get_job("default", job.id) == before
    assert store.metrics("default", job.id)[1] == []
    store.heartbeat(new)


def test_a_lease_that_moved_is_not_taken_back(store: Store) -> None:
    add_job(store)
    claim = training(store)
    (lease,) = store.leases()
    store.heartbeat(claim)
    assert not store.expire(lease, **LIMITS)


def test_many_claimants_one_winner(store: Store) -> None:
    for _ in range(5):
        add_job(store)
    won: list[str] = []
    barrier = threading.Barrier(4)

    def race(name: str) -> None:
        barrier.wait()
        while claim := store.claim(name, Stage.PREPARE):
            won.append(claim.job_id)

    threads = [threading.Thread(target=race, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 5
    assert len(set(won)) == 5


def test_jobs_are_claimed_oldest_first(store: Store) -> None:
    ids = [add_job(store).id for _ in range(3)]
    assert [claimed(store, Stage.PREPARE).job_id for _ in range(3)] == ids
    assert store.claim("w", Stage.PREPARE) is None


def request(**sat: Any) -> dict[str, Any]:
    return RunRequest.from_dict({"model": "m", "sat": sat}).to_dict()


def test_jobs_of_higher_priority_are_claimed_before_older_ones(store: Store) -> None:
    low, normal, high = (add_job(store, request=request(priority=p)).id for p in ("low", "normal", "high"))  # fmt: skip
    other = add_job(store, "other", request=request(priority="high")).id
    expected = [high, other, normal, low]
    assert [w.job_id for w in store.lines()[Stage.PREPARE].waiting] == expected
    assert [claimed(store, Stage.PREPARE).job_id for _ in range(4)] == expected


def test_a_job_trains_only_where_it_has_what_it_needs(store: Store) -> None:
    cpu = {"device": "cpu", "memory_bytes": 64 * 2**30}
    gpu = {"device": "gpu", "memory_bytes": 24 * 2**30}
    large = add_job(store, request=request(resources={"device": "gpu", "min_memory_gib": 40})).id
    small = add_job(store, request=request(resources={"min_memory_gib": 24})).id
    for _ in range(2):
        store.finish_prepare(claimed(store, Stage.PREPARE), PREPARED)
    assert store.slot_wanted(Stage.TRAIN, gpu)
    claim = store.claim("w", Stage.TRAIN, gpu)
    assert claim is not None
    assert claim.job_id == small
    for hardware in (gpu, cpu, {**cpu, "memory_bytes": 1}):
        assert store.claim("w", Stage.TRAIN, hardware) is None
        assert not store.slot_wanted(Stage.TRAIN, hardware)
    claim = store.claim("w", Stage.TRAIN, {**gpu, "memory_bytes": 40 * 2**30})
    assert claim is not None
    assert claim.job_id == large


def test_a_claim_knows_the_seconds_of_the_attempts_before_it(store: Store) -> None:
    add_job(store)
    claim = training(store)
    assert claim.seconds == 0
    time.sleep(0.2)
    store.release(claim, "worker restarts")
    claim = claimed(store, Stage.TRAIN)
    assert 0.2 <= claim.seconds < 5


def test_cancelling_a_waiting_job_is_at_once(store: Store) -> None:
    job = add_job(store)
    assert store.cancel_job("default", job.id).status == "cancelled"
    assert store.cancel_job("default", job.id).status == "cancelled"
    assert store.claim("w", Stage.PREPARE) is None


def test_cancelling_a_running_job_asks_its_owner(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    assert store.cancel_job("default", job.id).detail_state == "cancelling"
    assert store.heartbeat(claim) == "cancel"
    store.release(claim, "stopped")
    assert store.get_job("default", job.id).status == "cancelled"
    store.create_job("default", NewJob(request=RUN, model="m", training_file="f"))


def test_an_ended_job_cannot_be_cancelled(store: Store) -> None:
    job = add_job(store)
    store.fail(training(store), ERROR)
    with pytest.raises(JobTerminal, match="has failed"):
        store.cancel_job("default", job.id)


def test_crashes_are_counted_and_pauses_are_not(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    for _ in range(5):
        store.release(claim, "worker restarts")
        claim = claimed(store, Stage.TRAIN)
    assert store.get_job("default", job.id).failures == 0
    for _ in range(2):
        store.crash(claim, ERROR, **LIMITS)
        assert store.get_job("default", job.id).status == "queued"
        claim = claimed(store, Stage.TRAIN)
    store.crash(claim, ERROR, **LIMITS)
    done = store.get_job("default", job.id)
    assert (done.status, done.failures) == ("failed", 3)
    assert done.error is not None
    assert "tried 3 times" in done.error["message"]


def test_a_lack_of_memory_leaves_a_job_as_many_lives_as_it_had(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    for _ in range(4):
        store.crash(claim, ERROR, **LIMITS, outcome=LACKED_MEMORY)
        claim = claimed(store, Stage.TRAIN)
    for _ in range(2):
        store.crash(claim, ERROR, **LIMITS)
        claim = claimed(store, Stage.TRAIN)
    lease = next(lease for lease in store.leases() if lease.job_id == job.id)
    assert store.expire(lease, **LIMITS)
    assert store.get_job("default", job.id).status == "failed"


def test_metrics_are_written_once_whoever_tells_them(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    evaluation = {
        "seq": 1,
        "time": 1.0,
        "kind": "evaluation",
        "step": 2,
        "eval_loss": 0.4,
        "eval_token_accuracy": 0.9,
        "tokens": 7,
    }
    store.record(claim, [step(1), step(2), evaluation], run="r", read_position=1)
    store.crash(claim, ERROR, **LIMITS)
    again = claimed(store, Stage.TRAIN)
    store.record(again, [step(2, loss=0.25), step(3)], run="r", read_position=1)
    columns, rows, more = store.metrics("default", job.id)
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["step"] for row in table] == [1, 2, 3]
    assert (table[1]["loss"], table[1]["eval_loss"]) == (0.25, 0.4)
    assert not more
    assert store.metrics("default", job.id, after_step=1, limit=1)[1][0][columns.index("step")] == 2


def test_checkpoints_count_once_registered(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    store.record(claim, [saved(3), saved(6)], run="runs/j/2", read_position=1)
    store.record(
        claim, [{**saved(3), "kind": "checkpoint_deleted"}], run="runs/j/2", read_position=2
    )
    page = store.checkpoints("default", job.id)
    assert [(c.step, c.path) for c in page.items] == [(6, "runs/j/2/checkpoints/step-6")]
    store.release(claim, "x")
    again = claimed(store, Stage.TRAIN)
    assert again.read == {claim.attempt: 2}, "what is missing can be read from here on"


def test_a_job_keeps_its_newest_checkpoints_over_all_attempts(store: Store) -> None:
    job = add_job(store, suffix="s")
    claim = training(store)
    store.record(claim, [saved(n) for n in (1, 2, 3, 4)], run="r/2", read_position=1)
    user = add_job(store, model=checkpoint_name(store.get_job("default", job.id), 1))
    first, second, third, fourth = (f"r/2/checkpoints/step-{n}" for n in (1, 2, 3, 4))
    assert store.tidy_checkpoints(claim, 2) == {first, second, third, fourth}, "its own"
    store.release(claim, "x")
    again = claimed(store, Stage.TRAIN)
    assert store.tidy_checkpoints(again, 2) == {first, second, third, fourth}, "none newer yet"
    store.record(again, [saved(5)], run="r/3", read_position=1)
    own = "r/3/checkpoints/step-5"
    assert store.tidy_checkpoints(again, 2) == {first, fourth, own}, f"{user.id} starts from one"
    store.cancel_job("default", user.id)
    assert store.tidy_checkpoints(again, 2) == {fourth, own}
    assert [c.step for c in store.checkpoints("default", job.id).items] == [5, 4]


def test_what_an_older_attempt_tells_late_takes_nothing_from_a_newer_one(store: Store) -> None:
    job = add_job(store)
    older = training(store)
    store.release(older, "x")
    newer = claimed(store, Stage.TRAIN)
    store.record(newer, [saved(6)], run="r/3", read_position=1)
    now = store.get_job("default", job.id)
    late = [saved(6), saved(9), {**saved(6), "kind": "checkpoint_deleted"}, step(7)]
    late += [{"seq": 9, "time": 1.0, "kind": "state", "state": "saving", "message": "Writing"}]
    store.record(newer, late, run="r/2", read_position=1, attempt=older.attempt)
    then = store.get_job("default", job.id)
    assert (then.progress_step, then.detail_state) == (now.progress_step, now.detail_state)
    assert len(store.metrics("default", job.id)[1]) == 1, "it is history all the same"
    found = [(c.step, c.attempt) for c in store.checkpoints("default", job.id).items]
    assert found == [(9, older.attempt), (6, newer.attempt)]


def test_what_goes_on_as_before_is_told_of_the_job_and_is_no_news(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    told = [
        {"seq": 1, "time": 1.0, "kind": "state", "state": state, "message": state, "again": again}
        for state, again in (
            ("training_sparse", False),
            ("evaluating", False),
            ("training_sparse", True),
        )
    ]
    store.record(claim, told, run="r", read_position=1)
    assert store.get_job("default", job.id).detail_state == "training_sparse"
    newest, before = store.events("default", job.id).items[:2]
    assert [newest.message, before.message] == ["evaluating", "training_sparse"]


def test_what_a_database_cannot_hold_costs_no_run(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    lost = {"seq": 1, "time": 1.0, "kind": "evaluation", "step": 1} | dict.fromkeys(
        ("eval_loss", "eval_token_accuracy")
    )
    odd = {"seq": 2, "time": 1.0, "kind": "sample", "step": 1, "prompt": "a\0", "text": "\ud83d"}
    store.record(claim, [lost, odd], run="r", read_position=1)
    sample, evaluation = store.events("default", job.id).items[:2]
    assert evaluation.message == "Step 1: held-out loss not a number"
    assert sample.data == {"step": 1, "prompt": "a\ufffd", "text": "?"}
    store.fail(claim, {**ERROR, "message": "a\0b"})
    assert store.get_job("default", job.id).error == {**ERROR, "message": "a\ufffdb"}


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_database_that_only_reads_is_one_that_is_away(store: Store, quick: Settings) -> None:
    name = quick.database_url.rpartition("/")[2]
    with psycopg.connect(quick.database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(StoreUnavailable, match="read-only transaction"):
        add_job(store)


def test_other_projects_see_nothing(store: Store) -> None:
    job = add_job(store)
    store.add_file(
        "default", NewFile(id="file-1", filename="a", purpose="fine-tune", bytes=1, sha256="x")
    )
    asked = [
        lambda: store.get_job("other", job.id),
        lambda: store.cancel_job("other", job.id),
        lambda: store.events("other", job.id),
        lambda: store.metrics("other", job.id),
        lambda: store.checkpoints("other", job.id),
        lambda: store.get_file("other", "file-1"),
        lambda: store.delete_file("other", "file-1"),
        lambda: store.get_model("other", "ft:m"),
    ]
    for ask in asked:
        with pytest.raises(NotFound):
            ask()
    assert store.list_jobs("other").items == ()


def test_lists_are_paged_by_key_newest_first(store: Store) -> None:
    ids = [add_job(store, metadata={"n": str(i % 2)}).id for i in range(5)]
    first = store.list_jobs("default", limit=2)
    assert [j.id for j in first.items] == [ids[4], ids[3]]
    assert first.has_more
    rest = store.list_jobs("default", after=ids[3], limit=9)
    assert ([j.id for j in rest.items], rest.has_more) == ([ids[2], ids[1], ids[0]], False)
    assert [j.id for j in store.list_jobs("default", metadata={"n": "1"}).items] == [ids[3], ids[1]]
    assert store.list_jobs("default", metadata={}).items == ()
    assert store.counts_by_status("default") == {"validating_files": 5}
    with pytest.raises(InvalidCursor):
        store.list_jobs("default", after="ftjob-none")


def test_a_file_is_kept_while_a_job_needs_it(store: Store) -> None:
    store.add_file(
        "default", NewFile(id="file-1", filename="a", purpose="fine-tune", bytes=1, sha256="x")
    )
    job = add_job(store)
    with pytest.raises(FileInUse, match=job.id):
        store.delete_file("default", "file-1")
    store.cancel_job("default", job.id)
    store.delete_file("default", "file-1")
    with pytest.raises(NotFound):
        store.get_file("default", "file-1")


def test_a_key_is_known_by_its_secret_only(store: Store) -> None:
    store.ensure_key("sk-sat-secret", name="a")
    store.ensure_key("sk-sat-secret", name="a")
    key = store.authenticate("sk-sat-secret")
    assert key is not None
    assert key.project == "default"
    assert store.authenticate("sk-sat-wrong") is None
    assert store.authenticate("") is None
