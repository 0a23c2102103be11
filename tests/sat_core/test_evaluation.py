"""Samples and the base model's own text, whatever the model holds and its folder says."""

import json
from pathlib import Path
from typing import Any

import pytest

from sat_core.chat_template import PLAIN_TEMPLATE
from tests.sat_core.tiny import (
    prepare,
    read_events,
    run_core,
    tiny_model,
    write_model,
    write_text,
)


def summary(
    root: Path, prompts: list[str], *, tuning: str = "full", **evaluation: Any
) -> dict[str, Any]:
    """What is measured of a short run of the model in `root`/model."""
    sat = {
        "mode": "off",
        "train": {"max_seq_len": 32, "max_steps": 2, "tuning": tuning},
        "eval": {"prompts": prompts, **evaluation},
    }
    data = root / "data.jsonl"
    prepared = prepare(root, data=data if data.exists() else write_text(data), sat=sat)
    folder = root / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(prepared["config"]))
    assert run_core("train", folder) == 0, (folder / "events.jsonl").read_text()
    return dict(read_events(folder)[-1]["summary"])


def test_samples_stay_within_learned_positions(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(write_model(tmp_path / "model"))
    prompts = ["a b c", "a " * 100, " "]
    found = summary(tmp_path, prompts, max_new_tokens=100, forgetting_sequences=0)["samples"]
    assert [s["prompt"] for s in found] == prompts
    assert len(found[0]["before"].split()) <= 61
    assert len(found[1]["before"].split()) <= 1


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_a_model_writes_is_not_bent_by_its_generation_config(
    tmp_path: Path, tuning: str
) -> None:
    bent = {"do_sample": True, "temperature": 0.1, "top_p": 0.5, "repetition_penalty": 9.0}
    found = []
    for name in ("plain", "bent"):
        config = write_model(tmp_path / name / "model") / "generation_config.json"
        if name == "bent":
            config.write_text(json.dumps(json.loads(config.read_text()) | bent))
        found.append(summary(tmp_path / name, ["a b c"], tuning=tuning))
    for figure in ("forgetting_loss_before", "forgetting_loss_after", "samples"):
        assert found[0][figure] == found[1][figure]
    saved = json.loads((tmp_path / "bent/run/model/generation_config.json").read_text())
    assert {key: saved[key] for key in bent} == bent


def test_a_template_is_saved_with_whatever_was_trained_as_a_conversation(tmp_path: Path) -> None:
    (write_model(tmp_path / "model") / "chat_template.jinja").unlink()
    asked, said = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
    row = json.dumps({"prompt": [asked], "completion": [said]})
    (tmp_path / "data.jsonl").write_text(f"{row}\n" * 4)
    summary(tmp_path, ["a b"])
    assert (tmp_path / "run/model/chat_template.jinja").read_text() == PLAIN_TEMPLATE
    corpus = next((tmp_path / "corpora").glob("*/corpus.json"))
    made = json.loads(corpus.read_text())
    del made["figures"]["conversations"]
    corpus.write_text(json.dumps(made))
    assert run_core("train", tmp_path / "run") == 0, "an earlier release's corpus"
    assert not (tmp_path / "run/model/chat_template.jinja").exists()
