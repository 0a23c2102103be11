"""Two processes that share the layers (FSDP2) train what one process trains; tolerances are those of `test_parallel`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_core.checkpoint import CheckpointError, verify
from sat_core.loss import token_loss
from sat_core.parallel import Parallel
from sat_core.plan.config import SatConfig
from sat_core.plan.errors import ConfigError
from sat_core.plan.request import RunRequest
from sat_core.plan.resolve import resolve
from sat_core.sharding import Sharding
from sat_core.sparsity import Sparsity
from tests.sat_core.ranks import Forked, join
from tests.sat_core.test_parallel import (
    SAT,
    close,
    events_are_whole,
    same_run,
    same_weights,
    stopped_and_resumed,
)
from tests.sat_core.test_run import losses, start
from tests.sat_core.tiny import (
    prepare,
    random_batch,
    read_events,
    run_core,
    sparsity_of,
    tiny_model,
    write_text,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "probed": {"allotment": "exempt", "train": {**SAT["train"], "micro_batch_size": 6}},
    "weights_alone": {
        "allotment": "uniform",
        "importance": {"metric": "magnitude", "refresh_every": 3},
        "guard": {"max_gap": 0},
        "train": {**SAT["train"], "micro_batch_size": 1, "gradient_checkpointing": True},
    },
}


@pytest.fixture(scope="module", params=SETTINGS)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run of one process through dense start, selection, the ladder's rungs and dense finish."""
    root = tmp_path_factory.mktemp("alone")
    prepared = prepare(
        root,
        data=write_text(root / "data.jsonl"),
        sat={**SAT, **SETTINGS[request.param]},
        hyperparameters={"batch_size": 6},
    )
    whole = start(root / "whole", prepared)
    assert run_core("train", whole) == 0
    rates = [e["omission_rate_mlp"] for e in read_events(whole) if e["kind"] == "metrics"]
    assert rates[0] == rates[-1] == 0
    assert len(set(rates)) > 3
    return whole, prepared


