"""Samples and the base model's own text, whatever the model holds and its folder says."""

import json
from pathlib import Path
from typing import Any

from tests.sat_core.tiny import (
    prepare,
    read_events,
    run_core,
    tiny_model,
    write_model,
    write_text,
)


def summary(root: Path, prompts: list[str], **evaluation: Any) -> dict[str, Any]:
    """What is measured of a short run of the model in `root`/model."""
    sat = {
        "mode": "off",
        "train": {"max_seq_len": 32, "max_steps": 2},
        "eval": {"prompts": prompts, **evaluation},
    }
    prepared = prepare(root, data=write_text(root / "data.jsonl"), sat=sat)
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
