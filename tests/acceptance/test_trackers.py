"""A real job whose metrics go to TensorBoard too, through API, worker and child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.settings import Settings
from tests.conftest import migrated
from tests.sat_core.tiny import write_model, write_text
from tests.service import Worker, api, eventually

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLite alone: what is new here is not in the database."""
    return migrated("sqlite", request, tmp_path)


def test_a_job_is_told_of_while_it_runs_and_to_its_end(quick: Settings, broker_url: str) -> None:
    write_model(quick.data_dir / "models" / "tiny")
    settings = quick.model_copy(update={"broker_url": broker_url, "lease_seconds": 15.0})
    worker = Worker(settings)
    try:
        with api(settings) as client:
            content = write_text(settings.data_dir / "text.jsonl").read_bytes()
            sent = {"file": ("text.jsonl", content)}
            file = client.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()
            body = {
                "model": "local/tiny",
                "training_file": file["id"],
                "integrations": [{"type": "tensorboard"}],
                "sat": {"train": {"max_steps": 12, "max_seq_len": 32}, "eval": {"every": 4}},
            }
            # A worker that has just come has not yet said what it can speak to.
            eventually(lambda: client.get("/v1/sat/queue").json()["workers"], seconds=60)
            made = client.post(JOBS, json=body)
            assert made.status_code == 200, made.text
            path = f"{JOBS}/{made.json()['id']}"

            def done() -> dict[str, Any] | None:
                (found,) = client.get(f"{path}/integrations").json()["data"]
                return dict(found) if found["status"] == "done" else None

            found = eventually(done, seconds=300) or {}
            metrics = client.get(f"{path}/metrics").json()
            events = client.get(f"{path}/events", params={"limit": 100}).json()["data"]
    finally:
        worker.stop()
    assert (found["step"], found["error"]) == (12, None)
    assert any(found["run"] in event["message"] for event in events)
    losses = {row[metrics["columns"].index("step")]: row[metrics["columns"].index("loss")] for row in metrics["rows"]}  # fmt: skip
    assert tensorboard(settings.data_dir / found["run"]) == pytest.approx(
        {step: loss for step, loss in losses.items() if loss is not None}, rel=1e-6
    )


def tensorboard(folder: Path) -> dict[int, float]:
    """The training loss by step, as TensorBoard's own pages read it."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    found = accumulator.Tensors("train_loss")
    assert len(found) == len({event.step for event in found})
    return {event.step: float(make_ndarray(event.tensor_proto).item()) for event in found}
