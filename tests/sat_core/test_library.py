"""The examples of docs/library.md, run as they stand, and what the callback promises beyond them."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sat_core.callback import SatCallback
from sat_core.plan.config import SatConfig
from sat_core.plan.errors import ConfigError, ModelError
from sat_core.sparsity import sparsify
from tests.sat_core.tiny import tiny_model, write_model

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
STEPS = 20


def inputs(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 60, (rows, 1), generator=generator)
    ids = first + torch.arange(16) % 8
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def arguments_of(folder: Path, kind: Any = TrainingArguments, **more: Any) -> Any:
    return kind(
        output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=4,
        learning_rate=3e-3, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, **more,
    )  # fmt: skip


def rows() -> Dataset:
    batches = [inputs(seed) for seed in range(STEPS)]
    return Dataset.from_list(
        [{k: v[i].tolist() for k, v in b.items()} for b in batches for i in range(4)]
    )


def check_result(folder: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.model.layers[1].mlp.gate_proj.weight.shape == (48, 32)
    with torch.no_grad():
        assert float(saved(**inputs(99)).loss) < float(tiny_model()(**inputs(99)).loss) - 0.3


def test_the_loop_of_the_documentation(tmp_path: Path) -> None:
    names = {
        "model": tiny_model(),
        "batches": [inputs(s) for s in range(STEPS)],
        "folder": tmp_path,
    }
    exec(EXAMPLES[0], names)
    assert len(EXAMPLES[0].splitlines()) < 20
    check_result(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_trainer_of_the_documentation(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 9}
    names = {
        "model": tiny_model(), "arguments": arguments_of(tmp_path, **evaluated),
        "rows": rows(), "folder": tmp_path / "model",
    }  # fmt: skip
    exec(EXAMPLES[1], names)
    check_result(tmp_path / "model")
    check_result(tmp_path / "out/checkpoint-18")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("packing", [False, True])
def test_the_sft_trainer_of_the_documentation(tmp_path: Path, packing: bool) -> None:
    from trl import SFTConfig

    write_model(tmp_path / "base")
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "base"),
        "arguments": arguments_of(tmp_path, SFTConfig, bf16=False, packing=packing, max_length=32),
        "rows": Dataset.from_list([{"text": "a b c d e f g h " * 2}] * 80),
        "folder": tmp_path / "model",
    }
    exec(EXAMPLES[2], names)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.model.layers[1].mlp.gate_proj.weight.shape == (48, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_looking_at_the_dense_model_changes_nothing(tmp_path: Path) -> None:
    def train(name: str, **looks: Any) -> dict[str, torch.Tensor]:
        model = tiny_model()
        trainer = Trainer(
            model=model, args=arguments_of(tmp_path / name, **looks),
            train_dataset=rows(), eval_dataset=rows(),
        )  # fmt: skip
        callback = SatCallback(SatConfig(total_steps=1, mlp_rate=0.5), inputs(0))
        trainer.add_callback(callback)
        trainer.train()
        assert callback.sparsity is not None
        assert callback.sparsity.realised_rates() == (0, 0)
        return dict(model.state_dict())

    plain = train("plain", save_strategy="no")
    looked = train("looked", eval_strategy="steps", eval_steps=1, save_steps=3)
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("max_gap", "cap"), [(1e-9, 0.0), (9.0, 1.0)])
def test_the_callback_watches_the_gap(tmp_path: Path, max_gap: float, cap: float) -> None:
    arguments = arguments_of(tmp_path, save_strategy="no")
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=rows())
    config = SatConfig(total_steps=1, mlp_rate=0.5, attention_rate=0.5, max_gap=max_gap)
    callback = SatCallback(config, inputs(0))
    trainer.add_callback(callback)
    trainer.train()
    assert callback.sparsity is not None
    assert callback.sparsity.cap == cap


def test_the_callback_refuses_to_be_one_of_several() -> None:
    callback = SatCallback(SatConfig(total_steps=1, mlp_rate=0.5), inputs(0))
    with pytest.raises(ConfigError, match="in one process, not in 2"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), "model is a Linear; allowed is a causal LM"),
        (tiny_model().model, "model is a LlamaModel"),
        (torch.nn.DataParallel(tiny_model()), "model is a DataParallel; .* `module`"),
    ],
)
def test_what_is_no_causal_model_is_refused(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sparsify(model)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda own, _: torch.optim.AdamW(own, amsgrad=True), "optimizer is AdamW; .* without amsgrad"),
        (lambda own, _: torch.optim.RMSprop(own), "optimizer is RMSprop; allowed is AdamW"),
        (lambda own, _: torch.optim.SGD(own, lr=0.1, momentum=0.9), "optimizer is SGD"),
        (lambda _, other: torch.optim.AdamW(other), "holds no trainable parameter of this model"),
    ],
)  # fmt: skip
def test_an_optimizer_that_units_cannot_take_along_is_refused(optimizer: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        sparsify(model, optimizer(model.parameters(), tiny_model().parameters()))


def test_plain_sgd_has_no_state_to_follow() -> None:
    model = tiny_model()
    sparsity = sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SatConfig(total_steps=1)
    )
    sparsity.choose(0, inputs(0))
    assert sparsity.realised_rates()[0] == pytest.approx(0.5)


def test_a_narrow_model_is_not_taken_for_a_whole_one() -> None:
    model = tiny_model()
    sparsity = sparsify(model, config=SatConfig(total_steps=1))
    sparsity.choose(0, inputs(0))
    with pytest.raises(ModelError, match=r"gate_proj.weight has \d+ rows, 48 by its config"):
        sparsify(model)
    sparsity.wake_all()
    sparsify(model)


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    sparsity = sparsify(tiny_model(), config=SatConfig(total_steps=20))
    with pytest.raises(ConfigError, match=f"step is {step}; allowed is 0 to 19"):
        sparsity.begin_step(step, inputs(0))


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"sparse_share": 1.5}, "a number at least 0 and at most 1"),
        ({"dense_start": -0.1}, "a number at least 0 and at most 1"),
        ({"max_gap": -1.0}, "a number at least 0"),
        ({"exempt_layers": -1}, "an integer at least 0"),
        ({"mlp_rate": "0.5"}, "a number at least 0 and below 1"),
        ({"total_steps": 20.5}, "an integer at least 1"),
        ({"total_steps": None}, "an integer at least 1"),
        ({"refresh_every": -1}, "an integer at least 0"),
        ({"multiple": 0}, "an integer at least 1"),
        ({"multiple": 10**400}, "an integer at least 1"),
        ({"explore": 3}, "a number at least 0 and at most 1"),
        ({"metric": "wandas"}, "Did you mean 'wanda'"),
        ({"pooled": 1}, "true or false"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any], allowed: str) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError) as refused:
        SatConfig(**{"total_steps": 20, **setting})
    assert str(refused.value).startswith(f"{name} is {value!r}; allowed")
    assert allowed in str(refused.value)
    assert refused.value.param == name


def test_the_wheel_holds_the_core_alone(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import hatchling.build, os; os.chdir({str(ROOT / 'sat_core')!r}); hatchling.build.build_wheel({str(tmp_path)!r})"],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("satune_core-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = {n for n in names if not n.startswith("satune_core-")}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "sat_core").rglob("*.py")}
    assert code == expected
