"""What is asked of a base model before its weights: its config.json, and the commit that the hub has of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig

from sat_core.plan.errors import ModelError


def model_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local folder or a hub model.

    Raises:
        ModelError: where it is missing or not JSON.
    """
    try:
        local = Path(path) / "config.json"
        if Path(path).is_dir():
            return dict(json.loads(local.read_text("utf-8")))
        return dict(
            AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).to_dict()
        )
    except Exception as error:
        raise ModelError(
            f"The model {path} has no usable config.json: {type(error).__name__}: {error}", "model"
        ) from error


def hub_revision(name: str) -> str:
    """The commit that a hub model's main branch points to now, so that a job means one model for ever.

    Raises:
        ModelError: where the hub cannot be reached or has no such model.
    """
    try:
        return str(HfApi().model_info(name).sha)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, (HfHubHTTPError, HFValidationError)):
            message = f"The model {name} cannot be found on the hub: {said}"
        else:
            message = (
                f"The model {name} is one of the hub, which cannot be reached ({said}). Use a folder below a model root, "
                "local/NAME."
            )
        raise ModelError(message, "model", "model_download_failed") from error
