"""Checkpoints, written whole or not at all, and read only when every byte is as it was written.

    step-000100/model/                 the merged dense model, loadable by any Hugging Face tool
    step-000100/adapters.safetensors   with LoRA: the adapters, of the dense size
    step-000100/optimizer.safetensors  moments, of the dense size: exp_avg is zero where a unit sleeps
    step-000100/optimizer/             the same from ranks that share the layers, by torch.distributed.checkpoint
    step-000100/selection.safetensors  awake and ever-trained units and scores of each block, and the random state
    step-000100/state.json             step, counters, format version
    step-000100/MANIFEST.json          size and SHA-256 of each file above

Written to a hidden folder, synced, renamed, parent synced: a folder with the right name is complete. No pickle anywhere but
in optimizer/, whose files are opened only after each of them was found in the manifest as it was written.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from sat_core import sharding
from sat_core.optim import plain, store
from sat_core.plan.errors import PlanError
from sat_core.plan.layout import sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sat_core.slicing import SlicedBlock, SlicedParameter
    from sat_core.sparsity import Sparsity

CHECKPOINT_FORMAT = "satune.checkpoint/1"
_KEYS = ("step", "exp_avg", "exp_avg_sq")


class CheckpointError(PlanError):
    """A checkpoint that is incomplete or altered."""

    code = "no_checkpoint"


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` finished steps."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """Finished steps of a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def in_order(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"), key=step_of)


def save(folder: Path, sparsity: Sparsity, tokenizer: Any, state: dict[str, Any]) -> Path:
    """Write `folder`/step-NNNNNN for `state["step"]` finished steps; returns it.

    Where ranks share the layers all call it: each writes its moments, the first one the rest.

    Raises:
        OSError, SafetensorError: where the disk is full; nothing half-written stays.
    """
    target = folder / name_of(state["step"])
    parallel = sparsity.parallel
    scratch = folder / f".{target.name}-{os.getpid()}"
    try:
        if parallel.first:
            scratch.mkdir(parents=True)
        if not sparsity.whole:
            pid = parallel.sum(torch.tensor(os.getpid() if parallel.first else 0))
            scratch = folder / f".{target.name}-{int(pid)}"
            sharding.save_moments(scratch / "optimizer", _moments(sparsity))
        dense = sparsity.dense_state_dict()
        if parallel.first:
            _save_rest(scratch, sparsity, tokenizer, state, dense)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
            _sync(folder)
    finally:
        if parallel.first:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _save_rest(
    scratch: Path,
    sparsity: Sparsity,
    tokenizer: Any,
    state: dict[str, Any],
    dense: dict[str, torch.Tensor],
) -> None:
    """All that one process writes, the manifest last."""
    state = {"format": CHECKPOINT_FORMAT, "share": sparsity.share, "cap": sparsity.cap, **state}
    save_dense(scratch / "model", sparsity, tokenizer, dense)
    if adapters := _adapters(sparsity, dense):
        save_file(adapters, scratch / "adapters.safetensors")
    dense.clear()  # the moments take as much again
    if sparsity.whole:
        save_file(_moments(sparsity), scratch / "optimizer.safetensors")
    save_file(_selection(sparsity), scratch / "selection.safetensors")
    (scratch / "state.json").write_text(json.dumps(state), "utf-8")
    files = sorted(p for p in scratch.rglob("*") if p.is_file())
    manifest = {
        str(p.relative_to(scratch)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in files
    }
    (scratch / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    folders = [p for p in scratch.iterdir() if p.is_dir()]
    for path in [*files, scratch / "MANIFEST.json", *folders, scratch]:
        _sync(path)


def save_dense(
    folder: Path, sparsity: Sparsity, tokenizer: Any, state: dict[str, torch.Tensor]
) -> None:
    """Write the merged dense model and its tokenizer as a Hugging Face folder; `state` is its dense state dict."""
    if sparsity.core is not sparsity.model:
        state = merged_state_dict(sparsity, state)
    sparsity.core.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors writes for its owner alone; a model is read by other tools, often as another user.
        path.chmod(0o644)


def merged_state_dict(
    sparsity: Sparsity, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The stock model's state dict, LoRA's products added to the projections that they adapt: W + scale B A."""
    merged: dict[str, torch.Tensor] = {}
    adapted = {n: m for n, m in sparsity.model.named_modules() if hasattr(m, "base_layer")}
    prefix = "base_model.model."
    for name, tensor in state.items():
        owner, _, leaf = name.removeprefix(prefix).partition(".base_layer.")
        if ".lora_" in name:
            continue
        module = adapted.get(prefix + owner)
        if module is not None and leaf == "weight":
            for adapter, scale in module.scaling.items():
                down, up = (state[f"{prefix}{owner}.lora_{x}.{adapter}.weight"] for x in "AB")
                delta = scale * (up @ down)
                tensor = tensor + (delta.T if module.fan_in_fan_out else delta)
        merged[f"{owner}.{leaf}" if leaf else owner] = tensor
    return merged


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest; the saved state.

    Raises:
        CheckpointError: naming the first file that is not as it was written.
        PlanError: with code checkpoint_unsupported, for another format version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
        # Before the manifest, which may be of another form there.
        if (found := state.get("format")) != CHECKPOINT_FORMAT:
            raise PlanError(
                f"{folder.name} has format {found!r}; this program reads {CHECKPOINT_FORMAT!r}. Go on with the release "
                "that wrote it, or start anew.",
                code="checkpoint_unsupported",
            )
        manifest = json.loads((folder / "MANIFEST.json").read_text("utf-8"))
        for name, wanted in manifest.items():
            path = folder / name
            if path.stat().st_size != wanted["bytes"] or sha256_of(path) != wanted["sha256"]:
                raise CheckpointError(f"{folder.name}/{name} is not as it was written.")
        for path in folder.glob("optimizer/*"):
            if f"optimizer/{path.name}" not in manifest:
                raise CheckpointError(
                    f"{folder.name}/optimizer/{path.name} is not in the manifest."
                )
    except PlanError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.name} is incomplete: {error}.") from error
    return state


def first_whole(candidates: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first checkpoint that verifies, and what was wrong with those passed over.

    Raises:
        PlanError: for one of another format version, which is nothing to pass over.
    """
    wrong = []
    for candidate in candidates:
        try:
            verify(candidate)
        except CheckpointError as error:
            wrong.append(error.message)
        else:
            return candidate, wrong
    return None, wrong


def restore(folder: Path, sparsity: Sparsity) -> dict[str, Any]:
    """Put moments, selection and random state back; the saved state. The model was loaded from `folder`/model, dense.

    The folder must have passed `verify`. Ranks that share the layers read what one process wrote, and the other way round.
    """
    optimizer = sparsity.optimizer
    if optimizer is None:
        raise AssertionError("a run has an optimizer")
    moments = _load_moments(folder, sparsity)
    sliced = _sliced(sparsity)
    for name, registered in sparsity.model.named_parameters():
        if f"{name}.step" in moments:
            parameter = sliced[name][1].parameter if name in sliced else registered
            kept = {key: moments[f"{name}.{key}"].to(parameter.device) for key in _KEYS}
            store(optimizer, parameter, kept)
            optimizer.state[parameter] = kept
    if (folder / "adapters.safetensors").exists():
        sparsity.model.load_state_dict(load_file(folder / "adapters.safetensors"), strict=False)
    selection = load_file(folder / "selection.safetensors")
    for block in sparsity.blocks:
        name, device = f"{block.kind}.{block.layer}", block.awake_K.device
        block.refresh(selection[f"{name}.awake"], optimizer)
        block.trained_U = selection[f"{name}.trained"].to(device)
        if f"{name}.score" in selection:
            block.score_U = selection[f"{name}.score"].to(device)
        if f"{name}.bias" in selection:
            sparsity.bias[id(block)] = selection[f"{name}.bias"].to(device)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
    sparsity.share, sparsity.cap = state["share"], state["cap"]
    torch.set_rng_state(selection["rng"])
    if "rng_cuda" in selection:
        torch.cuda.set_rng_state(selection["rng_cuda"])
    return state


def _sliced(sparsity: Sparsity) -> dict[str, tuple[SlicedBlock, SlicedParameter]]:
    return {part.name: (block, part) for block in sparsity.blocks for part in block.parts}


def _load_moments(folder: Path, sparsity: Sparsity) -> dict[str, torch.Tensor]:
    """Moments by name, of the dense size; this rank's slices of what the ranks share. All units are awake."""
    cut = {n: (b.shards, p) for n, (b, p) in _sliced(sparsity).items() if b.shards}
    if (folder / "optimizer.safetensors").exists():
        moments = load_file(folder / "optimizer.safetensors")
        for name, (shards, part) in cut.items():
            for key in (f"{name}.{k}" for k in _KEYS[1:]):
                if key in moments:
                    moments[key] = shards.cut(part, moments[key])
        return moments
    slices = {
        f"{name}.{key}": shards.spread(part, torch.zeros_like(part.parameter.data))
        for name, (shards, part) in cut.items()
        for key in _KEYS[1:]
    }
    return sharding.load_moments(folder / "optimizer", slices)


def _adapters(sparsity: Sparsity, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained tensors of a peft model; its base is where it was."""
    if sparsity.core is sparsity.model:
        return {}
    return {name: t.contiguous() for name, t in state.items() if ".lora_" in name}


def _moments(sparsity: Sparsity) -> dict[str, torch.Tensor]:
    if sparsity.optimizer is None:
        raise AssertionError("a run has an optimizer")
    sliced = _sliced(sparsity)
    tensors: dict[str, torch.Tensor] = {}
    for name, registered in sparsity.model.named_parameters():
        parameter = sliced[name][1].parameter if name in sliced else registered
        state = sparsity.optimizer.state.get(parameter)
        if not state:
            continue
        pair = (plain(state["exp_avg"]), plain(state["exp_avg_sq"]))
        if name in sliced:
            block, part = sliced[name]
            pair = block.dense_moments(part, state)
            if block.shards:
                pair = (block.shards.spread(part, pair[0]), block.shards.spread(part, pair[1]))
        tensors |= {
            f"{name}.step": state["step"],
            f"{name}.exp_avg": pair[0].cpu(),
            f"{name}.exp_avg_sq": pair[1].cpu(),
        }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _selection(sparsity: Sparsity) -> dict[str, torch.Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for block in sparsity.blocks:
        name = f"{block.kind}.{block.layer}"
        tensors |= {f"{name}.awake": block.awake_K, f"{name}.trained": block.trained_U}
        if block.score_U is not None:
            tensors[f"{name}.score"] = block.score_U.contiguous()
        if (bias := sparsity.bias.get(id(block))) is not None:
            tensors[f"{name}.bias"] = bias
    return tensors


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
