"""What the runner does with every way a child may end. The child is a small program that speaks the run-folder protocol."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from jobs.artifacts import Artifacts
from jobs.db import make_engine
from jobs.errors import StoreUnavailable
from jobs.models import AttemptRow
from jobs.names import checkpoint_name
from jobs.queue import NullBell
from jobs.settings import Settings
from jobs.spec import Claim, NewFile, NewJob
from jobs.states import Stage
from jobs.store import Store
from sat_core.plan.request import RunRequest
from tests.jobs.test_store import saved
from tests.service import eventually
from worker.kinds import KINDS
from worker.runner import Runner
from worker.sweeper import Sweeper
from worker.tail import EVENTS_FORMAT, Tail

RUN = RunRequest.from_dict({"model": "m"}).to_dict()

CHILD = Path(__file__).with_name("protocol_child.py")
CONFIG = {"checkpoint_keep": 2}
PREPARED = {
    "config": CONFIG,
    "hyperparameters": {},
    "figures": {},
    "total_steps": 3,
    "warnings": [],
}


def claim_for(
    store: Store,
    settings: Settings,
    behaviour: str,
    request: dict[str, Any] = RUN,
    **config: Any,
) -> Claim:
    """A claimed training job whose child will behave so."""
    store.add_file(
        "default", NewFile(id="file-1", filename="d", purpose="fine-tune", bytes=1, sha256="")
    )
    new = NewJob(request=request, model="some/model", training_file="file-1", suffix="s")
    store.create_job("default", new)
    prepare = store.claim("w", Stage.PREPARE)
    assert prepare is not None
    behaving = {**CONFIG, "behaviour": behaviour, **config}
    store.finish_prepare(prepare, {**PREPARED, "config": behaving})
    claim = store.claim("w", Stage.TRAIN)
    assert claim is not None
    return claim


def run(
    store: Store, settings: Settings, claim: Claim, stopping: threading.Event | None = None
) -> None:
    Runner(
        settings,
        store,
        claim,
        "",
        stopping or threading.Event(),
        program=(sys.executable, str(CHILD)),
    ).run()


@pytest.mark.parametrize(
    ("behaviour", "status", "words"),
    [
        ("succeed", "succeeded", "Succeeded: ft:some/model:default:s:"),
        ("refuse", "failed", "the data are bad"),
        ("crash", "queued", "exit code 3"),
        ("kill", "queued", "signal 9"),
        ("silent", "queued", "exit code 0"),
        ("full", "queued", "No space left on device; going on from the newest checkpoint"),
    ],
)
def test_each_end_of_a_child_is_written_down(
    store: Store, quick: Settings, behaviour: str, status: str, words: str
) -> None:
    claim = claim_for(store, quick, behaviour)
    run(store, quick, claim)
    job = store.get_job("default", claim.job_id)
    assert job.status == status
    told = [e.message for e in store.events("default", claim.job_id, limit=50).items]
    assert any(words in message for message in told), told
    columns, rows, _ = store.metrics("default", claim.job_id)
    assert [row[columns.index("step")] for row in rows] == [1, 2, 3]
    assert job.failures == (status == "queued")


def test_a_run_that_lacks_memory_goes_on_with_smaller_micro_batches(
    store: Store, quick: Settings
) -> None:
    claim: Claim | None = claim_for(store, quick, "lack", micro_batch_size=8)
    sizes = []
    while claim is not None:
        run(store, quick, claim)
        folder = Artifacts.from_settings(quick).run(claim.job_id, claim.attempt)
        sizes.append(json.loads((folder / "config.json").read_text())["micro_batch_size"])
        job = store.get_job("default", claim.job_id)
        time.sleep(quick.retry_seconds * 8)
        claim = store.claim("w", Stage.TRAIN)
    assert sizes == [8, 4, 2, 1]
    assert (job.status, job.failures) == ("failed", 3)
    assert quick.max_failures == 3, "as many lacks as a job may have deaths, and none counts as one"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("out_of_memory", "sat.train.max_seq_len")
    told = [e.message for e in store.events("default", job.id, limit=50).items]
    assert sum("The next attempt makes micro-batches of" in message for message in told) == 3


@pytest.mark.parametrize(("behaviour", "outcome"), [("kill", "out_of_memory"), ("hang", "crashed")])
def test_a_sigkill_of_our_own_is_no_lack_of_memory(
    store: Store,
    quick: Settings,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    outcome: str,
) -> None:
    """Meanwhile the kernel kills something on this machine: this child, or another program than the one that hangs."""
    counted = itertools.count()
    monkeypatch.setattr("worker.runner.memory_kills", lambda: next(counted))
    claim = claim_for(store, quick, behaviour, micro_batch_size=8)
    run(store, quick.model_copy(update={"stall_seconds": 1}), claim)
    with store.reading() as session:
        (attempt,) = session.scalars(select(AttemptRow).where(AttemptRow.stage == Stage.TRAIN))
        assert attempt.outcome == outcome


def test_the_model_is_moved_out_of_the_run_folder(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "succeed")
    run(store, quick, claim)
    name = store.get_job("default", claim.job_id).fine_tuned_model
    assert name is not None
    path = quick.data_dir / store.get_model("default", name).path
    assert (path / "config.json").read_text() == "{}"


def test_the_metrics_of_a_run_become_a_file_of_results(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "succeed")
    run(store, quick, claim)
    file_id = store.get_job("default", claim.job_id).result_file
    assert file_id is not None
    file = store.get_file("default", file_id)
    assert (file.purpose, file.status) == ("fine-tune-results", "processed")
    found = [path for path in (quick.data_dir / "files").iterdir() if path.stat().st_size]
    (text,) = (path.read_text() for path in found)
    assert len(text.encode()) == file.bytes
    first, *rows = text.splitlines()
    assert first.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    assert [row.split(",")[:5] for row in rows] == [[n, "0.5", "0.5", "", ""] for n in "123"]


def test_the_last_crash_fails_the_job_with_the_end_of_its_log(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "crash")
    run(store, quick.model_copy(update={"max_failures": 1}), claim)
    job = store.get_job("default", claim.job_id)
    assert job.error is not None
    assert "something broke" in job.error["log_excerpt"]


def test_a_runner_that_lost_its_lease_kills_its_child_and_writes_nothing(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "hang")
    thread = threading.Thread(target=run, args=(store, quick, claim))
    thread.start()
    log = quick.data_dir / "runs" / claim.job_id / str(claim.attempt) / "pid"
    eventually(log.exists, seconds=60)
    lease = store.leases()[0]
    while not store.expire(lease, max_failures=3, retry_seconds=0):
        lease = store.leases()[0]
    thread.join(10)
    assert not thread.is_alive()
    assert not Path(f"/proc/{log.read_text()}").exists()
    assert store.get_job("default", claim.job_id).status == "queued"


def test_a_cancel_reaches_a_child_that_does_not_listen(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "deaf")
    thread = threading.Thread(
        target=run, args=(store, quick.model_copy(update={"grace_seconds": 0.5}), claim)
    )
    thread.start()
    store.cancel_job("default", claim.job_id)
    thread.join(15)
    assert store.get_job("default", claim.job_id).status == "cancelled"


def test_a_run_that_has_had_its_time_fails_with_its_checkpoint_kept(
    store: Store, quick: Settings
) -> None:
    limited = RunRequest.from_dict({"model": "m", "sat": {"limits": {"max_seconds": 1}}}).to_dict()
    claim = claim_for(store, quick, "checkpoint", limited)
    run(store, quick, claim)
    job = store.get_job("default", claim.job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "time_limit_exceeded")
    assert [c.step for c in store.checkpoints("default", claim.job_id).items] == [3]


def test_a_stopping_worker_gives_its_job_back_uncounted(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "hang")
    stopping = threading.Event()
    thread = threading.Thread(target=run, args=(store, quick, claim, stopping))
    thread.start()
    stopping.set()
    thread.join(15)
    job = store.get_job("default", claim.job_id)
    assert (job.status, job.failures, job.owner) == ("queued", 0, None)


def test_what_was_told_after_a_worker_was_lost_is_caught_up_with(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "succeed")
    artifacts = Artifacts.from_settings(quick)
    folder = artifacts.run(claim.job_id, claim.attempt)
    events = [saved(3), saved(6), {**saved(3), "kind": "checkpoint_deleted"}, saved(9)]
    lines = [json.dumps(event) + "\n" for event in events]
    for step in (6, 9):
        (folder / f"checkpoints/step-{step}").mkdir(parents=True)
    # One line was cut short by a full disk, and the last one is not yet whole.
    lines.insert(2, lines[2][:20] + lines[2])
    (folder / "events.jsonl").write_text("".join(lines) + '{"half')
    run_folder = artifacts.relative(folder)
    store.record(claim, events[:1], run=run_folder, read_position=len(lines[0]))
    assert store.expire(store.leases()[0], max_failures=3, retry_seconds=0)
    again = store.claim("w", Stage.TRAIN)
    assert again is not None
    run(store, quick, again)
    config = json.loads(folder.with_name(str(again.attempt)).joinpath("config.json").read_text())
    assert config["resume_from"] == [str(folder / f"checkpoints/step-{n}") for n in (9, 6)]
    assert [c.step for c in store.checkpoints("default", claim.job_id).items] == [9, 6]


class Hiccup(Store):
    """A store whose database is away once, after it has taken the first events."""

    taken = 0

    def record(self, *arguments: Any, **named: Any) -> Any:
        self.taken += 1
        if self.taken == 2:
            raise StoreUnavailable("away")
        return super().record(*arguments, **named)


def test_catching_up_is_told_once_whatever_the_database_does(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_for(store, quick, "succeed")
    folder = Artifacts.from_settings(quick).run(claim.job_id, claim.attempt)
    folder.mkdir(parents=True)
    lines = [
        json.dumps(
            {"seq": n, "time": 1.0, "kind": "message", "level": "warn", "message": f"no {n}"}
        )
        for n in range(2)
    ]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("worker.tail.CHUNK_BYTES", len(lines[0]) + 2)
    assert store.expire(store.leases()[0], max_failures=3, retry_seconds=0)
    again = store.claim("w", Stage.TRAIN)
    assert again is not None
    engine = make_engine(quick)
    run(Hiccup(engine), quick, again)
    engine.dispose()
    told = [e.message for e in store.events("default", claim.job_id, limit=50).items]
    assert (told.count("no 0"), told.count("no 1")) == (1, 1)


class Counting(Store):
    """A store that counts the heartbeats of runs."""

    beats = 0

    def heartbeat(self, claim: Claim) -> Any:
        self.beats += 1
        return super().heartbeat(claim)


def test_a_lease_is_renewed_while_metrics_become_a_file(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.measures.ROWS_PER_READ", 1)
    claim = claim_for(store, quick, "succeed")
    engine = make_engine(quick)
    counting = Counting(engine)
    run(counting, quick.model_copy(update={"heartbeat_seconds": 60}), claim)
    engine.dispose()
    assert counting.beats >= 3, "one a lot"


def test_what_earlier_attempts_saved_goes_when_newer_checkpoints_are_there(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "tidies")
    artifacts = Artifacts.from_settings(quick)
    folder = artifacts.run(claim.job_id, claim.attempt)
    for name in ("step-3", ".step-4-77"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    store.record(claim, [saved(3)], run=artifacts.relative(folder), read_position=1)
    store.release(claim, "stopped")
    again = store.claim("w", Stage.TRAIN)
    assert again is not None
    run(store, quick, again)
    assert [c.step for c in store.checkpoints("default", claim.job_id).items] == [9, 6]
    assert not list((folder / "checkpoints").iterdir())


class Away(Store):
    """A store whose database takes no events."""

    def record(self, *_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")


def test_a_run_that_talks_is_not_silent_while_the_database_is_away(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "talks")
    settings = quick.model_copy(update={"stall_seconds": 2})
    engine = make_engine(settings)
    runner = Runner(
        settings, Away(engine), claim, "", threading.Event(), program=(sys.executable, str(CHILD))
    )
    thread = threading.Thread(target=runner.run)
    thread.start()
    model = runner.folder / "model"
    eventually(model.exists, seconds=20)
    runner.store = store
    thread.join(20)
    engine.dispose()
    assert store.get_job("default", claim.job_id).status == "succeeded"


def test_a_runner_that_breaks_says_why(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "succeed")
    Runner(quick, store, claim, "", threading.Event(), program=("/no/such/program",)).run()
    job = store.get_job("default", claim.job_id)
    assert (job.status, job.failures) == ("queued", 1)
    assert "The worker could not go on: FileNotFoundError" in job.detail_message


def test_a_checkpoint_that_was_pinned_since_is_found_where_it_lies(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "succeed", model_path="/gone")
    store.record(claim, [saved(3)], run="r/2", read_position=1)
    name = checkpoint_name(claim.job, 3)
    store.create_job("default", NewJob(request=RUN, model=name, training_file="file-1"))
    prepare = store.claim("w", Stage.PREPARE)
    assert prepare is not None
    config = {**CONFIG, "behaviour": "succeed", "model_path": str(quick.data_dir / "r/2")}
    store.finish_prepare(prepare, {**PREPARED, "config": config})
    (found,) = store.checkpoints("default", claim.job_id).items
    store.pin_checkpoint("default", found, "pinned/j/c/step-3")
    train = store.claim("w", Stage.TRAIN)
    assert train is not None
    run(store, quick, train)
    folder = Artifacts.from_settings(quick).run(train.job_id, train.attempt)
    path = json.loads((folder / "config.json").read_text())["model_path"]
    assert path == str(quick.data_dir / "pinned/j/c/step-3/model")


def test_a_lease_is_judged_by_watching_it_stand_still(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "hang")
    sweeper = Sweeper(quick, store, NullBell())
    until = time.monotonic() + 2 * quick.lease_seconds
    while time.monotonic() < until:
        store.heartbeat(claim)
        assert sweeper.sweep() == 0
        time.sleep(0.2)
    until = time.monotonic() + 3 * quick.lease_seconds
    while not sweeper.sweep():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert store.get_job("default", claim.job_id).failures == 1


def test_a_child_that_prepares_is_bounded_as_that_of_an_estimate(
    store: Store, quick: Settings
) -> None:
    store.add_file(
        "default", NewFile(id="file-1", filename="d", purpose="fine-tune", bytes=1, sha256="")
    )
    job = store.create_job("default", NewJob(request=RUN, model="a/b", training_file="file-1"))
    claim = store.claim("w", Stage.PREPARE)
    assert claim is not None
    # The bounds arrive from outside, as the process starts.
    told = """if True:
        import json, pathlib, resource, sys, time
        while (most := resource.getrlimit(resource.RLIMIT_DATA)[0]) == resource.RLIM_INFINITY:
            time.sleep(0.01)
        failed = {"seq": 1, "time": 1.0, "kind": "failed", "code": "x", "message": str(most), "param": None}
        pathlib.Path(sys.argv[2], "events.jsonl").write_text(json.dumps(failed) + "\\n")
        sys.exit(20)
    """
    program = (sys.executable, "-c", told)
    Runner(quick, store, claim, "", threading.Event(), program=program).run()
    error = store.get_job("default", job.id).error
    assert error is not None
    assert error["message"] == str(KINDS["estimate"].bounds.memory_bytes)


def test_a_worker_that_does_not_know_the_events_gives_the_job_back_and_takes_no_more(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, quick, "done")
    told = """if True:
        import pathlib, sys
        begun = '{"seq": 1, "time": 1.0, "kind": "begun", "format": "satune.events/9"}\\n'
        pathlib.Path(sys.argv[2], "events.jsonl").write_text(begun)
    """
    program = (sys.executable, "-c", told)
    stopping = threading.Event()
    Runner(quick, store, claim, "", stopping, program=program).run()
    job = store.get_job("default", claim.job_id)
    assert (job.status, job.failures, stopping.is_set()) == ("queued", 0, True)
    assert "'satune.events/9'; this worker reads 'satune.events/1'" in job.detail_message


def test_an_unfinished_line_is_not_read(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    tail = Tail(log)
    assert tail.read() == ([], 0)
    begun = {"kind": "begun", "format": EVENTS_FORMAT}
    log.write_bytes(json.dumps(begun).encode() + b'\n{"kind"')
    events, position = tail.read()
    assert (events, position) == ([begun], len(json.dumps(begun)) + 1)
    tail.taken(position)
    with log.open("ab") as file:
        file.write(b': "state"}\n' + json.dumps({"kind": "metrics"}).encode())
    assert tail.read()[0] == [{"kind": "state"}]
