"""Axolotl's configuration in the words of a create body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cli.body import BY_ROWS
from cli.rules import (
    ALL_LINEAR,
    COMMON,
    OTHER_SCHEDULES,
    OWN_TEMPLATE,
    SCHEDULES,
    Rule,
    Translation,
    apply,
    batch,
    choose,
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

# Kinds of rows that are known by their own columns here.
ROW_TYPES = ("alpaca", "chat_template", "sharegpt", "completion", "pretrain", "messages")
# What an entry of `datasets` may say without changing what its rows mean here.
USUAL: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "parquet", "csv", "text"),
    "split": ("train",),
    "field": ("text",),
    "field_messages": ("messages", "conversations"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
    "roles": (
        {"user": ["user"], "assistant": ["assistant"]},
        {"user": ["user"], "assistant": ["assistant"], "system": ["system"]},
        {"user": ["human", "user"], "assistant": ["gpt", "assistant"]},
        {"user": ["human"], "assistant": ["gpt"]},
    ),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn", "all"),
    "chat_template": ("tokenizer_default",),
}
NOT_BASE = "the base model is not quantised; that takes more memory"
PER_EPOCH = (
    "how often follows from the number of steps; --set sat.eval.every=N, sat.checkpoints.every=N"
)
WANDB = ("project", "entity", "name")
NOT_NEEDED = frozenset(
    {
        "auto_resume_from_checkpoints", "cut_cross_entropy", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "dataset_keep_in_memory", "dataset_num_proc", "dataset_prepared_path",
        "dataset_processes", "ddp_timeout", "debug", "eval_batch_size", "eval_sample_packing", "eval_strategy",
        "eval_table_size", "eval_max_new_tokens", "flash_attention", "flex_attention", "gradient_checkpointing_kwargs",
        "hub_model_id", "hub_strategy", "is_llama_derived_model", "is_mistral_derived_model", "liger_cross_entropy",
        "liger_fused_linear_cross_entropy", "liger_glu_activation", "liger_layer_norm", "liger_rms_norm", "liger_rope",
        "local_rank", "logging_steps", "lora_fan_in_fan_out", "lora_mlp_kernel", "lora_o_kernel", "lora_qkv_kernel",
        "loss_watchdog_patience", "loss_watchdog_threshold", "low_cpu_mem_usage", "model_type", "output_dir",
        "pad_to_sequence_len", "plugins", "processor_type", "push_dataset_to_hub", "sample_packing_bin_size",
        "sample_packing_group_size", "save_safetensors", "save_strategy", "sdp_attention", "shuffle_merged_datasets",
        "strict", "tf32", "tokenizer_type", "tokenizer_use_fast", "val_set_size_seed",
        "wandb_log_model", "wandb_run_id", "wandb_watch", "xformers_attention",
    }
)  # fmt: skip


def from_axolotl(found: Mapping[str, Any]) -> Translation:
    """What a configuration asks for."""
    result = Translation()
    apply(result, found, RULES, NOT_NEEDED)
    batch(result, found, "micro_batch_size", "gradient_accumulation_steps")
    warmup(result, found)
    wandb = {name: found[f"wandb_{name}"] for name in WANDB if found.get(f"wandb_{name}")}
    if "project" in wandb:
        result.track("wandb", wandb)
    if experiment := found.get("mlflow_experiment_name"):
        name = found.get("mlflow_run_name")
        result.track("mlflow", {"experiment": experiment, **({"name": name} if name else {})})
    if found.get("use_tensorboard"):
        result.track("tensorboard", {})
    own_settings(result, found)
    return result


def _datasets(result: Translation, key: str, value: Any) -> None:
    if not (isinstance(value, list) and value and all(isinstance(e, Mapping) for e in value)):
        result.refused[key] = "it is a list of objects with a path each"
        return
    files = [_file(result, f"{key}.{i}", entry) for i, entry in enumerate(value)]
    if key == "test_datasets":
        result.put("validation_file", files[0])
        if files[1:]:
            result.refused[key] = "there is one validation file; join them"
        return
    result.put("training_file", files[0])
    if files[1:]:
        result.put("sat.data.mix", [{"file": file, "weight": BY_ROWS} for file in files[1:]])


def _file(result: Translation, place: str, entry: Mapping[str, Any]) -> str:
    kind = entry.get("type")
    if not (kind is None or (isinstance(kind, str) and kind.split(".")[0] in ROW_TYPES)):
        result.refused[f"{place}.type"] = (
            f"{kind!r} is not known here; rows are messages, conversations, prompt and completion, Alpaca's, or text"
        )
    for name, value in entry.items():
        if name in ("path", "type", "data_files") or value is None or value in USUAL.get(name, ()):
            continue
        result.refused[f"{place}.{name}"] = (
            f"{value!r} is not known here; bring the rows to messages, or another form that is read as it is"
        )
    files = entry.get("data_files")
    if isinstance(files, list):
        if len(files) != 1:
            result.refused[f"{place}.data_files"] = "one file an entry; join them"
        files = files[0] if files else None
    return str(files or entry.get("path"))


def _template(result: Translation, key: str, value: Any) -> None:
    if value != "tokenizer_default":
        result.noted[key] = OWN_TEMPLATE


RULES: dict[str, Rule] = COMMON | {
    "base_model": to("model"),
    "base_model_config": only(otherwise="the configuration of the base model is used"),
    "tokenizer_config": only(otherwise="the tokenizer of the base model is used"),
    "datasets": _datasets,
    "test_datasets": _datasets,
    "val_set_size": split,
    "chat_template": _template,
    "special_tokens": note("the tokenizer's own are used"),
    "tokens": refuse("tokens cannot be added to a vocabulary"),
    "sequence_len": to("sat.train.max_seq_len"),
    "sample_packing": switch("sat.data.packing", "separate", "none"),
    "train_on_inputs": switch("sat.train.train_on", "all", "assistant"),
    "num_epochs": to_count("hyperparameters.n_epochs"),
    "batch_size": to_count("hyperparameters.batch_size"),
    "micro_batch_size": taken_with_others,
    "gradient_accumulation_steps": taken_with_others,
    "warmup_steps": taken_with_others,
    "lr_scheduler": choose("sat.train.lr_schedule", SCHEDULES, OTHER_SCHEDULES),
    "optimizer": optimizer,
    "adapter": choose("sat.train.tuning", {"lora": "lora", "qlora": "lora"}, "there is lora"),
    "load_in_4bit": note(NOT_BASE),
    "load_in_8bit": note(NOT_BASE),
    "lora_r": to("sat.train.lora_rank"),
    "lora_target_modules": linear,
    "lora_target_linear": only(True, False, otherwise=ALL_LINEAR),
    "lora_modules_to_save": refuse("only adapters are trained in a LoRA run"),
    "lora_model_dir": refuse("name a result of ours as base_model to train it further"),
    "evals_per_epoch": note(PER_EPOCH),
    "saves_per_epoch": note(PER_EPOCH),
    "early_stopping_patience": note("a run goes to its end; its checkpoints stay"),
    "rl": refuse("only supervised training and continued pre-training are offered"),
    "wandb_project": taken_with_others,
    "wandb_entity": taken_with_others,
    "wandb_name": taken_with_others,
    "use_tensorboard": taken_with_others,
    "mlflow_experiment_name": taken_with_others,
    "mlflow_run_name": taken_with_others,
    "mlflow_tracking_uri": note("the operator of the service names the address"),
}
