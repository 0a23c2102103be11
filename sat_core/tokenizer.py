"""A model's tokenizer, without its weights and without torch."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from sat_core.plan.errors import ModelError


def load_tokenizer(path: str, *, revision: str | None = None) -> Any:
    """The model's fast tokenizer.

    Raises:
        ModelError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False, use_fast=True
        )
    except Exception as error:
        raise ModelError(
            f"The tokenizer of {path} cannot be loaded: {type(error).__name__}: {error}", "model"
        ) from error
