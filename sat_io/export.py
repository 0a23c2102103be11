"""The command `export`: a result, or a checkpoint's model, in the form in which a person takes it home.

config.json (format satune.export/1) holds `model` (name, path), `base` (name, revision), `target` (safetensors, adapter
or gguf), `dtype`, and for an adapter `adapters` (path of the checkpoint's adapters.safetensors), `lora_rank` and
`lora_alpha`. The folder export/ is what was asked for; export.json lists its files with sizes and hashes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sat_core.card import bare_card
from sat_core.plan.errors import ConfigError, PlanError
from sat_core.plan.layout import sha256_of
from sat_io.gguf_file import cast, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.events import EventLog

EXPORT_FORMAT = "satune.export/1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_METADATA = {"format": "pt"}


def export(folder: Path, config: dict[str, Any], events: EventLog) -> None:
    """Write export/ and export.json in `folder`.

    Raises:
        PlanError: where the model is gone, or cannot be written in that form.
    """
    if config.get("format") != EXPORT_FORMAT:
        raise ConfigError(
            f"config.json has format {config.get('format')!r}; this program reads {EXPORT_FORMAT!r}."
        )
    model = Path(config["model"]["path"])
    if not (model / "config.json").is_file():
        name = config["model"]["name"]
        raise PlanError(f"The files of {name} are gone.", "model", code="model_not_found")
    events.state("exporting", f"Writing {config['target']} in {config['dtype']}")
    writers: dict[str, Callable[[Path, Path, dict[str, Any]], None]] = {
        "safetensors": _safetensors,
        "adapter": _adapter,
        "gguf": _gguf,
    }
    target = folder / "export"
    target.mkdir()
    writers[config["target"]](model, target, config)
    for path in target.iterdir():
        # safetensors writes for its owner alone; what is taken home is read by others.
        path.chmod(0o644)
    files = [
        {"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in sorted(target.iterdir())
    ]
    (folder / "export.json").write_text(json.dumps({"files": files}, indent=1), "utf-8")


def _safetensors(model: Path, target: Path, config: dict[str, Any]) -> None:
    """The folder again, its weights in the dtype asked for."""
    dtype = DTYPES[config["dtype"]]
    total = 0
    for path in sorted(p for p in model.iterdir() if p.is_file()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
        elif _is_all(path, dtype):
            os.link(path, target / path.name)
            total += _size(load_file(path))
        else:
            tensors = {name: cast(name, t, dtype) for name, t in load_file(path).items()}
            total += _size(tensors)
            save_file(tensors, target / path.name, metadata=_METADATA)
    index = target / "model.safetensors.index.json"
    if index.is_file():
        _edit(index, lambda found: found["metadata"].update(total_size=total))
    _edit(target / "config.json", lambda found: found.update(dtype=config["dtype"]))
    if not (target / "README.md").is_file():
        _write_card(target, config)


def _adapter(model: Path, target: Path, config: dict[str, Any]) -> None:
    """The LoRA adapters alone, as peft saves them."""
    from peft import LoraConfig

    path = config["adapters"]
    if path is None:
        raise PlanError(
            "The adapters of this model lay in its checkpoint, which was deleted; allowed is safetensors.",
            "format",
            code="format_not_supported",
        )
    dtype = DTYPES[config["dtype"]]
    # peft's files leave out the adapter's own name, which is "default".
    tensors = {
        name.replace(".default.", "."): cast(name, tensor, dtype)
        for name, tensor in load_file(path).items()
    }
    owners = {name.rpartition(".lora_")[0] for name in tensors}
    save_file(tensors, target / "adapter_model.safetensors", metadata=_METADATA)
    LoraConfig(
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        target_modules=sorted({owner.rpartition(".")[2] for owner in owners}),
        fan_in_fan_out=_fan_in_fan_out(model, tensors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=config["base"]["name"],
        revision=config["base"]["revision"],
        inference_mode=True,
    ).save_pretrained(str(target))
    _write_card(target, config)


def _gguf(model: Path, target: Path, config: dict[str, Any]) -> None:
    name = config["model"]["name"]
    write_gguf(model, target / "model.gguf", dtype=DTYPES[config["dtype"]], name=name)


def _is_all(path: Path, dtype: torch.dtype) -> bool:
    with safe_open(path, framework="pt") as file:
        return all(file.get_tensor(name).dtype is dtype for name in file.keys())  # noqa: SIM118 - no dict


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _fan_in_fan_out(model: Path, adapters: dict[str, torch.Tensor]) -> bool:
    """Whether the adapted weights stand as (in, out), as GPT-2's do; a square weight tells nothing."""
    widths = {
        name.removeprefix("base_model.model.").replace(".lora_A.", "."): tensor.shape[1]
        for name, tensor in adapters.items()
        if ".lora_A." in name
    }
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                shape = file.get_slice(name).get_shape()
                if name in widths and shape[0] != shape[1]:
                    return bool(shape[0] == widths[name])
    return False


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_card(target: Path, config: dict[str, Any]) -> None:
    library = "peft" if config["target"] == "adapter" else "transformers"
    card = bare_card(config["model"]["name"], config["base"], library=library)
    (target / "README.md").write_text(card, "utf-8")
