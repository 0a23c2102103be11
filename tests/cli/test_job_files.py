"""Job files, and files of other trainers: every key is translated, noted or refused, and what comes of it is a body that the API takes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.schemas.create import check
from cli.axolotl import RULES as AXOLOTL_RULES
from cli.client import CliError
from cli.job_file import read, written
from cli.llama_factory import RULES as LLAMA_FACTORY_RULES
from tests.cli.running import satune

AXOLOTL = """
base_model: org/model
model_type: LlamaForCausalLM
load_in_8bit: false
strict: false
datasets:
  - path: a.jsonl
    type: chat_template
    field_messages: messages
    message_field_role: role
    roles_to_train: [assistant]
  - path: json
    data_files: b.jsonl
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project: mine
wandb_entity:
wandb_name: first
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
train_on_inputs: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
max_steps: 100
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
LLAMA_FACTORY = """
### model
model_name_or_path: org/model
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: own,b.json
template: qwen3_nothink
cutoff_len: 2048
preprocessing_num_workers: 16
### output
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: [wandb, tensorboard]
run_name: first
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def translation(
    folder: Path, text: str, *, lenient: bool = False
) -> tuple[dict[str, Any], list[str]]:
    (folder / "job.yaml").write_text(text, "utf-8")
    return read(folder / "job.yaml", lenient=lenient)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(CliError) as caught:
        translation(folder, text)
    assert caught.value.exit_code == 2
    return caught.value.message


def assert_accepted(body: dict[str, Any]) -> None:
    """The API takes the body, ids in the place of paths."""
    body = json.loads(json.dumps(body)) | {"training_file": "file-0"}
    for entry in body["sat"]["data"].get("mix", []):
        entry |= {"file": "file-1", "weight": 1.0}
    check(body)


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    body, warnings = translation(
        tmp_path, "sat: {mode: off, train: {learning_rate: 2e-5}}\nseed: 0010\n"
    )
    assert body == {"sat": {"mode": "off", "train": {"learning_rate": 2e-5}}, "seed": 10}
    assert warnings == []
    (tmp_path / "job.yaml").write_text(
        "a: [on, yes, true, ~, 1:30, .5, 1e3, 0x1F, 2026-11-25, '']\n"
    )
    found = read(tmp_path / "job.yaml", lenient=False)[0]
    assert found["a"] == ["on", "yes", True, None, "1:30", 0.5, 1000.0, 31, "2026-11-25", ""]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: a\nmodel: b\n", "line 2: 'model' is given twice"),
        ("sat:\n  train: {a: 1, a: 2}\n", "line 2"),
        ("a: [1\n", "line 2"),
        ("- 1\n", "mapping"),
        ("", "mapping"),
        ("!!python/object/apply:os.getcwd []\n", "line 1"),
    ],
)
def test_what_is_no_job_file_is_refused_by_its_line(tmp_path: Path, text: str, named: str) -> None:
    assert named in refusal(tmp_path, text)


def test_axolotl_is_translated_whole(tmp_path: Path) -> None:
    body, warnings = translation(tmp_path, AXOLOTL)
    assert_accepted(body)
    assert (body["model"], body["training_file"]) == ("org/model", "a.jsonl")
    assert body["hyperparameters"] == {"n_epochs": 3, "batch_size": 8}
    assert body["integrations"] == [
        {"type": "wandb", "wandb": {"project": "mine", "name": "first"}}
    ]
    assert body["sat"]["data"] == {
        "mix": [{"file": "b.jsonl", "weight": "auto"}],
        "validation_split": 0.1,
        "packing": "separate",
    }
    assert body["sat"]["train"] == {
        "tuning": "lora",
        "max_seq_len": 2048,
        "lora_rank": 8,
        "lora_alpha": 32,
        "optimizer": "adamw_8bit",
        "lr_schedule": "cosine",
        "learning_rate": 2e-5,
        "train_on": "assistant",
        "precision": "auto",
        "gradient_checkpointing": True,
        "max_steps": 100,
        "weight_decay": 0.0,
        "micro_batch_size": 2,
        "warmup": 0.1,
    }
    said = "\n".join(warnings)
    assert all(key in said for key in ("lora_dropout:", "evals_per_epoch:", "special_tokens:"))
    assert "not needed here: model_type, strict, dataset_prepared_path" in said


def test_llama_factory_is_translated_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {"own": {"file_name": "own.json", "columns": {"prompt": "instruction"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    body, warnings = translation(tmp_path, LLAMA_FACTORY)
    assert_accepted(body)
    assert body["training_file"] == str(tmp_path / "data" / "own.json")
    assert body["sat"]["data"]["mix"] == [{"file": "b.json", "weight": "auto"}]
    assert body["hyperparameters"] == {"n_epochs": 3, "batch_size": 8}
    assert body["sat"]["train"] == {
        "tuning": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "max_seq_len": 2048,
        "learning_rate": 1e-4,
        "lr_schedule": "constant",
        "warmup": 0.1,
        "precision": "bf16",
        "micro_batch_size": 1,
    }
    wandb = {"project": "llamafactory", "name": "first"}
    assert body["integrations"] == [
        {"type": "wandb", "wandb": wandb},
        {"type": "tensorboard", "tensorboard": {}},
    ]
    assert (body["sat"]["checkpoints"], body["sat"]["eval"]) == ({"every": 500}, {"every": 500})
    said = "\n".join(warnings)
    assert "template:" in said
    assert "trust_remote_code:" in said
    assert "not needed here: preprocessing_num_workers, output_dir" in said


def test_all_that_is_refused_is_named_at_once_with_what_to_do(tmp_path: Path) -> None:
    text = (
        "base_model: org/model\ndatasets: [{path: a.jsonl, type: {field_instruction: q}, split: 'train[:5%]'}]\n"
        "rl: dpo\nfp16: true\noptimizer: lion\nnum_epochs: 0.5\nmystery: 1\nval_set_size: 200\n"
    )
    message = refusal(tmp_path, text)
    for key in (
        "datasets.0.type",
        "datasets.0.split",
        "rl",
        "fp16",
        "optimizer",
        "num_epochs",
        "mystery",
        "val_set_size",
    ):
        assert f"\n  {key}: " in message
    assert "--lenient" in message
    body, warnings = translation(tmp_path, text, lenient=True)
    assert body == {"model": "org/model", "training_file": "a.jsonl"}
    assert "mystery: left out" in warnings


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("stage: dpo", "stage"),
        ("max_samples: 1000", "max_samples"),
        ("mask_history: true", "mask_history"),
        ("finetuning_type: freeze", "finetuning_type"),
        ("dataset: far", "hub"),
        ("dataset: pairs", "pairs"),
        ("eval_dataset: a.json,b.json", "eval_dataset"),
    ],
)
def test_llama_factory_names_what_trains_something_else(
    tmp_path: Path, more: str, named: str
) -> None:
    info = {"far": {"hf_hub_url": "x/y"}, "pairs": {"file_name": "p.json", "ranking": True}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    text = f"model_name_or_path: org/model\ndataset_dir: .\n{more}\n"
    assert named in refusal(tmp_path, text)


def test_the_sat_of_another_trainers_file_wins(tmp_path: Path) -> None:
    text = (
        "sat: {omission_rate: {mlp: 0.5}, train: {learning_rate: 1e-3, micro_batch_size: 8}}\n"
        "base_model: org/model\ndatasets: [{path: a.jsonl}]\nlearning_rate: 1e-5\nsequence_len: 64\n"
        "micro_batch_size: 2\nwarmup_steps: 0.5\n"
    )
    body, _ = translation(tmp_path, text)
    assert body["sat"] == {
        "omission_rate": {"mlp": 0.5},
        "train": {"learning_rate": 1e-3, "max_seq_len": 64, "micro_batch_size": 8, "warmup": 0.5},
    }


ODD = (
    True,
    False,
    0,
    -1,
    0.5,
    10**9,
    "",
    "x",
    [],
    [1],
    ["x"],
    [[]],
    {},
    {"x": 1},
    [{}],
    [{"path": 3}],
)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_no_value_of_any_key_is_too_odd_to_be_answered(tmp_path: Path, value: Any) -> None:
    for name, rules in (("base_model", AXOLOTL_RULES), ("model_name_or_path", LLAMA_FACTORY_RULES)):
        for key in rules:
            (tmp_path / "job.yaml").write_text(
                json.dumps({name: "org/model", key: value}).replace("Infinity", "1e999")
            )
            with contextlib.suppress(CliError):
                read(tmp_path / "job.yaml", lenient=False)


def test_a_dry_run_prints_a_job_file_that_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "axolotl.yml").write_text(AXOLOTL)
    done = satune(
        "submit", str(tmp_path / "axolotl.yml"), "--dry-run", "--mlp", "0.5", "--set", "sat.mode=on"
    )
    assert done.returncode == 0, done.stderr
    assert "warning lora_dropout" in done.stderr
    body, warnings = translation(tmp_path, done.stdout)
    assert (body["sat"]["mode"], body["sat"]["omission_rate"], warnings) == ("on", {"mlp": 0.5}, [])
    assert yaml.safe_load(done.stdout) == body
    as_json = satune("submit", str(tmp_path / "job.yaml"), "--dry-run", "--json")
    assert json.loads(as_json.stdout) == body
    named = satune("submit", str(tmp_path / "job.yaml"), "--dry-run", "--suffix", "08")
    assert translation(tmp_path, named.stdout)[0]["suffix"] == "08"


def test_a_body_comes_back_from_a_job_file_as_it_was(tmp_path: Path) -> None:
    texts = [
        "2e-5",
        "08",
        "12e7",
        "1_000",
        "yes",
        "off",
        "null",
        "~",
        "",
        "2020-01-01",
        "0x1f",
        "a: b",
    ]
    body = {
        "model": "local/m",
        "training_file": "file-1",
        "metadata": {f"k{n}": text for n, text in enumerate(texts)},
        "seed": 8,
        "sat": {"train": {"learning_rate": 2e-5, "compile": False, "max_steps": None}},
    }
    path = tmp_path / "job.yaml"
    path.write_text(written(body))
    assert read(path, lenient=False)[0] == body
