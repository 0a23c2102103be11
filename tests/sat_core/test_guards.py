"""What watches a run: a gap that grows, losses that are not numbers, memory that runs out."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sat_core.evaluation import own_text_loss
from sat_core.loss import token_loss
from sat_core.slicing import SlicedParameter
from tests.sat_core.tiny import (
    prepare,
    random_batch,
    read_events,
    run_core,
    sparsity_of,
    tiny_model,
    write_model,
    write_text,
)

TRAIN = {"max_seq_len": 32, "max_steps": 20, "learning_rate": 3e-3}
SPARSE = {
    "omission_rate": {"mlp": 0.5, "attention": 0.5},
    "importance": {"refresh_every": 2},
    "train": TRAIN,
    "checkpoints": {"every": 0},
    "eval": {"every": 0, "forgetting_sequences": 0},
}


def run(root: Path, sat: dict[str, Any], *, code: int = 0) -> list[dict[str, Any]]:
    root.mkdir(exist_ok=True)
    data = write_text(root / "data.jsonl")
    prepared = prepare(root, data=data, sat=sat, hyperparameters={"batch_size": 8})
    folder = root / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(prepared["config"]))
    assert run_core("train", folder) == code
    return read_events(folder)


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [e for e in events if e["kind"] == kind]


@contextmanager
def fault(hook: Any) -> Iterator[None]:
    """A fault inside the model: `hook(inputs)` sees every training forward's token ids before it."""

    def before(module: Any, args: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            hook(args[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def test_each_refresh_tells_the_gap_and_who_is_awake(tmp_path: Path) -> None:
    found = of_kind(run(tmp_path, SPARSE), "selection")
    # the constant stage [1, 14), rungs at 14, 16, 17, 19: the stage begins and every second step of it
    assert [e["step"] for e in found] == [2, 4, 6, 8, 10, 12, 14, 15, 17, 18, 20]
    first, last = found[0], found[-1]
    assert first["gap"] == pytest.approx(first["sparse_loss"] - first["dense_loss"])
    assert {(e["kind"], e["layer"]) for e in first["errors"]} == {
        (kind, layer) for kind in ("mlp", "attention") for layer in range(4)
    }
    block = first["blocks"][2]
    assert (block["kind"], block["layer"]) == ("mlp", 2)
    assert sum(block["map"]) / len(block["map"]) == pytest.approx(block["awake_share"])
    assert 0 < block["entropy"] <= 1
    assert 0.1 <= block["concentration"] <= 1
    assert 0 <= found[3]["blocks"][2]["churn"] < 1
    assert (last["share"], last["gap"], last["dense_loss"]) == (0, None, None)
    assert all(b["awake_share"] == 1 and b["coverage"] == 1 for b in last["blocks"])


def test_a_gap_beyond_its_bound_brings_the_ladder_down(tmp_path: Path) -> None:
    """Dense until much is learned, then nearly all asleep: the sparse loss jumps."""
    sat = {
        **SPARSE,
        "omission_rate": {"mlp": 0.9, "attention": 0.5},
        "importance": {"metric": "uniform", "refresh_every": 2},
        "allotment": "uniform",
        "schedule": {"dense_start": 0.7, "sparse_share": 0.95},
        "train": {**TRAIN, "max_steps": 60, "learning_rate": 1e-2},
        "guard": {"max_gap": 1e-3},
    }
    events = run(tmp_path, sat)
    warned = [e["message"] for e in of_kind(events, "message") if e["level"] == "warn"]
    assert (
        "more than sat.guard.max_gap 0.001: the ladder steps down to 0% of the full rate"
        in warned[0]
    )
    first, second = of_kind(events, "selection")
    assert (first["share"], second["share"], second["step"]) == (1, 0, first["step"] + 1)
    assert first["gap"] > 3e-3, "a third of the full rate, the lowest rung, would be above it too"


def test_probes_are_counted(tmp_path: Path) -> None:
    summary = run(tmp_path, SPARSE)[-1]["summary"]
    assert 0 < summary["probe_flops"] < summary["flops"] < summary["dense_flops"]


def nan_at(steps: range) -> Any:
    step = -1

    def hook(_: torch.Tensor) -> None:
        nonlocal step
        step += 1

    def poison(module: Any, args: Any, output: Any) -> Any:
        if type(module).__name__ == "LlamaRMSNorm" and step in steps and torch.is_grad_enabled():
            return output * float("nan")
        return output

    return hook, poison


@pytest.mark.parametrize(("steps", "code"), [(range(5, 7), 0), (range(5, 10), 20)])
def test_a_loss_that_is_no_number_never_reaches_the_weights(
    tmp_path: Path, steps: range, code: int
) -> None:
    hook, poison = nan_at(steps)
    sat = {**SPARSE, "mode": "off", "omission_rate": {}}
    handle = torch.nn.modules.module.register_module_forward_hook(poison)
    try:
        with fault(hook):
            events = run(tmp_path, sat, code=code)
    finally:
        handle.remove()
    warned = [e["message"] for e in of_kind(events, "message") if e["level"] == "warn"]
    assert warned[0].startswith("Step 6 skipped: loss nan")
    if code == 0:
        assert events[-1]["summary"]["skipped_steps"] == 2
        saved = load_file(tmp_path / "run/model/model.safetensors")
        assert all(bool(t.isfinite().all()) for t in saved.values())
        assert of_kind(events, "metrics")[5]["loss"] is None
    else:
        assert (events[-1]["kind"], events[-1]["code"]) == ("failed", "loss_not_finite")
        assert "5 steps in a row, up to step 10" in events[-1]["message"]


def test_trouble_finishes_dense(tmp_path: Path) -> None:
    hook, poison = nan_at(range(8, 9))
    handle = torch.nn.modules.module.register_module_forward_hook(poison)
    try:
        with fault(hook):
            events = run(
                tmp_path,
                {
                    **SPARSE,
                    "importance": {"refresh_every": 0, "metric": "uniform"},
                    "allotment": "uniform",
                },
            )
    finally:
        handle.remove()
    rates = [e["omission_rate_mlp"] for e in of_kind(events, "metrics")]
    assert rates[8] > 0
    assert not any(rates[9:])


def test_memory_that_runs_out_makes_the_micro_batch_smaller(tmp_path: Path) -> None:
    def too_many(ids: torch.Tensor) -> None:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    sat = {**SPARSE, "mode": "off", "omission_rate": {}}
    with fault(too_many):
        events = run(tmp_path / "less", sat)
    warned = [e["message"] for e in of_kind(events, "message") if e["level"] == "warn"]
    assert warned == [
        f"Memory did not hold a micro-batch of {a} sequences; going on with {b}, 8 sequences a step as before"
        for a, b in ((8, 4), (4, 2))
    ]
    assert [e["step"] for e in of_kind(events, "metrics")] == list(range(1, 21))
    run(tmp_path / "two", {**sat, "train": {**TRAIN, "micro_batch_size": 2}})
    ours, theirs = (
        load_file(tmp_path / n / "run/model/model.safetensors") for n in ("less", "two")
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_an_evaluation_takes_the_smaller_micro_batch_too(tmp_path: Path) -> None:
    before: list[int] = []
    after: list[int] = []
    lacked = False

    def too_many(ids: torch.Tensor) -> None:
        nonlocal lacked
        if len(ids) > 2:
            lacked = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def watch(module: Any, args: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and not torch.is_grad_enabled():
            (after if lacked else before).append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    sat = {**SPARSE, "mode": "off", "omission_rate": {}}
    try:
        with fault(too_many):
            run(tmp_path, {**sat, "data": {"validation_split": 0.4}})
    finally:
        handle.remove()
    assert (max(before), max(after)) == (8, 2)
    assert sum(before) == sum(after), "the same sequences"


def test_memory_that_does_not_hold_one_sequence_is_a_clear_failure(tmp_path: Path) -> None:
    def never(_: torch.Tensor) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    with fault(never):
        events = run(tmp_path, {**SPARSE, "mode": "off", "omission_rate": {}}, code=20)
    assert events[-1]["code"] == "out_of_memory"
    assert "Lower sat.train.max_seq_len" in events[-1]["message"]


def test_memory_that_runs_out_in_a_probe_costs_no_choice(tmp_path: Path) -> None:
    seen = 0

    def first_probe(_: torch.Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with fault(first_probe):
        events = run(tmp_path, SPARSE)
    assert of_kind(events, "selection")[0]["step"] == 2
    assert of_kind(events, "metrics")[2]["omission_rate_mlp"] == pytest.approx(0.5, abs=0.1)


def test_memory_that_runs_out_while_units_move_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = SlicedParameter.take, itertools.count()

    def lacking(part: SlicedParameter, *args: Any) -> torch.Tensor:
        if next(taken) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return take(part, *args)

    monkeypatch.setattr(SlicedParameter, "take", lacking)
    last = run(tmp_path, SPARSE, code=20)[-1]
    assert (last["kind"], last["code"], last["param"]) == (
        "failed",
        "out_of_memory",
        "sat.asleep_on",
    )
    assert "while units were put to sleep or woken: CUDA out of memory" in last["message"]


def test_a_model_that_computes_no_numbers_at_a_rung_is_told_as_such(tmp_path: Path) -> None:
    hook, poison = nan_at(range(1, 100))
    handle = torch.nn.modules.module.register_module_forward_hook(poison)
    try:
        with fault(hook):
            events = run(tmp_path, SPARSE, code=20)
    finally:
        handle.remove()
    assert events[-1]["code"] == "loss_not_finite"


@pytest.mark.parametrize(
    ("gap", "rung"), [(0.05, 0), (0.1, 0), (0.11, 1), (0.14, 1), (0.16, 2), (0.29, 2), (0.31, 3)]
)
def test_the_ladder_steps_down_to_where_the_gap_would_be_within_its_bound(
    gap: float, rung: int
) -> None:
    sparsity = sparsity_of(tiny_model(), max_gap=0.1, rungs=3)
    sparsity.begin_step(0, random_batch(0))
    assert sparsity.note_gap(gap) == (rung > 0)
    sparsity.begin_step(1, random_batch(0))
    assert sparsity.share == pytest.approx([1, 2 / 3, 1 / 3, 0][rung])


def test_a_gap_never_brings_back_what_trouble_ended() -> None:
    sparsity = sparsity_of(tiny_model(), max_gap=0.1, rungs=3)
    sparsity.begin_step(0, random_batch(0))
    assert not sparsity.note_gap(0.05)
    assert sparsity.note_gap(0.2)
    assert not sparsity.note_gap(0.2)
    assert sparsity.begin_step(1, random_batch(0)) is not None
    shares = [p.share for p in sparsity.config.ladder.phases()]
    assert sparsity.share == shares[2]
    sparsity.finish_dense()
    assert not sparsity.note_gap(float("nan"))
    assert not sparsity.note_gap(5.0)
    sparsity.begin_step(2, random_batch(0))
    assert (sparsity.share, sparsity.realised_rates()) == (0, (0, 0))


def test_a_held_out_loss_knows_no_dropout() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    sparsity = sparsity_of(model)
    text, before = [[3, 4, 5, 6, 7, 8]] * 2, torch.get_rng_state()
    losses = {own_text_loss(sparsity, text, "cpu") for _ in range(3)}
    assert len(losses) == 1
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize("allotment", ["sensitivity", "uniform"])
def test_dropout_is_no_gap(tmp_path: Path, allotment: str) -> None:
    """So few are to sleep that nobody does, and the probe's own sequences lose in training what they lost in the probe."""
    config = write_model(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.5}))
    rates = {"mlp": 0.01, "attention": 0.0}
    events = run(tmp_path, {**SPARSE, "omission_rate": rates, "allotment": allotment})
    chosen = [e for e in of_kind(events, "selection") if e["share"] > 0]
    assert {b["awake_share"] for e in chosen for b in e["blocks"]} == {1.0}
    gaps = [e["gap"] for e in chosen if e["stage_begins"]]
    assert gaps == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_choice_inside_autocast_leaves_no_stale_copy() -> None:
    model, batch = tiny_model(), random_batch(0)
    sparsity = sparsity_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        sparsity.begin_step(0, batch)
        token_loss(model, batch).total.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad.shape == (24, 32)
