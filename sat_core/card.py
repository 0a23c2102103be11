"""The model card of a result: what it was made from, how, and what was measured."""

from __future__ import annotations

from typing import Any

from sat_core.plan.config import TrainConfig


def model_card(config: TrainConfig, summary: dict[str, Any]) -> str:
    """README.md of the model folder, in the form the hub reads."""
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    measured = f"{before:.4f} before, {after:.4f} after" if before and after else "not measured"
    return f"""---
base_model: {config.model_name}
library_name: transformers
pipeline_tag: text-generation
tags: [satune, sparsity-accelerated-training]
---
# {config.model_name}, fine-tuned by Satune

A plain dense model. It was trained with Sparsity-Accelerated Training (Ma et al., arXiv 2406.01392): in the middle of
the run a share of the MLP channels and attention heads slept, at the end all were awake.
The base model's licence applies to it.

| | |
|---|---|
| base model | {config.model_name} {config.model_revision or ""} |
| steps, tokens | {summary["steps"]}, {summary["trained_tokens"]} |
| mean omission rate, MLP / attention | {summary["mean_omission_rate_mlp"]:.3f} / {summary["mean_omission_rate_attention"]:.3f} |
| held-out loss | {measured} |
| FLOPs, share of dense | {summary["flops"] / summary["dense_flops"]:.3f} |
| learning rate, batch, seed | {config.learning_rate:g}, {config.batch_size}, {config.seed} |
"""
