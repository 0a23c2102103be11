"""A LoRA run by a real worker, then its exports: what is downloaded computes what the result computes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jobs.settings import Settings
from tests.sat_core.tiny import write_model, write_text
from tests.service import Worker, api, eventually


def ended(client: httpx.Client, url: str, status: str = "succeeded") -> dict:
    def look() -> dict | None:
        found: dict = client.get(url).json()
        return found if found["status"] in ("succeeded", "failed") else None

    found = eventually(look, seconds=240)
    assert found["status"] == status, found["error"]
    return found


def fetched(client: httpx.Client, url: str, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(client.get(url).content)) as archive:
        archive.extractall(folder, filter="data")
    (only,) = folder.iterdir()
    return only


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 35).view(2, 16)).logits


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_lora_run_comes_home_whole_and_as_an_adapter(
    quick: Settings, broker_url: str, tmp_path: Path
) -> None:
    settings = quick.model_copy(update={"broker_url": broker_url, "lease_seconds": 10.0})
    base = write_model(settings.data_dir / "models" / "tiny")
    data = write_text(tmp_path / "d.jsonl").read_bytes()
    worker = Worker(settings)
    try:
        with api(settings) as client:
            file = client.post(
                "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", data)}
            ).json()["id"]
            sat = {
                "train": {"tuning": "lora", "lora_rank": 4, "max_steps": 4, "max_seq_len": 32},
                "data": {"validation_split": 0},
            }
            job = client.post(
                "/v1/fine_tuning/jobs",
                json={"model": "local/tiny", "training_file": file, "sat": sat},
            ).json()
            url = f"/v1/fine_tuning/jobs/{job['id']}"
            model = ended(client, url)["fine_tuned_model"]
            result = fetched(client, f"{url}/result", tmp_path / "result")
            wanted = logits(AutoModelForCausalLM.from_pretrained(result))

            homes = {}
            for form in ("safetensors", "adapter"):
                export = client.post("/v1/exports", json={"model": model, "format": form}).json()
                ended(client, f"/v1/exports/{export['id']}")
                content = f"/v1/exports/{export['id']}/content"
                homes[form] = fetched(client, content, tmp_path / form)
            assert torch.equal(
                logits(AutoModelForCausalLM.from_pretrained(homes["safetensors"])), wanted
            )
            assert "base_model: local/tiny" in (homes["safetensors"] / "README.md").read_text()
            plain = AutoModelForCausalLM.from_pretrained(base)
            assert not torch.equal(logits(plain), wanted)
            adapted = PeftModel.from_pretrained(plain, homes["adapter"])
            torch.testing.assert_close(logits(adapted), wanted)

            last, *others = client.get(f"{url}/checkpoints").json()["data"]
            assert others
            assert client.delete(f"/v1/models/{last['fine_tuned_model_checkpoint']}").is_success
            asked = {"model": model, "format": "adapter", "dtype": "bfloat16"}
            export = client.post("/v1/exports", json=asked).json()
            error = ended(client, f"/v1/exports/{export['id']}", "failed")["error"]
            assert error["code"] == "format_not_supported"
            assert "which was deleted" in error["message"]

            report = client.get(f"{url}/report").json()
            assert report["steps"] == 4
            assert report["time"]["training_seconds"] > 0
            assert report["flops"]["dense"] > 0
            assert [a["stage"] for a in report["attempts"]] == ["prepare", "train"]
    finally:
        worker.stop()
