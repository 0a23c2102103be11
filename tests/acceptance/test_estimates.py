"""An estimate through the whole service, then the job it was for: counts agree, and the next one knows how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.settings import Settings
from tests.conftest import migrated
from tests.sat_core.tiny import write_model, write_text
from tests.service import Worker, api, eventually

ESTIMATES, JOBS = "/v1/fine_tuning/estimates", "/v1/fine_tuning/jobs"
FACTOR = 3


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """PostgreSQL alone; `tests/jobs` asks both what is past."""
    return migrated("postgresql", request, tmp_path)


@pytest.fixture
def client(quick: Settings, broker_url: str) -> Iterator[httpx.Client]:
    """API and worker, with a tiny model."""
    write_model(quick.data_dir / "models" / "tiny")
    settings = quick.model_copy(update={"broker_url": broker_url, "lease_seconds": 15.0})
    worker = Worker(settings)
    try:
        with api(settings) as found:
            yield found
    finally:
        worker.stop()


def body_for(client: httpx.Client, settings: Settings) -> dict[str, Any]:
    content = write_text(settings.data_dir / "text.jsonl").read_bytes()
    files = {"file": ("text.jsonl", content)}
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files).json()
    sat = {
        "mode": "on",
        "train": {"max_steps": 40, "max_seq_len": 32},
        "eval": {"every": 0, "forgetting_sequences": 0},
        "checkpoints": {"every": 0},
    }
    hyper = {"batch_size": 4}
    return {
        "model": "local/tiny",
        "training_file": file["id"],
        "hyperparameters": hyper,
        "sat": sat,
        "seed": 3,
    }


def estimate(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    first = client.post(ESTIMATES, json=body)
    assert first.status_code == 200, first.text

    def ready() -> dict[str, Any] | None:
        found = client.get(f"{ESTIMATES}/{first.json()['id']}", params={"wait": 20}).json()
        return dict(found) if found["status"] != "pending" else None

    return eventually(ready, seconds=90) or {}


def test_a_job_counts_what_was_quoted_and_calibrates_the_next(
    client: httpx.Client, quick: Settings
) -> None:
    body = body_for(client, quick)
    quoted = estimate(client, body)
    assert quoted["status"] == "ready", quoted["error"]
    assert (quoted["time"]["basis"], quoted["time"]["seconds"]) == ("analytic", None)
    assert quoted["time"]["past_error"] is None
    assert quoted["energy"] == {"joules": None}
    assert quoted["memory"]["basis"] == "analytic"
    assert quoted["memory"]["fits"] is True
    assert quoted["speedup"]["expected"] is None
    assert client.get(JOBS).json()["data"] == [], "nothing but an answer was made"
    corpora = set((quick.data_dir / "corpora").iterdir())

    ended = run(client, body)
    assert set((quick.data_dir / "corpora").iterdir()) == corpora, "the job rendered nothing anew"
    summary = ended["report"]
    assert quoted["flops"]["dense"] == summary["dense_flops"]
    assert quoted["flops"]["sat"] == pytest.approx(summary["flops"], rel=0.02)
    assert quoted["data"]["steps"] == summary["steps"] == 40

    report = client.get(f"{JOBS}/{ended['id']}/report").json()
    assert report["flops"]["quoted"] == quoted["flops"]["sat"]
    assert report["memory"]["quoted_bytes"] == quoted["memory"]["peak"]
    assert report["time"]["quoted_seconds"] is None, "nothing had run here"
    assert report["energy"] == {"quoted_joules": None, "joules": None}

    second = estimate(client, body | {"seed": 4})
    assert second["id"] != quoted["id"]
    assert (second["time"]["basis"], second["time"]["runs"]) == ("calibrated", 1)
    seconds = second["time"]["seconds"]
    assert seconds["low"] < seconds["expected"] < seconds["high"]
    took = summary["training_seconds"]
    assert took / FACTOR < seconds["expected"] < took * FACTOR
    assert second["speedup"]["expected"] is not None
    assert second["memory"]["basis"] == "calibrated"

    other = run(client, body | {"seed": 4})
    report = client.get(f"{JOBS}/{other['id']}/report").json()
    assert report["time"]["quoted_seconds"] == pytest.approx(seconds)
    third = client.get(f"{ESTIMATES}/{second['id']}").json()
    assert third["time"]["runs"] == 2
    assert third["time"]["past_error"]["quotes"] == 1

    other = body | {"hyperparameters": {"batch_size": 2}}
    wide = estimate(client, other)["time"]
    assert wide["basis"] == "analytic"
    assert wide["seconds"]["high"] > 8 * wide["seconds"]["low"]


def test_what_a_job_would_fail_of_is_said(client: httpx.Client, quick: Settings) -> None:
    body = body_for(client, quick)
    failed = estimate(client, body | {"sat": body["sat"] | {"data": {"format": "alpaca"}}})
    assert (failed["status"], failed["error"]["code"]) == ("failed", "dataset_invalid")
    assert client.get(f"{ESTIMATES}/chore_none").json()["error"]["code"] == "estimate_not_found"
    refused = client.post(ESTIMATES, json=body | {"training_file": "file-none"})
    assert refused.json()["error"]["code"] == "file_not_found"


def run(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    job = client.post(JOBS, json=body).json()

    def ended() -> dict[str, Any] | None:
        found = dict(client.get(f"{JOBS}/{job['id']}").json())
        return found if found["status"] in ("succeeded", "failed") else None

    found = eventually(ended, seconds=180) or {}
    assert found["status"] == "succeeded", found["error"]
    return found
