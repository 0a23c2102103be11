"""What trackers of experiments hold of a job, by their own libraries: every row once, whatever dies on the way."""

from __future__ import annotations

import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import integrations
from jobs.integrations import Integration
from jobs.settings import Settings
from jobs.spec import Claim, NewFile, NewJob
from jobs.states import Stage
from jobs.store import Store
from sat_core.plan.request import RunRequest
from tests.api.finished import events
from tests.servers import command_of
from tests.service import eventually
from worker.herald import Herald

RUN = RunRequest.from_dict({"model": "local/tiny"}).to_dict()
PREPARED = {"config": {}, "hyperparameters": {"n_epochs": 2}, "figures": {}, "total_steps": 20, "warnings": []}  # fmt: skip
TOTAL = 20
SUMMARY = {"steps": TOTAL, "eval_loss_after": 2.5, "forgetting_loss_after": None}
SENT_ON = {
    "mlflow": {"experiment": "tests", "name": None, "tags": {"team": "a"}},
    "tensorboard": {},
    "wandb": {"project": "tests", "name": None, "entity": None, "tags": ["a"]},
}


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite alone: what is new here is not in the database."""
    from tests.conftest import migrated

    return migrated("sqlite", request, tmp_path)


def claim_for(store: Store, kind: str) -> Claim:
    file = NewFile(id="file-1", filename="d", purpose="fine-tune", bytes=1, sha256="")
    store.add_file("default", file)
    told = ({"type": kind, kind: SENT_ON[kind]},)
    new = NewJob(request=RUN, model="local/tiny", training_file="file-1", integrations=told)
    store.create_job("default", new)
    prepare = store.claim("w", Stage.PREPARE)
    assert prepare is not None
    store.finish_prepare(prepare, PREPARED)
    claim = store.claim("w", Stage.TRAIN)
    assert claim is not None
    return claim


def record(store: Store, claim: Claim, first: int, last: int) -> None:
    store.record(claim, events(first, last, TOTAL), run="runs/x/2", read_position=last)


def finish(store: Store, claim: Claim) -> None:
    store.finish_train(claim, model="ft:tiny", path="results/x", summary=SUMMARY)


class Telling:
    """A worker's herald that tells of one job, in a thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.stopping = threading.Event()
        self.herald = Herald(settings, store, self.stopping)
        claim = store.claim_integration(self.herald.types)
        assert claim is not None
        self.thread = threading.Thread(target=self.herald.tell, args=(claim,))
        self.thread.start()

    def wait(self) -> None:
        self.thread.join(120)
        assert not self.thread.is_alive()

    def stop(self) -> None:
        self.stopping.set()
        self.wait()


def told(store: Store, claim: Claim) -> Integration:
    (found,) = store.list_integrations("default", claim.job_id)
    return found


def measured(store: Store, claim: Claim) -> dict[int, dict[str, float]]:
    """What the store holds, under the names that trackers are told."""
    from jobs.csv_table import OPENAI_NAMES

    columns, rows, _ = store.metrics("default", claim.job_id)
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    return {
        row["step"]: {
            OPENAI_NAMES.get(k, k): v
            for k, v in row.items()
            if v is not None and k not in ("step", "time")
        }
        for row in named
    }


