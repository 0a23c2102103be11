"""How each kind of chore is done: which command of `sat_io`, what its config.json says, and what it may use.

A new kind is an entry of `KINDS` and a command of `sat_io` that reads config.json and leaves one JSON object. The bounds
hold for hostile input: a file that makes the child grow, loop or write without end costs its own chore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.spec import ChoreRecord
from worker.child import Bounds
from worker.inputs import PREPARE_FORMAT, Inputs
from worker.slots import hardware

EXPORT_FORMAT = "satune.export/1"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is done for a chore.

    Attributes:
        command: of `sat_io`.
        config: config.json, from the chore; may raise NotFound.
        result: the JSON file that the child leaves in its folder.
        seconds: after so long it is ended.
        bounds: of the child process.
        keeps: the folder that outlives the child, if any.
    """

    command: str
    config: Callable[[ChoreRecord, Inputs], dict[str, Any]]
    result: str
    seconds: float
    bounds: Bounds
    keeps: str | None = None


def _preview(chore: ChoreRecord, inputs: Inputs) -> dict[str, Any]:
    return {**_reading(chore, inputs), "rows": chore.params["rows"]}


def _validation(chore: ChoreRecord, inputs: Inputs) -> dict[str, Any]:
    against = chore.params["against"]
    return {
        **_reading(chore, inputs),
        "declared_format": chore.params["declared_format"],
        "validation_file": inputs.file(against) if against else None,
    }


def _reading(chore: ChoreRecord, inputs: Inputs) -> dict[str, Any]:
    request = chore.params["request"]
    return {
        "format": PREPARE_FORMAT,
        "request": request,
        "model": inputs.model(request["model"]) if request else None,
        "training_file": inputs.file(chore.subject),
        "validation_file": None,
    }


def _estimate(chore: ChoreRecord, inputs: Inputs) -> dict[str, Any]:
    held = chore.params["validation_file"]
    mix = chore.params["request"]["sat"]["data"]["mix"]
    return {
        **_reading(chore, inputs),
        "validation_file": inputs.file(held) if held else None,
        "mix_files": [{**inputs.file(m["file"]), "weight": m["weight"]} for m in mix],
        "corpora_dir": str(inputs.artifacts.corpora),
        "hardware": hardware(),
    }


def _export(chore: ChoreRecord, inputs: Inputs) -> dict[str, Any]:
    made = inputs.made(chore.subject)
    return {"format": EXPORT_FORMAT, **made, **chore.params}


# A .json array of the largest size is held whole, and takes some ten times its bytes as objects.
_READER = Bounds(memory_bytes=4 * GIB, file_bytes=64 * 2**20)
# Whether a job waits for it or an estimate; a corpus has the size that its files give it.
PREPARING = Bounds(memory_bytes=8 * GIB, file_bytes=64 * GIB)

KINDS: dict[str, Kind] = {
    "preview": Kind(
        command="preview",
        config=_preview,
        result="preview.json",
        seconds=120,
        bounds=_READER,
    ),
    "validation": Kind(
        command="validate",
        config=_validation,
        result="validation.json",
        seconds=1800,
        bounds=_READER,
    ),
    "estimate": Kind(
        command="prepare",
        config=_estimate,
        result="train.json",
        seconds=3600,
        bounds=PREPARING,
    ),
    # Its input is a model of our own making; at most a whole model stands in memory, once more in another dtype.
    "export": Kind(
        command="export",
        config=_export,
        result="export.json",
        seconds=3600,
        bounds=Bounds(memory_bytes=1024 * GIB, file_bytes=1024 * GIB),
        keeps="export",
    ),
}
