"""Every family, from a tiny random model of the stock class: sliced equals masked, saved equals loaded.

SATUNE_FAMILY_TABLE=FILE writes what was found as a table; the table in `docs/evidence/families.md` is made so.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sat_core.corpus import Batch
from sat_core.loss import forward_arguments, token_loss
from sat_core.plan.families import supported_model_types
from sat_core.reference import masked_loss, masks_of
from sat_core.sparsity import Sparsity
from tests.sat_core.beside import train_beside_the_reference
from tests.sat_core.tiny import EXPERTS, WITH_KV_HEADS, random_batch, sparsity_of, tiny_model

KV_HEADS = dict.fromkeys((*WITH_KV_HEADS, "falcon"), (1, 2, 4))
CASES = [(name, kv) for name in supported_model_types() for kv in KV_HEADS.get(name, (4,))]
COLUMNS = (
    "forward fp64",
    "backward fp64",
    "forward fp32",
    "backward fp32",
    "update fp64",
    "save, load",
    "rate 0, stock",
)
Table = dict[tuple[str, int], dict[str, float]]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found: Table = {}
    yield found
    if path := os.environ.get("SATUNE_FAMILY_TABLE"):
        Path(path).write_text(as_markdown(found), "utf-8")


def as_markdown(found: Table) -> str:
    head = ["family", "KV heads of 4", *COLUMNS]
    rows = [head, ["---"] * len(head)]
    for (name, kv), figures in found.items():
        rows.append([name, str(kv), *(f"{figures[c]:.1e}" for c in COLUMNS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def note(table: Table, case: tuple[str, int], column: str, value: float) -> None:
    table.setdefault(case, {})[column] = value


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the larger tensor's largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def narrowed_and_masked(model: Any, dtype: torch.dtype) -> tuple[Sparsity, Sparsity]:
    model = model.to(dtype)
    twin = sparsity_of(copy.deepcopy(model))
    sparsity = sparsity_of(model)
    sparsity.choose(0, random_batch(1))
    return sparsity, twin


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_narrowed_model_computes_what_a_masked_one_does(
    case: tuple[str, int], dtype: torch.dtype, limit: float, table: Table
) -> None:
    name, kv_heads = case
    batch = random_batch(1)
    sparsity, twin = narrowed_and_masked(tiny_model(name, kv_heads=kv_heads), dtype)
    mlp, attention = sparsity.realised_rates()
    assert mlp == 0.5
    assert attention == (0.5 if kv_heads > 1 else 0.0)
    found = token_loss(sparsity.model, batch)
    loss = found.total / found.labels
    loss.backward()
    expected = masked_loss(twin, masks_of(sparsity), batch)
    expected.backward()
    kind = "fp64" if dtype == torch.float64 else "fp32"
    forward = difference(loss.detach(), expected.detach())
    note(table, case, f"forward {kind}", forward)
    assert forward < limit
    worst = 0.0
    largest = max(float(p.grad.abs().max()) for p in twin.model.parameters())
    for block, other in zip(sparsity.blocks, twin.blocks, strict=True):
        for part, full in zip(block.parts, other.parts, strict=True):
            grad = full.parameter.grad
            apart = part.parameter.grad - full.take(grad, block.awake_K)
            worst = max(worst, float(apart.abs().max()) / largest)
            if len(block.asleep_units):
                assert not full.take(grad, block.asleep_units).any()
    note(table, case, f"backward {kind}", worst)
    assert worst < limit


@pytest.mark.parametrize("case", CASES, ids=str)
def test_updates_through_several_selections_equal_the_reference(
    case: tuple[str, int], table: Table
) -> None:
    name, kv_heads = case
    model = tiny_model(name, kv_heads=kv_heads, tied=name in ("llama", "gpt2", "opt")).double()
    ours, theirs = train_beside_the_reference(model, steps=8, rel=1e-8, metric="uniform")
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    worst = max(difference(a.detach(), b.detach()) for a, b in pairs)
    note(table, case, "update fp64", worst)
    assert worst < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_narrowed_model_is_saved_dense_and_loads_to_equal_logits(
    case: tuple[str, int], tmp_path: Path, table: Table
) -> None:
    name, kv_heads = case
    batch = random_batch(1)
    model = tiny_model(name, kv_heads=kv_heads).eval()
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids_BT).logits
    sparsity = sparsity_of(model)
    sparsity.choose(0, batch)
    model.save_pretrained(tmp_path, state_dict=sparsity.dense_state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=model.config._attn_implementation
    )
    if name in EXPERTS:
        loaded.set_experts_implementation("eager")
    with torch.no_grad():
        logits = loaded(input_ids=batch.input_ids_BT).logits
    note(table, case, "save, load", float((logits - expected).abs().max()))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_rate_0_training_is_the_stock_models_bit_for_bit(
    case: tuple[str, int], table: Table
) -> None:
    name, kv_heads = case
    ours = tiny_model(name, kv_heads=kv_heads)
    theirs = copy.deepcopy(ours)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, theirs))
    sparsity = sparsity_of(ours, optimizer, mlp_rate=0.0, attention_rate=0.0)
    for step in range(3):
        batch = random_batch(step)
        sparsity.begin_step(step, batch)
        for model, its in ((ours, optimizer), (theirs, other)):
            its.zero_grad()
            model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss.backward()
            its.step()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    note(table, case, "rate 0, stock", apart)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_narrowed_whatever_kernel_multiplies_them(
    name: str, implementation: str
) -> None:
    model = tiny_model(name)
    model.set_experts_implementation(implementation)
    batch = random_batch(1)
    sparsity, twin = narrowed_and_masked(model, torch.float32)
    found = token_loss(sparsity.model, batch)
    expected = masked_loss(twin, masks_of(sparsity), batch)
    assert sparsity.realised_rates()[0] == 0.5
    assert difference(found.total.detach() / found.labels, expected.detach()) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_documents_of_one_sequence_do_not_see_each_other(case: tuple[str, int]) -> None:
    name, kv_heads = case
    model = tiny_model(name, kv_heads=kv_heads).double().eval()
    ids_BT = random_batch(1, rows=2, width=24).input_ids_BT
    splits = 13, 8
    positions_BT = torch.stack([torch.cat([torch.arange(n), torch.arange(24 - n)]) for n in splits])
    packed = Batch(ids_BT, ids_BT, torch.tensor([24, 24]), positions_BT)
    with torch.no_grad():
        together = model(**forward_arguments(model, packed)).logits
        for row, split in enumerate(splits):
            for document in (slice(split), slice(split, 24)):
                alone = model(input_ids=ids_BT[row : row + 1, document]).logits[0]
                # Gemma's attention and positions are float32 whatever the model is.
                torch.testing.assert_close(together[row, document], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", supported_model_types())
def test_the_loss_is_the_stock_models(name: str, tied: bool) -> None:
    model = tiny_model(name, tied=tied).double()
    batch = random_batch(2)
    found = token_loss(model, batch)
    found.total.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=batch.input_ids_BT).logits[:, :-1]
    labelled = batch.labels_BT[:, 1:] != -100
    targets = batch.labels_BT[:, 1:][labelled]
    stock = torch.nn.functional.cross_entropy(logits[labelled], targets, reduction="sum")
    stock.backward()
    assert float(found.total.detach()) == pytest.approx(float(stock.detach()), rel=1e-12)
    assert found.labels == len(targets)
    assert int(found.correct) == int((logits[labelled].argmax(-1) == targets).sum())
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-8, atol=1e-12)
