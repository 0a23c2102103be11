"""A quote against the run it was made for: FLOPs are counted alike, probes and padding included."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_core.loss import token_loss
from sat_core.plan.config import TrainConfig
from sat_core.plan.memory import CHUNK_ELEMENTS, memory_bytes
from tests.sat_core.tiny import (
    prepare,
    random_batch,
    read_events,
    run_core,
    sparsity_of,
    tiny_model,
    write_text,
)

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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("memory")
    return prepare(root, data=write_text(root / "d.jsonl"), sat={"mode": "off"})


def activations(prepared: dict[str, Any], shape: dict[str, Any], **changes: Any) -> int:
    config = {**prepared["config"], "micro_batch_size": 3, "precision": "fp32", **changes}
    config["shape"] = {**config["shape"], **shape}
    return memory_bytes(TrainConfig.from_dict(config), width=16, gpu=False)["activations"]


def test_no_more_logits_are_counted_than_the_loss_makes_at_a_time(prepared: dict[str, Any]) -> None:
    few, one, many = (activations(prepared, {"vocab": v}) for v in (1, 2, CHUNK_ELEMENTS // 8))
    assert many - few == 12 * (CHUNK_ELEMENTS - 3 * 16)
    assert many == activations(prepared, {"vocab": CHUNK_ELEMENTS // 4})
    assert one - few == 12 * 3 * 16


def test_what_autocast_keeps_of_the_weights_is_counted(prepared: dict[str, Any]) -> None:
    model, batch = tiny_model(), random_batch(0, rows=3, width=5)
    weights = [tuple(p.shape) for p in model.model.layers.parameters() if p.dim() > 1]
    shapes = {*weights, *(shape[::-1] for shape in weights)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) in shapes and tensor.dtype is torch.bfloat16:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        found = token_loss(model, batch)
    shape = sparsity_of(model).shape
    assert sum(kept.values()) == 2 * shape.num_layers * shape.layer_parameters
    whole, none = (
        activations(prepared, asdict(shape), precision="bf16", sharding=how)
        for how in ("none", "fsdp")
    )
    assert whole - none == 2 * shape.num_layers * shape.layer_parameters
    assert found.labels


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pairs_that_capped_attention_keeps_are_counted(
    prepared: dict[str, Any], precision: str
) -> None:
    model, batch = tiny_model("gemma2"), random_batch(0, rows=3, width=16)
    squares: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (16, 16):
            squares[tensor.data_ptr()] = tensor.nbytes
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = token_loss(model, batch)
    shape = asdict(sparsity_of(model).shape)
    capped, other = (
        activations(prepared, {**shape, "model_type": name}, precision=precision)
        for name in ("gemma2", "gemma3_text")
    )
    assert capped - other == sum(squares.values())
    assert found.labels
