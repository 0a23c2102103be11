"""The model card of a result: what it was made from, how, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sat_core.plan.config import TrainConfig


def model_card(config: TrainConfig, summary: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md of the model folder, in the form the hub reads; `figures` are the corpus'."""
    licence = base_licence(config.model_path)
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
    licence = base_licence(base["path"])
    return f"""{_front(base["name"], licence, library)}
# {name}

Made by Satune from {base["name"]} {base["revision"] or ""}, whose licence ({licence or "not stated in its model card"}) applies to it.
"""


def base_licence(model_path: str | None) -> str | None:
    """The licence that the base model's own card states."""
    card = Path(model_path or "") / "README.md"
    if not model_path or not card.is_file():
        return None
    found = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", found[1], re.MULTILINE) if found else None
    return line[1] if line else None


def _front(base: str, licence: str | None, library: str) -> str:
    stated = f"\nlicense: {licence}" if licence else ""
    return f"""---
base_model: {base}{stated}
library_name: {library}
pipeline_tag: text-generation
tags: [satune, sparsity-accelerated-training]
---"""


def _file(entry: dict[str, Any]) -> str:
    return f"{entry.get('filename', '?')} (SHA-256 {str(entry.get('sha256', '?'))[:16]})"


def _pair(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f} before, {after:.4f} after"