def test_two_sharded_processes_equal_one(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, prepared = alone
    pair = start(tmp_path / "pair", prepared, sharding="fsdp")
    assert Forked(pair).codes() == [0, 0]
    assert events_are_whole(pair)
    same_run(whole, pair)
    one, two = (
        [e for e in read_events(f) if e["kind"] in ("evaluation", "sample")] for f in (whole, pair)
    )
    assert [e.get("eval_loss") for e in two] == pytest.approx(
        [e.get("eval_loss") for e in one], abs=1e-4
    )
    assert [e.get("text") for e in two] == [e.get("text") for e in one]


@pytest.mark.parametrize("alone", ["probed"], indirect=True)
def test_sharded_processes_allot_by_sensitivity(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """By the local error, since no rank has the whole model: not one process's choice, but all ranks' own."""
    whole, prepared = alone
    sat = {**prepared["config"]["sat"], "allotment": "sensitivity"}
    pair = start(tmp_path / "pair", prepared, sharding="fsdp", sat=sat)
    assert Forked(pair).codes() == [0, 0]
    assert events_are_whole(pair)
    told = [e for e in read_events(pair) if e["kind"] == "selection" and e["stage_begins"]]
    full = next(e for e in told if e["share"] == 1.0)
    assert {(e["kind"], e["layer"]) for e in full["errors"]} == {
        (kind, layer) for kind in ("mlp", "attention") for layer in range(4)
    }
    awake = [b["awake_share"] for b in full["blocks"] if b["kind"] == "mlp"]
    assert sum(awake) / len(awake) == pytest.approx(0.5, abs=0.1)
    ends = [max(losses(folder).items())[1] for folder in (whole, pair)]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("alone", ["probed"], indirect=True)
def test_stopped_sharded_processes_go_on(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: int
) -> None:
    whole, prepared = alone
    first, second = stopped_and_resumed(tmp_path, prepared, ranks, sharding="fsdp")
    saved = sorted((first / "checkpoints").glob("step-*"))[-1]
    assert sorted(p.name for p in (saved / "optimizer").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    ]  # fmt: skip
    assert close({**losses(first), **losses(second)}, losses(whole))
    same_weights(whole, second)


@pytest.mark.parametrize("alone", ["probed"], indirect=True)
def test_slices_go_on_from_what_one_process_wrote(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, prepared = alone
    point = str(whole / "checkpoints" / "step-000010")
    pair = start(tmp_path / "pair", prepared, sharding="fsdp", resume_from=[point])
    assert Forked(pair).codes() == [0, 0]
    same_weights(whole, pair)


@pytest.mark.parametrize("alone", ["probed"], indirect=True)
def test_an_altered_slice_is_not_opened(alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pair = start(tmp_path / "pair", alone[1], sharding="fsdp", total_steps=5)
    assert Forked(pair).codes() == [0, 0]
    saved = next((pair / "checkpoints").glob("step-*"))
    assert verify(saved)["step"] == 5
    metadata = saved / "optimizer" / ".metadata"
    metadata.write_bytes(metadata.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="metadata is not as it was written"):
        verify(saved)
    metadata.write_bytes(metadata.read_bytes()[:-1])
    (saved / "optimizer" / "__2_0.distcp").touch()
    with pytest.raises(CheckpointError, match="not in the manifest"):
        verify(saved)


FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "phi3", "falcon", "mixtral")


def test_every_family_in_slices_equals_itself_whole(tmp_path: Path) -> None:
    """In float64, with biases, fused and transposed projections and experts: to 1e-9 after five steps."""
    torch.multiprocessing.start_processes(
        _train_all_in_slices, args=(str(tmp_path),), nprocs=2, start_method="forkserver"
    )
    for name in FAMILIES:
        whole, found = _train_family(name, Parallel()), load_file(tmp_path / f"{name}.safetensors")
        assert whole.keys() == found.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-9, rtol=0, msg=f"{name} {key}")


def _train_all_in_slices(rank: int, folder: str) -> None:
    join(folder, rank, 2)
    parallel = Parallel()
    for name in FAMILIES:
        state = _train_family(name, parallel)
        if parallel.first:
            save_file(state, f"{folder}/{name}.safetensors")
    parallel.leave()


def _train_family(model_type: str, parallel: Parallel) -> dict[str, Any]:
    """Weights and moments after five steps: dense, half asleep, others asleep, a rung up, dense."""
    model = tiny_model(model_type).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"mlp_rate": 0.5, "attention_rate": 0.5, "allotment": "uniform"}
    config = SatConfig(total_steps=5, metric="uniform", **settings)
    sparsity = Sparsity(model, optimizer, config, parallel)
    sharding = None
    if parallel.world > 1:
        layers: Any = sparsity.core.get_submodule(sparsity.family.layers)
        sharding = Sharding(model, layers, sparsity.blocks, parallel, half=False)
    for step, share in enumerate((0, 1, 1, 0.5, 0)):
        batches = [random_batch(2 * step + i) for i in range(2)]
        labels = sum(int((b.labels_BT[:, 1:] >= 0).sum()) for b in batches)
        if share:
            sparsity.choose(step, batches[0], share=share)
        else:
            sparsity.wake_all()
        if sharding:
            sharding.settle()
        for batch in batches[parallel.rank :: parallel.world]:
            (token_loss(model, batch).total / labels).backward()
        if sharding:
            sharding.collect_gradients(0.5)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state = sparsity.dense_state_dict()
    for block in sparsity.blocks:
        for part in block.parts:
            moments = block.dense_moments(part, optimizer.state[part.parameter])
            for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                whole = block.shards.gather(part, moment) if block.shards else moment
                state[f"{part.name}.{key}"] = whole
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("train", "importance"),
    [
        ({"tuning": "lora"}, {}),
        ({"compile": True}, {}),
        ({"optimizer": "adamw_8bit"}, {}),
        ({}, {"metric": "taylor"}),
    ],
)
def test_what_slices_cannot_do_is_refused(
    train: dict[str, Any], importance: dict[str, Any]
) -> None:
    body = {
        "model": "local/tiny",
        "sat": {"train": {"sharding": "fsdp", **train}, "importance": importance},
    }
    with pytest.raises(ConfigError, match="sharding is 'fsdp', which does not work with") as caught:
        resolve(
            RunRequest.from_dict(body),
            sparsity_of(tiny_model()).shape,
            {
                "sequences": 8,
                "seq_len": 16,
                "longest": 16,
                "packed": True,
                "format": "text",
                "rows": 8,
            },
            model_path=None,
            revision=None,
            corpus="",
        )
    assert caught.value.param == "sat.train.sharding"
