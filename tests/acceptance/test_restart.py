"""A service that is ended in the middle of a job goes on with it the next time, as if nothing had happened."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest

from cli import demo_material
from tests.cli.running import Up, until, up

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 90


def ask(service: Up, path: str) -> dict:
    connection = service.connection
    answer = httpx.get(
        connection["url"] + path,
        headers={"authorization": f"Bearer {connection['api_key']}"},
        timeout=30,
    )
    answer.raise_for_status()
    return answer.json()


@pytest.mark.slow
def test_a_job_goes_on_after_the_service_was_ended(tmp_path: Path):
    data_dir = tmp_path / "data"
    material = demo_material.make(data_dir)
    with up(data_dir) as service:
        made = service.run(
            *("submit", "--model", material.model, "--dataset", str(material.questions[0])),
            *("--validation", str(material.questions[1]), "--mlp", "0.5", "--no-watch", "--json"),
            *("--set", f"sat.train.max_steps={STEPS}", "--set", "sat.train.max_seq_len=64"),
            *("--set", "hyperparameters.batch_size=4", "--set", "sat.eval.every=0"),
            *("--set", "sat.checkpoints.every=0"),
        )
        assert made.returncode == 0, made.stderr
        job = f"/v1/fine_tuning/jobs/{json.loads(made.stdout)['id']}"
        until(lambda: ((ask(service, job)["progress"] or {}).get("step") or 0) >= 3)
        service.process.terminate()
        assert service.process.wait(60) == 0
    with up(data_dir) as service:
        until(lambda: ask(service, job)["status"] not in ("queued", "running"))
        ended = ask(service, job)
        metrics = ask(service, f"{job}/metrics?limit=1000")
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["failures"] == 0
    assert ended["attempt"] == 3, "prepared, trained, trained on"
    steps = [row[metrics["columns"].index("step")] for row in metrics["rows"]]
    assert steps == [0, *range(1, STEPS + 1)]
