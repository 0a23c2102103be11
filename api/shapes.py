"""What settings ask of a model whose config.json is here, judged before a worker looks.

Creates, estimates, validations and previews refuse by the rules of `prepare` itself. What only the data will tell is taken
to be ordinary here.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.deps import Services
from api.errors import ApiError
from sat_core.plan.errors import ModelError
from sat_core.plan.families import ModelShape, shape_of
from sat_core.plan.request import RunRequest
from sat_core.plan.resolve import check_mode, max_seq_len, resolve

STEPS = 1000
ORDINARY = {"rows": STEPS, "sequences": STEPS, "packed": False, "format": "messages"}


def model_folder(app: Services, project: str, name: str) -> Path | None:
    """Where a model lies; None for one of the hub, or one that is not there."""
    if name.startswith("ft:"):
        return app.model_path(project, name)
    return app.artifacts.resolve_model(name)


def read_shape(folder: Path, name: str) -> ModelShape:
    """The shape of the model in a folder.

    Raises:
        ApiError, ModelError: its config.json is none, or of no family that is supported.
    """
    try:
        found: Any = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ApiError(
            "model_unsupported", f"{name}: config.json cannot be read: {error}.", "model"
        ) from error
    if not isinstance(found, dict):
        raise ApiError("model_unsupported", f"{name}: config.json is no JSON object.", "model")
    return shape_of(found)


def refuse_unfit(app: Services, project: str, run: RunRequest) -> None:
    """Refuse settings that contradict each other or the model; what a worker alone can read, it judges.

    Raises:
        ConfigError: naming the setting.
    """
    check_mode(run)
    folder = model_folder(app, project, run.model)
    if folder is None:
        return
    try:
        shape = read_shape(folder, run.model)
    except (ApiError, ModelError):
        return
    longest = max_seq_len(run, shape, packed=False)
    train = replace(run.sat.train, max_steps=STEPS)
    resolve(
        replace(run, sat=replace(run.sat, train=train)),
        shape,
        {**ORDINARY, "seq_len": longest, "longest": longest},
        model_path=None,
        revision=None,
        corpus="",
    )
