"""Adapters, gradient checkpointing, compiled layers, documents kept apart: each the same training, told otherwise."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sat_core.checkpoint import merged_state_dict
from sat_core.corpus import Corpus
from sat_core.loss import token_loss
from sat_core.model import compile_layers, with_adapters
from sat_core.optim import build_optimizer
from sat_core.plan.config import TrainConfig
from sat_core.reference import masked_loss, masks_of
from sat_core.sparsity import Sparsity
from sat_io.costs import Costs
from tests.sat_core.beside import train_beside_the_reference
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

TRAIN = {"max_seq_len": 32, "max_steps": 16, "learning_rate": 3e-3}
SAT = {
    "omission_rate": {"mlp": 0.5, "attention": 0.5},
    "importance": {"refresh_every": 3},
    "train": TRAIN,
    "checkpoints": {"every": 6, "keep": 9},
    "eval": {"every": 0, "forgetting_sequences": 0},
}


def adapted(model_type: str, seed: int = 0) -> Any:
    """A model with adapters that are not zero."""
    model = with_adapters(tiny_model(model_type).double(), rank=4, alpha=8, seed=seed).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "phi3", "gpt_neox"])
def test_adapters_are_sliced_with_their_units(model_type: str) -> None:
    model = adapted(model_type)

    def look(step: int, _: Sparsity) -> None:
        first_layer = [
            p.grad.norm() for n, p in model.named_parameters() if ".0." in n and "lora_B" in n
        ]
        assert step or all(norm > 0 for norm in first_layer)

    ours, theirs = train_beside_the_reference(model, steps=6, rel=1e-9, look=look, metric="uniform")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_adapters_merge_into_the_stock_model(model_type: str) -> None:
    model, batch = adapted(model_type).eval(), random_batch(0)
    sparsity = sparsity_of(model)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids_BT).logits
    sparsity.choose(0, batch)
    merged = merged_state_dict(sparsity, sparsity.dense_state_dict())
    stock = tiny_model(model_type).double().eval()
    stock.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=batch.input_ids_BT).logits, expected)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuning")
    write_text(root / "data.jsonl")
    return root


def run(root: Path, name: str, train: dict[str, Any], **changes: Any) -> Path:
    sat = {**SAT, "train": {**TRAIN, **train}, **changes.pop("sat", {})}
    folder = root / name
    folder.mkdir(exist_ok=True)
    if not (folder / "model").exists() and (root / "shared/model").exists():
        (folder / "model").symlink_to(root / "shared/model")
    prepared = prepare(folder, data=root / "data.jsonl", sat=sat, hyperparameters={"batch_size": 4})
    made = folder / "run"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**prepared["config"], **changes}))
    assert run_core("train", made) == 0, (made / "events.jsonl").read_text()
    return made


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "model/model.safetensors"))


def test_a_run_with_adapters_gives_a_plain_model_and_resumes_bit_for_bit(root: Path) -> None:
    whole = run(root, "lora", {"tuning": "lora", "lora_rank": 4, "lora_alpha": 8})
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    summary = read_events(whole)[-1]["summary"]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    base = load_file(root / "lora/model/model.safetensors")
    assert torch.equal(weights(whole)["model.norm.weight"], base["model.norm.weight"])
    again = root / "lora-again"
    again.mkdir()
    config = json.loads((whole / "config.json").read_text())
    config["resume_from"] = [str(whole / "checkpoints/step-000006")]
    (again / "config.json").write_text(json.dumps(config))
    assert run_core("train", again) == 0
    assert all(torch.equal(t, weights(again)[n]) for n, t in weights(whole).items())


def test_gradient_checkpointing_changes_no_number(root: Path) -> None:
    plain, saved = run(root, "plain", {}), run(root, "saving", {"gradient_checkpointing": True})
    assert all(torch.equal(t, weights(saved)[n]) for n, t in weights(plain).items())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_layers_are_compiled_once_a_width() -> None:
    torch._dynamo.reset()
    model = tiny_model()
    plain = tiny_model()
    both: list[tuple[Any, Any, Sparsity]] = []
    for m in (model, plain):
        optimizer = build_optimizer(m, learning_rate=1e-3, weight_decay=0.0)
        settings = {"total_steps": 12, "dense_start": 0.2, "refresh_every": 2, "rungs": 2}
        both.append((m, optimizer, sparsity_of(m, optimizer, attention_rate=0.0, **settings)))
    compile_layers(both[0][2].layers, backend="aot_eager")
    new_graphs, begins = [], []
    batch = random_batch(0)
    for step in range(12):
        before = graphs()
        losses = []
        for m, optimizer, sparsity in both:
            widths = [b.num_awake for b in sparsity.mlp]
            sparsity.begin_step(step, batch)
            found = token_loss(m, batch)
            found.total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(found.total.detach()))
            if m is model and widths != [b.num_awake for b in sparsity.mlp]:
                begins.append(step)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        new_graphs.append(graphs() - before)
    assert begins
    assert new_graphs[0] > 0
    steady = [n for step, n in enumerate(new_graphs) if step and step not in begins]
    assert not any(steady), new_graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_run_compiles_once_a_stage_and_times_no_compiling(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = functools.partial(compile_layers, backend="aot_eager")
    monkeypatch.setattr("sat_core.assembly.compile_layers", compiled)
    torch._dynamo.reset()
    sat = {
        "omission_rate": {"mlp": 0.5},
        "allotment": "uniform",
        "schedule": {"dense_start": 0.2, "sparse_share": 0.5, "rungs": 3},
        "guard": {"max_gap": 1e3},
        "train": {**TRAIN, "max_steps": 20, "compile": True},
        "eval": {"every": 0, "forgetting_sequences": 0},
    }
    hyper = {"batch_size": 12}
    prepared = prepare(tmp_path, data=root / "data.jsonl", sat=sat, hyperparameters=hyper)
    made = tmp_path / "run"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(prepared["config"]))
    before = graphs()
    assert run_core("train", made) == 0, (made / "events.jsonl").read_text()
    events = read_events(made)
    begins = [e["step"] for e in events if e["kind"] == "selection"]
    assert begins == [5, 11, 15, 18]
    assert graphs() - before == 4, "dense, the constant stage, two rungs"
    flops = [0, *(e["flops"] for e in events if e["kind"] == "metrics")]
    state = json.loads((made / "checkpoints/step-000020/state.json").read_text())
    sparse = {*range(5, 18)} - {s + late for s in begins for late in (0, 1)}
    assert state["sparse_flops"] == sum(flops[s] - flops[s - 1] for s in sparse)
    assert state["dense_steps"] == 3 + 1, "of 2 to 4 and of 18 to 20"


def test_rows_of_a_compiled_run_are_all_as_wide_as_the_longest(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"text": "a " * n}) for n in range(3, 40)))
    sat = {"data": {"packing": "none"}, "train": {"compile": True, "max_steps": 4}}
    config = TrainConfig.from_dict(prepare(tmp_path, data=data, sat=sat)["config"])
    plain, even = (Corpus(Path(config.corpus), "train", even=even) for even in (False, True))
    widths, same = (
        {corpus.batch([i]).input_ids_BT.shape[1] for i in range(len(plain))}
        for corpus in (plain, even)
    )
    assert len(widths) > 3
    assert same == {max(widths)}
    steps = sum(cost.steps.tokens for cost in Costs(config).by_phase())
    assert steps == 4 * config.batch_size * max(widths)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_too_many_graphs_fail_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = tiny_model()
    sparsity = sparsity_of(model)
    compile_layers(sparsity.layers, backend="eager")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)

    def forward(width: int) -> None:
        for block in sparsity.mlp:
            block.refresh(torch.arange(width))
        token_loss(model, random_batch(0))

    forward(8)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        forward(16)
    torch._dynamo.reset()


def test_documents_kept_apart_train_as_if_each_were_alone(root: Path) -> None:
    apart = run(root, "apart", {}, sat={"data": {"packing": "separate"}})
    joined = run(root, "joined", {})
    assert read_events(apart)[-1]["summary"]["trained_tokens"] > 0
    assert not torch.equal(
        weights(apart)["model.norm.weight"], weights(joined)["model.norm.weight"]
    )


def test_the_masked_twin_of_an_adapted_model_is_another_model() -> None:
    sparsity = sparsity_of(adapted("llama"))
    dense = masks_of(sparsity)
    sparsity.choose(0, random_batch(1))
    masks = masks_of(sparsity)
    sparsity.wake_all()
    a, b = (float(masked_loss(sparsity, m, random_batch(1)).detach()) for m in (dense, masks))
    assert abs(a - b) > 1e-5


def test_experts_multiply_in_half_precision_too(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(write_model(tmp_path / "experts/model"))
    write_text(tmp_path / "data.jsonl")
    seen: set[tuple[torch.dtype, ...]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten._grouped_mm.default:
                seen.add((args[0].dtype, args[1].dtype))
            return op(*args, **(kwargs or {}))

    with Watch():
        run(tmp_path, "experts", {"max_steps": 4, "precision": "bf16"})
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    tokens, experts = torch.ones(4, 32), torch.ones(2, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        ends = torch.tensor([2, 4], dtype=torch.int32)
        # What compiled layers multiply with.
        made = torch.ops.transformers.grouped_mm_fallback(tokens, experts, ends)
    assert made.dtype is torch.bfloat16


class TensorRate(torch.optim.AdamW):
    """Keeps its learning rate as torchao's optimizers do."""

    def __init__(self, groups: Any, learning_rate: float) -> None:
        super().__init__(groups, lr=torch.tensor(learning_rate), fused=True)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups)
        self.rates.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


def test_a_learning_rate_that_is_a_tensor_stays_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TensorRate] = []

    def build(model: Any, *, learning_rate: float, **_: Any) -> torch.optim.Optimizer:
        made.append(TensorRate(model.parameters(), learning_rate))
        return made[0]

    monkeypatch.setattr("sat_core.assembly.build_optimizer", build)
    told = [e["learning_rate"] for e in read_events(run(root, "rate", {})) if "learning_rate" in e]
    assert made[0].rates == pytest.approx(told)
    assert max(told) == TRAIN["learning_rate"] > min(told)


def test_moments_of_eight_bits_follow_their_units() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=96,
    )  # fmt: skip
    losses = {}
    for kind in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0, kind=kind)
        sparsity = sparsity_of(model, optimizer, total_steps=8, refresh_every=2)
        for step in range(8):
            sparsity.begin_step(step, random_batch(0))
            found = token_loss(model, random_batch(0))
            (found.total / found.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = float(found.total.detach()) / found.labels
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