def in_tensorboard(settings: Settings, claim: Claim) -> list[tuple[int, dict[str, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    folder = settings.data_dir / "tensorboard" / "default" / claim.job_id
    found = []
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            values = {v.tag: float(make_ndarray(v.tensor).item()) for v in event.summary.value}
            if values:
                found.append((event.step, values))
    return found


def test_tensorboard_has_every_row_once_over_stops_and_kills(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrations, "BACK_OFF", (0, 0))
    claim = claim_for(store, "tensorboard")
    record(store, claim, 1, 8)
    first = Telling(quick, store)
    eventually(lambda: told(store, claim).step == 7, seconds=60)
    assert store.claim_integration(["tensorboard"]) is None, "it has its sender"
    first.stop()
    record(store, claim, 9, 14)
    second = Telling(quick, store)
    eventually(lambda: told(store, claim).step == 13, seconds=60)
    senders = [p for p in psutil.Process().children() if "worker.trackers" in command_of(p)]
    for sender in senders:
        sender.kill()
    record(store, claim, 15, TOTAL)
    second.wait()
    found = told(store, claim)
    assert (found.status, "hung or crashed" in (found.error or "")) == ("open", True)
    finish(store, claim)
    Telling(quick, store).wait()

    found = told(store, claim)
    assert (found.status, found.step, found.error) == ("done", TOTAL, None)
    rows = in_tensorboard(quick, claim)
    assert [step for step, _ in rows] == list(range(TOTAL + 1))
    for step, values in measured(store, claim).items():
        assert dict(rows)[step] == pytest.approx(values, rel=1e-6)
    assert "valid_loss" in dict(rows)[0], "the evaluation before training"
    warned = [e for e in store.events("default", claim.job_id, limit=50).items if e.level == "warn"]
    assert len(warned) == 1
    assert store.get_job("default", claim.job_id).status == "succeeded"


# MLflow's own store, which is read here in this process, is behind the newest SQLAlchemy.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_has_the_run_and_its_end(
    store: Store, quick: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'tracked.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    claim = claim_for(store, "mlflow")
    record(store, claim, 1, 12)
    first = Telling(quick, store)
    eventually(lambda: told(store, claim).step == 11, seconds=120)
    first.stop()
    record(store, claim, 13, TOTAL)
    finish(store, claim)
    Telling(quick, store).wait()

    assert told(store, claim).status == "done"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["team"] == "a"
    assert run.data.params["sat.importance.metric"] == RUN["sat"]["importance"]["metric"]
    assert run.data.metrics["final/eval_loss_after"] == 2.5
    for name in ("train_loss", "valid_loss", "memory_bytes"):
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        wanted = {s: v[name] for s, v in measured(store, claim).items() if name in v}
        assert history == pytest.approx(wanted)
    client._tracking_client.store._dispose_engine()


def test_wandb_offline_keeps_every_row_once(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    claim = claim_for(store, "wandb")
    record(store, claim, 1, 12)
    first = Telling(quick, store)
    eventually(lambda: told(store, claim).step == 11, seconds=120)
    first.stop()
    record(store, claim, 13, TOTAL)
    finish(store, claim)
    Telling(quick, store).wait()

    assert told(store, claim).status == "done"
    steps, losses = Counter[int](), {}
    for path in (quick.data_dir / "wandb").glob(f"offline-run-*-{claim.job_id}/*.wandb"):
        for row in in_wandb(path):
            steps[row["_step"]] += 1
            losses[row["_step"]] = row.get("train_loss")
    assert steps == Counter(range(TOTAL + 1))
    wanted = {s: v.get("train_loss") for s, v in measured(store, claim).items()}
    assert losses == pytest.approx(wanted)


def in_wandb(path: Path) -> list[dict[str, Any]]:
    """The history in a run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in log_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            found.append({"_step": record.history.step.num, **row})
    return found


def log_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log behind W&B's own 7 bytes: checksum, length, type (whole, first, middle, last), content."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def test_a_tracker_that_is_not_there_costs_an_event_and_no_job(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrations, "BACK_OFF", (0,))
    secret = "127.0.0.1"  # a part of the message, as a key might be
    store.put_secret("default", "mlflow_tracking_token", secret)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    claim = claim_for(store, "mlflow")
    record(store, claim, 1, 3)
    for status in ("open", "failed"):
        Telling(quick, store).wait()
        assert told(store, claim).status == status
    warned = [e for e in store.events("default", claim.job_id, limit=50).items if e.level == "warn"]
    assert len(warned) == 1
    assert warned[0].message.startswith("Metrics do not reach mlflow: ")
    assert secret not in warned[0].message
    assert secret not in (told(store, claim).error or "")
    assert store.get_job("default", claim.job_id).status == "running"
    assert store.claim_integration(["mlflow"]) is None, "it was tried often enough"


def test_wandb_without_a_key_says_so(
    store: Store, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(quick.data_dir))
    claim = claim_for(store, "wandb")
    record(store, claim, 1, 3)
    Telling(quick, store).wait()
    assert "key" in (told(store, claim).error or "").lower()


def test_a_paused_job_gives_its_sender_back(store: Store, quick: Settings) -> None:
    claim = claim_for(store, "tensorboard")
    record(store, claim, 1, 5)
    telling = Telling(quick, store)
    eventually(lambda: told(store, claim).step == 4, seconds=60)
    store.pause_job("default", claim.job_id)
    store.release(claim, "paused")
    telling.wait()
    assert told(store, claim).owner is None
    assert store.claim_integration(["tensorboard"]) is None, "nothing to tell until it goes on"
