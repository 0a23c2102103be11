"""The model card of a result: what it was made from, how, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sat_core.plan.config import TrainConfig


def model_card(config: TrainConfig, summary: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md of the model folder, in the form the hub reads; `figures` are the corpus'."""
    licence = base_licence(config.model_name, config.model_path, config.model_revision)
    sat = config.sat
    rows = [
        ("base model", f"{config.model_name} {config.model_revision or ''}".strip()),
        ("licence of the base model", licence or "not stated in its model card"),
        *(("data", _file(entry)) for entry in figures.get("files", [])),
        ("steps, tokens", f"{summary['steps']}, {summary['trained_tokens']}"),
        (
            "mean omission rate, MLP / attention",
            f"{summary['mean_omission_rate_mlp']:.3f} / {summary['mean_omission_rate_attention']:.3f}",
        ),
        (
            "sparsity",
            f"{sat.schedule}, {sat.dense_start:g} dense start, {sat.sparse_share:g} sparse share, {sat.rungs} rungs; "
            f"{sat.metric}, {sat.selector}, allotment {sat.allotment}, refresh every {sat.refresh_every}",
        ),
        ("held-out loss", _pair(summary["eval_loss_before"], summary["eval_loss_after"])),
        (
            "loss on the base model's own text (rises as it forgets)",
            _pair(summary["forgetting_loss_before"], summary["forgetting_loss_after"]),
        ),
        ("FLOPs, share of dense", f"{summary['flops'] / max(1, summary['dense_flops']):.3f}"),
        (
            "tuning, learning rate, batch, seed",
            f"{config.tuning}, {config.learning_rate:g}, {config.batch_size}, {config.seed}",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""{_front(config.model_name, licence, "transformers")}
# {config.model_name}, fine-tuned by Satune

A plain dense model. It was trained with Sparsity-Accelerated Training (Ma et al., arXiv 2406.01392): in the middle of
the run a share of the MLP channels and attention heads slept, at the end all were awake.
The base model's licence applies to it.

| | |
|---|---|
{table}
"""


def bare_card(name: str, base: dict[str, Any], *, library: str) -> str:
    """README.md of a checkpoint's model or of an adapter, of which nothing was measured on its own."""
    licence = base_licence(base["name"], base["path"], base["revision"])
    return f"""{_front(base["name"], licence, library)}
# {name}

Made by Satune from {base["name"]} {base["revision"] or ""}, whose licence ({licence or "not stated in its model card"}) applies to it.
"""


def base_licence(name: str, path: str | None, revision: str | None) -> str | None:
    """The licence that the base model's own card states, in its folder or on the hub."""
    card = Path(path) / "README.md" if path else _hub_card(name, revision)
    if card is None or not card.is_file():
        return None
    found = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", found[1], re.MULTILINE) if found else None
    return line[1] if line else None


def _hub_card(name: str, revision: str | None) -> Path | None:
    """None where it has no card or the hub is away: a run that has ended is not failed for that."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "README.md", revision=revision))
    except Exception:  # noqa: BLE001 - of the network, its proxies and the cache's disk, each in its own kind
        return None


def _front(base: str, licence: str | None, library: str) -> str:
    stated = f"\nlicense: {licence}" if licence else ""
    return f"""---
base_model: {base}{stated}
library_name: {library}
pipeline_tag: text-generation
tags: [satune, sparsity-accelerated-training]
---"""


def _file(entry: dict[str, Any]) -> str:
    kind = "SHA-256" if "sha256" in entry else "revision"
    return f"{entry['filename']} ({kind} {entry.get('sha256') or entry['revision']})"


def _pair(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} before, {after:.4f} after"
