"""A quote against the run it was made for: FLOPs are counted alike, probes and padding included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sat_core.plan.config import TrainConfig
from sat_core.plan.memory import memory_bytes
from tests.sat_core.tiny import prepare, read_events, run_core, write_text

CPU = {"device": "cpu", "name": "cpu", "memory_bytes": None}
CASES = {
    "default": {"mode": "on"},
    "attention": {"omission_rate": {"mlp": 0.6, "attention": 0.5}, "allotment": "uniform"},
    "refresh": {"mode": "on", "importance": {"refresh_every": 3}},
    "gradients": {"mode": "on", "importance": {"metric": "fisher", "refresh_every": 4}},
    "weights": {"mode": "on", "allotment": "exempt", "importance": {"metric": "magnitude"}},
    "weights, no guard": {
        "mode": "on",
        "allotment": "exempt",
        "importance": {"metric": "magnitude"},
        "guard": {"max_gap": 0},
    },
    "micro": {"mode": "on", "train": {"micro_batch_size": 3}},
    "dense": {"mode": "off"},
    "sharding alone": {"mode": "on", "train": {"sharding": "fsdp"}},
}


def quoted(root: Path, sat: dict, data: Path) -> dict:
    """Prepare once more, with a quote; the corpus is found ready."""
    prepare(root, data=data, sat=sat, hyperparameters={"batch_size": 8, "n_epochs": 3})
    folder = root / "prepare"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hardware": CPU}))
    assert run_core("prepare", folder) == 0
    return dict(json.loads((folder / "train.json").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_the_run_counts_what_was_quoted(tmp_path: Path, name: str) -> None:
    data = {"packing": "none", "validation_split": 0.1}
    sat = {"eval": {"every": 0, "forgetting_sequences": 0}, "data": data} | CASES[name]
    prepared = quoted(tmp_path, sat, _uneven(tmp_path / "data.jsonl"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(prepared["config"]))
    assert run_core("train", run) == 0
    summary = next(e for e in read_events(run) if e["kind"] == "result")["summary"]
    told = [w for w in prepared["warnings"] if "does nothing in a run of one process" in w]
    assert bool(told) == (name == "sharding alone")
    flops = prepared["quote"]["flops"]
    assert flops["dense"] == summary["dense_flops"]
    assert flops["probe"] == pytest.approx(summary["probe_flops"], rel=0.02)
    assert flops["sat"] == pytest.approx(summary["flops"], rel=0.02)
    assert sum(p["steps"] for p in prepared["quote"]["phases"]) == summary["steps"]


def _uneven(path: Path) -> Path:
    """Rows whose lengths differ much, so that padding counts."""
    write_text(path)
    rows = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
    cut = (" ".join(words[: 4 + 7 * i % 20]) for i, words in enumerate(rows))
    path.write_text("\n".join(json.dumps({"text": text}) for text in cut))
    return path


def test_memory_follows_what_is_kept(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, data=write_text(tmp_path / "d.jsonl"), sat={"mode": "off"})
    config = TrainConfig.from_dict(prepared["config"])
    full = memory_bytes(config, width=64, gpu=False)
    assert full["optimizer"] == 2 * full["gradients"] == 2 * full["weights"]
    assert full["peak"] == sum(v for k, v in full.items() if k != "peak")
    lora = memory_bytes(
        TrainConfig.from_dict(prepared["config"] | {"tuning": "lora", "lora_rank": 1}),
        width=64,
        gpu=False,
    )
    assert lora["optimizer"] < full["optimizer"]
    spared = TrainConfig.from_dict(prepared["config"] | {"gradient_checkpointing": True})
    assert memory_bytes(spared, width=64, gpu=True)["activations"] < full["activations"]
