"""Whole runs of the program: rate 0 is stock training, a stopped or killed run ends as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sat_core.card import base_licence
from sat_core.checkpoint import first_whole
from sat_core.corpus import IGNORED_LABEL, Corpus
from sat_core.loss import token_loss
from sat_core.model import load_model
from sat_core.plan.layout import sha256_of
from sat_core.plan.schedule import learning_rate_at
from tests.sat_core.tiny import prepare, read_events, run_core, write_text

TRAIN = {"max_seq_len": 32, "max_steps": 24, "learning_rate": 3e-3}
SPARSE = {
    "omission_rate": {"mlp": 0.5, "attention": 0.25},
    "importance": {"refresh_every": 3},
    "train": TRAIN,
    "checkpoints": {"every": 7, "keep": 10},
    "eval": {"every": 10, "prompts": ["a b c"], "max_new_tokens": 4},
}


def start(folder: Path, prepared: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**prepared["config"], **changes}))
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished sparse run that nothing interrupted."""
    root = tmp_path_factory.mktemp("sparse")
    prepared = prepare(
        root, data=write_text(root / "data.jsonl"), sat=SPARSE, hyperparameters={"batch_size": 4}
    )
    assert run_core("train", start(root / "whole", prepared)) == 0
    return root, prepared


def test_rate_zero_is_stock_training_bit_for_bit(tmp_path: Path) -> None:
    sat = {"mode": "off", "train": {**TRAIN, "micro_batch_size": 2}, "checkpoints": {"every": 0}}
    prepared = prepare(
        tmp_path, data=write_text(tmp_path / "d.jsonl"), sat=sat, hyperparameters={"batch_size": 4}
    )
    run = start(tmp_path / "run", prepared)
    assert run_core("train", run) == 0
    config = prepared["config"]

    torch.manual_seed(config["seed"])
    model, _ = load_model(str(tmp_path / "model"))
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    stock = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        fused=True,
    )
    corpus = Corpus(Path(config["corpus"]), "train")
    for step in range(24):
        picks = corpus.indices_at(step, 4, config["seed"])
        batches = [corpus.batch(picks[:2]), corpus.batch(picks[2:])]
        labels = sum(int((b.labels_BT[:, 1:] != IGNORED_LABEL).sum()) for b in batches)
        for batch in batches:
            (token_loss(model, batch).total / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate_at(step, peak=3e-3, total_steps=24, warmup_steps=1, schedule="cosine")
        for group in stock.param_groups:
            group["lr"] = rate
        stock.step()
        stock.zero_grad()
    saved = load_file(run / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("stopped_after", [3, 12])
def test_a_run_stopped_and_resumed_ends_with_the_same_bytes(
    sparse: tuple[Path, dict[str, Any]], tmp_path: Path, stopped_after: int
) -> None:
    root, prepared = sparse
    first = start(tmp_path / "1", prepared)
    child = subprocess.Popen(
        [sys.executable, "-m", "sat_core", "train", str(first)], stderr=subprocess.DEVNULL
    )
    wait_for_step(first, stopped_after)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 10
    newest = sorted((first / "checkpoints").glob("step-*"))[-1]
    assert read_events(first)[-1] | {"time": 0, "seq": 0} == {
        "seq": 0, "time": 0, "kind": "stopped", "step": int(newest.name[5:]),
    }  # fmt: skip
    second = start(tmp_path / "2", prepared, resume_from=[str(newest)])
    assert run_core("train", second) == 0
    same_model(root / "whole", second)
    assert losses(first) | losses(second) == losses(root / "whole")


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(
    sparse: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, prepared = sparse
    first = start(tmp_path / "1", prepared)
    child = subprocess.Popen(
        [sys.executable, "-m", "sat_core", "train", str(first)], stderr=subprocess.DEVNULL
    )
    wait_for_step(first, 15)
    child.kill()
    child.wait()
    checkpoints = sorted((first / "checkpoints").glob("step-*"))
    target = checkpoints[-1] / "optimizer.safetensors"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    newest_first = checkpoints[::-1]
    assert first_whole(newest_first)[0] == checkpoints[-2]
    second = start(tmp_path / "2", prepared, resume_from=[str(c) for c in newest_first])
    assert run_core("train", second) == 0
    warned = [
        e["message"] for e in read_events(second) if e["kind"] == "message" and e["level"] == "warn"
    ]
    assert "is not as it was written" in warned[0]
    same_model(root / "whole", second)


def test_a_disk_that_holds_no_checkpoint_does_not_end_the_training(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, data=write_text(tmp_path / "d.jsonl"), sat=SPARSE)
    run = start(tmp_path / "run", prepared)
    # Blocks of 512 or 1,024 bytes: enough for the events, too few for the moments.
    limited = f"ulimit -f 250; exec {sys.executable} -m sat_core train {run}"
    assert subprocess.run(["sh", "-c", limited], check=False, capture_output=True).returncode
    events = read_events(run)
    warned = [e["message"] for e in events if e["kind"] == "message" and e["level"] == "warn"]
    assert [w.partition(":")[0] for w in warned if "checkpoint" in w] == [
        f"No checkpoint at step {step}" for step in (7, 14, 21)
    ]
    assert max(e["step"] for e in events if e["kind"] == "metrics") == TRAIN["max_steps"]
    assert not list((run / "checkpoints").iterdir())


def test_a_resume_without_one_whole_checkpoint_starts_anew_and_says_so(
    sparse: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, prepared = sparse
    broken = tmp_path / "checkpoints" / "step-000007"
    shutil.copytree(root / "whole" / "checkpoints" / "step-000007", broken)
    (broken / "MANIFEST.json").unlink()
    again = start(tmp_path / "2", prepared, resume_from=[str(broken)])
    assert run_core("train", again) == 0
    assert any("Going on from the start" in e.get("message", "") for e in read_events(again))
    same_model(root / "whole", again)


def test_a_checkpoint_of_an_unknown_version_is_refused(
    sparse: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, prepared = sparse
    shutil.copytree(root / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "format": "satune.checkpoint/9"}))
    again = start(tmp_path / "2", prepared, resume_from=[str(newest)])
    assert run_core("train", again) == 20
    last = read_events(again)[-1]
    assert (last["kind"], last["code"]) == ("failed", "checkpoint_unsupported")
    assert (
        "has format 'satune.checkpoint/9'; this program reads 'satune.checkpoint/1'"
        in last["message"]
    )


def test_the_result_is_a_plain_model_with_a_card(sparse: tuple[Path, dict[str, Any]]) -> None:
    folder = sparse[0] / "whole" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.model.layers[1].mlp.gate_proj.weight.shape == (48, 32)
    out = model.generate(
        **tokenizer("a b c", return_tensors="pt", return_token_type_ids=False), max_new_tokens=3
    )
    assert out.shape[1] > 3
    card = (folder / "README.md").read_text()
    assert "base_model: local/tiny" in card
    assert f"data.jsonl (SHA-256 {sha256_of(sparse[0] / 'data.jsonl')})" in card


def test_a_card_names_the_licence_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Name\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_licence("local/x", str(snapshot), None) == "apache-2.0"
    assert base_licence("org/name", None, commit) == "apache-2.0"
    assert base_licence("org/other", None, commit) is None


def test_events_tell_the_run_without_a_hole(sparse: tuple[Path, dict[str, Any]]) -> None:
    events = read_events(sparse[0] / "whole")
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    metrics = [e for e in events if e["kind"] == "metrics"]
    assert [m["step"] for m in metrics] == list(range(1, 25))
    assert metrics[0]["omission_rate_mlp"] == 0
    assert metrics[10]["omission_rate_mlp"] == pytest.approx(0.5, abs=0.1)
    assert metrics[-1]["omission_rate_mlp"] == 0
    summary = events[-1]["summary"]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["flops"] < summary["dense_flops"]
    states = [e for e in events if e["kind"] == "state"]
    training = [e for e in states if e["state"].startswith("training")]
    assert [e["state"] for e in training if not e["again"]] == [
        "training_dense_start", "training_sparse", "training_ladder", "training_dense_finish",
    ]  # fmt: skip
    after = [b["state"] for a, b in pairwise(states) if a["state"] == "evaluating"]
    assert after.pop() == "saving"
    assert len(after) > 2, "an evaluation before the first step, and some between"
    assert all(state.startswith("training") for state in after)


def test_a_child_dies_with_its_lifeline(
    sparse: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = start(tmp_path / "1", sparse[1], total_steps=100000)
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "sat_core", "train", str(folder), "--lifeline"],
        stdin=read,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    wait_for_step(folder, 2)
    os.close(write)
    assert child.wait(10) == 1


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        log = folder / "events.jsonl"
        if log.exists() and f'"kind": "metrics", "step": {step},' in log.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(folder) if e["kind"] == "metrics"}


def same_model(a: Path, b: Path) -> None:
    ours, theirs = (
        load_file(a / "model/model.safetensors"),
        load_file(b / "model/model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
