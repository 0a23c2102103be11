"""LLaMA-Factory's arguments in the words of a create body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.body import BY_ROWS
from cli.rules import (
    COMMON,
    OTHER_SCHEDULES,
    OWN_TEMPLATE,
    SCHEDULES,
    Rule,
    Translation,
    apply,
    batch,
    choose,
    is_number,
    linear,
    note,
    only,
    optimizer,
    own_settings,
    refuse,
    split,
    switch,
    taken_with_others,
    to,
    to_count,
    warmup,
)

# Columns of `dataset_info.json` under which rows are read as they are.
USUAL_COLUMNS = {
    "prompt": ("instruction", "prompt", "text"),
    "query": ("input",),
    "response": ("output", "completion"),
    "messages": ("messages", "conversations"),
    "system": ("system",),
    "tools": ("tools",),
}
# As the trackers of its runs call them.
PROJECT = "llamafactory"
TRACKERS = ("tensorboard", "wandb", "mlflow")
NOT_NEEDED = frozenset(
    {
        "data_shared_file_system", "dataloader_num_workers", "dataloader_pin_memory", "dataset_dir", "ddp_timeout",
        "do_eval", "enable_liger_kernel", "eval_strategy", "evaluation_strategy", "eval_on_start", "flash_attn",
        "include_num_input_tokens_seen", "include_tokens_per_second", "logging_dir", "logging_steps",
        "logging_strategy", "low_cpu_mem_usage", "media_dir", "output_dir", "overwrite_cache", "overwrite_output_dir",
        "per_device_eval_batch_size", "plot_loss", "predict_with_generate", "preprocessing_batch_size",
        "preprocessing_num_workers", "print_param_status", "push_to_hub", "remove_unused_columns",
        "save_only_model", "save_safetensors", "save_strategy", "tokenized_path", "upcast_layernorm",
        "use_fast_tokenizer", "use_unsloth",
    }
)  # fmt: skip


def from_llama_factory(found: Mapping[str, Any], folder: Path) -> Translation:
    """What arguments ask for; `folder` is that of the file, beside which data sets are looked for."""
    result = Translation()
    apply(result, found, RULES, NOT_NEEDED)
    batch(result, found, "per_device_train_batch_size", "gradient_accumulation_steps")
    warmup(result, found)
    if found.get("finetuning_type", "lora") == "lora":
        result.put("sat.train.tuning", "lora")
        rank = found.get("lora_rank", 8)
        if found.get("lora_alpha") is None and is_number(rank):
            result.put("sat.train.lora_alpha", 2 * rank)
    if found.get("neat_packing"):
        result.put("sat.data.packing", "separate")
    _trackers(result, found)
    for key in ("dataset", "eval_dataset"):
        files = [_file(result, key, name, found, folder) for name in _names(found.get(key))]
        if not files:
            continue
        result.put("training_file" if key == "dataset" else "validation_file", files[0])
        if files[1:] and key == "dataset":
            result.put("sat.data.mix", [{"file": file, "weight": BY_ROWS} for file in files[1:]])
        elif files[1:]:
            result.refused[key] = "there is one validation file; join them"
    own_settings(result, found)
    return result


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names if name]


def _file(result: Translation, key: str, name: str, found: Mapping[str, Any], folder: Path) -> str:
    """The file of a data set that is named in dataset_info.json; a name that is not is taken for a file's own."""
    given = Path(str(found.get("dataset_dir") or "data"))
    places = [place for place in (folder / given, given) if (place / "dataset_info.json").is_file()]
    if not places:
        return name
    try:
        known = json.loads((places[0] / "dataset_info.json").read_text("utf-8"))
    except ValueError:
        known = {}
    entry = known.get(name) if isinstance(known, dict) else None
    if not isinstance(entry, dict):
        return name
    if "file_name" not in entry:
        result.refused[key] = f"{name} lies on a hub; download it and name the file"
        return name
    strange = {
        column: value
        for column, value in (entry.get("columns") or {}).items()
        if value not in USUAL_COLUMNS.get(column, ())
    }
    if strange or entry.get("ranking"):
        result.refused[key] = (
            f"rows of {name} have {strange or 'preferences'}; bring them to messages, or to instruction, input, output"
        )
    return str((places[0] / str(entry["file_name"])).absolute())


def _trackers(result: Translation, found: Mapping[str, Any]) -> None:
    value, name = found.get("report_to"), found.get("run_name")
    named = {"name": name} if name else {}
    for kind in value if isinstance(value, list) else [value]:
        if kind == "tensorboard":
            result.track(kind, {})
        elif kind == "wandb":
            result.track(kind, {"project": PROJECT, **named})
        elif kind == "mlflow":
            result.track(kind, {"experiment": PROJECT, **named})
        elif kind not in (None, "none"):
            result.noted["report_to"] = f"{kind} is not known here; there are {', '.join(TRACKERS)}"


RULES: dict[str, Rule] = COMMON | {
    "model_name_or_path": to("model"),
    "stage": only("sft", "pt", otherwise="only supervised training (sft) and pre-training (pt)"),
    "do_train": only(True, otherwise="a job trains"),
    "do_predict": refuse("predictions on a file are not made; --set sat.eval.prompts for samples"),
    "finetuning_type": choose(
        "sat.train.tuning", {"lora": "lora", "full": "full"}, "there are full and lora"
    ),
    "adapter_name_or_path": refuse("name a result of ours as the model to train it further"),
    "quantization_bit": note("the base model is not quantised; that takes more memory"),
    "quantization_method": taken_with_others,
    "lora_rank": to("sat.train.lora_rank"),
    "lora_target": linear,
    "dataset": taken_with_others,
    "eval_dataset": taken_with_others,
    "template": note(OWN_TEMPLATE),
    "enable_thinking": note(OWN_TEMPLATE),
    "cutoff_len": to("sat.train.max_seq_len"),
    "max_samples": refuse("cut the file instead, as in head -n N"),
    "streaming": note("data are read once, into a corpus on disk"),
    "mix_strategy": only("concat", otherwise="files are joined; weigh them in sat.data.mix"),
    "packing": switch("sat.data.packing", "joined", "none"),
    "neat_packing": taken_with_others,
    "train_on_prompt": switch("sat.train.train_on", "all", "assistant"),
    "mask_history": refuse("all turns of the assistant are trained on; cut the rows instead"),
    "val_size": split,
    "per_device_train_batch_size": taken_with_others,
    "gradient_accumulation_steps": taken_with_others,
    "warmup_steps": taken_with_others,
    "num_train_epochs": to_count("hyperparameters.n_epochs"),
    "lr_scheduler_type": choose("sat.train.lr_schedule", SCHEDULES, OTHER_SCHEDULES),
    "optim": optimizer,
    "disable_gradient_checkpointing": switch(
        "sat.train.gradient_checkpointing", yes=False, no=True
    ),
    "pure_bf16": note("parameters stay in fp32 and are computed with in bf16"),
    "report_to": taken_with_others,
    "run_name": taken_with_others,
}
