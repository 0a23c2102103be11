"""Two processes train what one process trains, stop together and go on together, or alone.

Tolerance: ranks sum a batch's gradients in another order than one process does, so losses agree to 1e-4 nats and weights to
2e-4 after 16 steps at a rate of 1e-3; who is awake agrees exactly.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.sat_core.ranks import Forked, Torchrun
from tests.sat_core.test_run import losses, start, wait_for_step
from tests.sat_core.tiny import prepare, read_events, run_core, write_model, write_text

pytestmark = pytest.mark.slow
Program = type[Forked] | type[Torchrun]
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 2e-4
SAT: dict[str, Any] = {
    "omission_rate": {"mlp": 0.5, "attention": 0.25},
    "importance": {"refresh_every": 3},
    "train": {"max_seq_len": 32, "max_steps": 16, "learning_rate": 1e-3, "micro_batch_size": 4},
    "checkpoints": {"every": 5, "keep": 10},
    "eval": {"every": 8, "prompts": ["a b c"], "max_new_tokens": 4, "forgetting_sequences": 2},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of one process, and what it was prepared from."""
    root = tmp_path_factory.mktemp("alone")
    prepared = prepare(
        root, data=write_text(root / "data.jsonl"), sat=SAT, hyperparameters={"batch_size": 4}
    )
    assert run_core("train", start(root / "whole", prepared)) == 0
    return root / "whole", prepared


def test_two_processes_equal_one(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, prepared = alone
    pair = start(tmp_path / "pair", prepared)
    assert Torchrun(pair).codes() == [0, 0]
    assert events_are_whole(pair)
    same_run(whole, pair)


@pytest.mark.parametrize(("program", "ranks"), [(Torchrun, 2), (Forked, 1)])
def test_two_stopped_processes_go_on(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path, program: Program, ranks: int
) -> None:
    whole, prepared = alone
    first, second = stopped_and_resumed(tmp_path, prepared, ranks, program)
    assert losses(first).keys() | losses(second).keys() == losses(whole).keys()
    assert close({**losses(first), **losses(second)}, losses(whole))
    same_weights(whole, second)


def test_ranks_with_dropout_stop_and_go_on(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    data = write_text(tmp_path / "data.jsonl")
    prepared = prepare(tmp_path, data=data, sat=SAT, hyperparameters={"batch_size": 4})
    pair = start(tmp_path / "pair", prepared)
    assert Forked(pair).codes() == [0, 0]
    first, second = stopped_and_resumed(tmp_path, prepared, 2)
    assert close({**losses(first), **losses(second)}, losses(pair))
    same_weights(pair, second)


def test_a_batch_smaller_than_the_ranks_is_refused(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pair = start(tmp_path / "pair", alone[1], batch_size=1)
    assert Forked(pair).codes() == [20, 20]
    last = read_events(pair)[-1]
    assert (last["kind"], last["param"]) == ("failed", "hyperparameters.batch_size")


def stopped_and_resumed(
    root: Path, prepared: dict[str, Any], ranks: int, program: Program = Forked, **changes: Any
) -> tuple[Path, Path]:
    """A run of two that one SIGTERM to one rank stopped, and its end by `ranks` processes."""
    first = start(root / "1", prepared, **changes)
    pair = program(first)
    wait_for_step(first, 4)
    os.kill(pair.pids[1], signal.SIGTERM)
    assert pair.codes() == [10, 10]
    stopped = read_events(first)[-1]
    newest = sorted((first / "checkpoints").glob("step-*"))[-1]
    assert (stopped["kind"], stopped["step"]) == ("stopped", int(newest.name[5:]))
    second = start(root / "2", prepared, **changes, resume_from=[str(newest)])
    assert program(second, ranks).codes() == [0] * ranks
    return first, second


def events_are_whole(folder: Path) -> bool:
    seqs = [e["seq"] for e in read_events(folder)]
    return seqs == list(range(1, len(seqs) + 1))


def close(ours: dict[int, float], theirs: dict[int, float]) -> bool:
    return ours == pytest.approx(theirs, abs=LOSS_TOLERANCE)


def same_run(one: Path, other: Path) -> None:
    """Losses of all steps, who was awake at every checkpoint, and the weights at the end."""
    assert close(losses(other), losses(one))
    checkpoints = sorted(p.name for p in (one / "checkpoints").glob("step-*"))
    assert checkpoints == sorted(p.name for p in (other / "checkpoints").glob("step-*"))
    for name in checkpoints:
        ours, theirs = (
            load_file(p / "checkpoints" / name / "selection.safetensors") for p in (one, other)
        )
        for key in (k for k in ours if k.endswith((".awake", ".trained"))):
            assert torch.equal(ours[key], theirs[key]), (name, key)
    same_weights(one, other)


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(p / "model" / "model.safetensors") for p in (one, other))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=WEIGHT_TOLERANCE, rtol=0)
