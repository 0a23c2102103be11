"""A real pre-trained model, real text, the REST API, PostgreSQL and Redis: the held-out loss falls, any tool loads it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.settings import Settings
from tests.conftest import migrated
from tests.service import Worker, api, eventually

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-llama"
TEXT = SHARED / "datasets" / "pretrain" / "tinyshakespeare.txt"
CHAT = SHARED / "datasets" / "instruct" / "gsm8k_train_512_messages.jsonl"

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="the shared models and data sets are not here"
)


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path, broker_url: str) -> Settings:
    url = migrated("postgresql", request, tmp_path)
    return Settings(
        data_dir=tmp_path, database_url=url, broker_url=broker_url, model_roots=(MODEL.parent,)
    )


def test_sparse_training_of_a_real_model_lowers_its_held_out_loss(
    settings: Settings, tmp_path: Path
) -> None:
    worker = Worker(settings)
    try:
        with api(settings) as client:
            text = tmp_path / "shakespeare.txt"
            text.write_text(TEXT.read_text()[:200_000])
            files = {name: upload(client, path) for name, path in (("text", text), ("chat", CHAT))}
            assert files["chat"]["status"] == "processed"
            body = {
                "model": f"local/{MODEL.name}",
                "training_file": files["text"]["id"],
                "hyperparameters": {"batch_size": 8},
                "sat": {
                    "omission_rate": {"mlp": 0.5, "attention": 0.25},
                    "train": {"max_steps": 80, "learning_rate": 1e-3, "max_seq_len": 128},
                    "eval": {"prompts": ["ROMEO:"]},
                },
            }
            job = finished(client, body)
            assert job["status"] == "succeeded", job["error"]
            report = job["report"]
            assert report["eval_loss_after"] < report["eval_loss_before"] - 0.8
            assert report["flops"] < report["dense_flops"]

            tar = client.get(f"/v1/fine_tuning/jobs/{job['id']}/result")
            folder = tmp_path / "downloaded"
            with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
                archive.extractall(folder, filter="data")
            loaded(next(folder.rglob("config.json")).parent)

            chat = {**body, "model": job["fine_tuned_model"], "training_file": files["chat"]["id"]}
            chat["sat"] = {
                **body["sat"],
                "train": {"max_steps": 40, "learning_rate": 1e-3, "max_seq_len": 256},
            }
            supervised = finished(client, chat)
            assert supervised["status"] == "succeeded", supervised["error"]
            assert (
                supervised["report"]["eval_loss_after"] < supervised["report"]["eval_loss_before"]
            )
            assert supervised["figures"]["format"] == "messages"
    finally:
        worker.stop()


def upload(client: Any, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = client.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)}
        )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finished(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    created = client.post("/v1/fine_tuning/jobs", json=body)
    assert created.status_code == 200, created.text

    def ended() -> dict[str, Any] | None:
        job = client.get(f"/v1/fine_tuning/jobs/{created.json()['id']}").json()
        return job if job["status"] in ("succeeded", "failed") else None

    job = eventually(ended, seconds=180)
    assert job is not None
    return job


def loaded(folder: Path) -> None:
    """Stock transformers loads the result and generates."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = tokenizer("ROMEO:", return_tensors="pt")["input_ids"]
    assert (
        model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False).shape[1]
        == prompt.shape[1] + 5
    )
