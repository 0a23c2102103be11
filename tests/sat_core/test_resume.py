"""A run that stops, at any kind of moment, ends with the bytes of one that did not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sat_core.evaluation import Judge
from sat_core.progress import Counters
from tests.sat_core.tiny import prepare, read_events, run_core, write_text

SAT = {
    "omission_rate": {"mlp": 0.5, "attention": 0.5},
    "importance": {"refresh_every": 3, "selector": "mixed", "ema": 0.5},
    "schedule": {"dense_start": 0.15, "sparse_share": 0.6, "rungs": 3},
    "compensation": True,
    "train": {
        "max_seq_len": 32, "max_steps": 20, "learning_rate": 3e-3, "micro_batch_size": 2,
    },
    "checkpoints": {"every": 1, "keep": 100},
    "eval": {"every": 7, "forgetting_sequences": 2},
}  # fmt: skip
# dense start [0, 3), constant stage [3, 12), rungs [12, 15), [15, 18), [18, 20) dense
MOMENTS = {
    "in the dense start": 2,
    "at the first selection": 3,
    "mid-stage": 8,
    "at a refresh": 9,
    "at a rung change": 12,
    "in the last rung": 19,
}


def start(folder: Path, prepared: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**prepared["config"], **changes}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run with a checkpoint after every step."""
    root = tmp_path_factory.mktemp("resume")
    data = write_text(root / "data.jsonl")
    prepared = prepare(root, data=data, sat=SAT, hyperparameters={"batch_size": 6})
    assert run_core("train", start(root / "whole", prepared)) == 0
    return root / "whole", prepared


def told(folder: Path) -> dict[int, tuple[Any, ...]]:
    return {
        e["step"]: (e["loss"], e["grad_norm"], e["omission_rate_mlp"], e["flops"])
        for e in read_events(folder)
        if e["kind"] == "metrics"
    }


def same_bytes(a: Path, b: Path) -> None:
    for name in ("model/model.safetensors", "checkpoints/step-000020/optimizer.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), name


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_equals_uninterrupted(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, moment: str
) -> None:
    folder, prepared = whole
    step = MOMENTS[moment]
    again = start(
        tmp_path / "again", prepared, resume_from=[str(folder / f"checkpoints/step-{step:06d}")]
    )
    assert run_core("train", again) == 0
    same_bytes(folder, again)
    expected = {s: values for s, values in told(folder).items() if s > step}
    assert told(again) == expected
    before, after = (read_events(f)[-1]["summary"] for f in (folder, again))
    timed = ("training_seconds", "dense_seconds_estimate", "sparse_seconds_per_flop")
    assert {k: v for k, v in before.items() if k not in timed} == {
        k: v for k, v in after.items() if k not in timed
    }


def test_an_evaluation_that_a_stop_cut_short_is_made_on_resume(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prepared = whole
    evaluate = Judge.evaluate

    def asked_to_stop(judge: Judge, counters: Counters, **more: Any) -> None:
        if counters.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(judge, counters, **more)

    first = start(tmp_path / "first", prepared)
    with monkeypatch.context() as patched:
        patched.setattr(Judge, "evaluate", asked_to_stop)
        assert run_core("train", first) == 10
    second = start(
        tmp_path / "second", prepared, resume_from=[str(first / "checkpoints/step-000007")]
    )
    assert run_core("train", second) == 0
    same_bytes(folder, second)

    def of_step_7_on(run: Path, kind: str, field: str) -> list[tuple[Any, ...]]:
        events = [e for e in read_events(run) if e["kind"] == kind and e["step"] >= 7]
        return [(e["step"], e[field]) for e in events]

    for kind, field in (("evaluation", "eval_loss"), ("checkpoint", "metrics")):
        assert of_step_7_on(second, kind, field) == of_step_7_on(folder, kind, field)


KILL_BETWEEN_MICRO_BATCHES = """
import os, signal, sys
import torch
from sat_core.__main__ import main

seen = 0

def count(module, args, output):
    global seen
    if type(module).__name__ == "LlamaModel" and torch.is_grad_enabled() and module.training:
        seen += 1
        if seen == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.nn.modules.module.register_module_forward_hook(count)
main(["train", sys.argv[1]])
"""


@pytest.mark.parametrize("forwards", [5, 32, 47])
def test_a_kill_inside_gradient_accumulation_replays_from_the_last_step(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, forwards: int
) -> None:
    folder, prepared = whole
    first = start(tmp_path / "first", prepared)
    child = subprocess.run(
        [sys.executable, "-c", KILL_BETWEEN_MICRO_BATCHES, str(first), str(forwards)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": "."},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    done = max(told(first))
    assert 0 < done < 20
    newest = sorted((first / "checkpoints").glob("step-*"))[-1]
    second = start(tmp_path / "second", prepared, resume_from=[str(newest)])
    assert run_core("train", second) == 0
    same_bytes(folder, second)
    assert told(first) | told(second) == told(folder)


def test_an_unknown_version_is_refused_in_plain_words(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, prepared = whole
    other = start(tmp_path / "other", prepared, format="satune.train/9")
    assert run_core("train", other) == 20
    message = read_events(other)[-1]["message"]
    assert (
        message == "config.json has format 'satune.train/9'; this program reads 'satune.train/1'."
    )
