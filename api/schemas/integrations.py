"""The field `integrations` of a create: which trackers of experiments a job's metrics go to as well.

`wandb` is OpenAI's; `mlflow` and `tensorboard` are ours, and written the same way. Addresses and keys are no part of it: where
a worker connects to is its operator's choice, and what it signs in with is a secret of the project.
"""

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from api.errors import ApiError, refuse_unknown
from jobs.integrations import TYPES, Integration

MAX_CHARS, MAX_TAGS = 128, 16
NAME = "integrations"


def check_integrations(value: Any) -> tuple[dict[str, Any], ...]:
    """The list as it is kept, `[{"type": T, T: {...}}]`; raises ApiError at the first value that is not allowed."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong(NAME, value, "a list of objects")
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(value):
        param = f"{NAME}.{number}"
        if not isinstance(entry, dict):
            raise _wrong(param, entry, "an object")
        kind = entry.get("type")
        if kind not in TYPES:
            raise _wrong(f"{param}.type", kind, f"one of {', '.join(TYPES)}")
        if kind in found:
            raise ApiError(
                "conflicting_parameters",
                f"{param}.type is {kind!r} again; give each type once.",
                f"{param}.type",
            )
        refuse_unknown([f"{param}.{k}" for k in entry], [f"{param}.type", f"{param}.{kind}"])
        found[kind] = _settings(entry.get(kind, {}), kind, f"{param}.{kind}")
    return tuple({"type": kind, kind: settings} for kind, settings in found.items())


def _settings(value: Any, kind: str, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(param, value, "an object")
    refuse_unknown([f"{param}.{k}" for k in value], [f"{param}.{k}" for k in _FIELDS[kind]])
    settings = {}
    for name, (good, allowed, needed, _) in _FIELDS[kind].items():
        given = value.get(name)
        if given is None and needed:
            code = "missing_required_parameter"
            raise ApiError(code, f"{param}.{name} is missing; it is {allowed}.", f"{param}.{name}")
        if given is not None and not good(given):
            raise _wrong(f"{param}.{name}", given, allowed)
        settings[name] = given
    return settings


def _wrong(param: str, value: Any, allowed: str) -> ApiError:
    return ApiError("invalid_value", f"{param} is {value!r:.100}; allowed is {allowed}.", param)


# No control characters.
_SHOWN = re.compile(r"[^\x00-\x1f\x7f]+")
_OWN = ("mlflow.", "satune.")


def _text(value: Any) -> bool:
    return (
        isinstance(value, str) and len(value) <= MAX_CHARS and _SHOWN.fullmatch(value) is not None
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_TAGS and all(map(_text, value))


def _pairs(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_TAGS:
        return False
    # What MLflow itself keeps under such names would change the run.
    return all(_text(k) and _text(v) and not k.startswith(_OWN) for k, v in value.items())  # fmt: skip


_STRING = {"type": "string", "maxLength": MAX_CHARS, "pattern": r"^[^\x00-\x1f\x7f]+$"}
_TEXT = (_text, f"a string of 1 to {MAX_CHARS} characters that can be seen")
_ANY = (*_TEXT, False, _STRING)
_TAGS = {"type": "array", "maxItems": MAX_TAGS, "items": _STRING}
_NAMES = {**_STRING, "pattern": r"^(?!mlflow\.|satune\.)[^\x00-\x1f\x7f]+$"}
_PAIRS = {
    "type": "object",
    "maxProperties": MAX_TAGS,
    "propertyNames": _NAMES,
    "additionalProperties": _STRING,
}
# Of each field: its check, what is allowed in words, whether it must be there, its JSON Schema.
_Field = tuple[Callable[[Any], bool], str, bool, dict[str, Any]]
_FIELDS: dict[str, dict[str, _Field]] = {
    "mlflow": {
        "experiment": (*_TEXT, True, _STRING),
        "name": _ANY,
        "tags": (_pairs, f"an object of at most {MAX_TAGS} strings, names not beginning with mlflow. or satune.", False, _PAIRS),
    },
    "tensorboard": {},
    "wandb": {
        "project": (*_TEXT, True, _STRING),
        "name": _ANY,
        "entity": _ANY,
        "tags": (_texts, f"a list of at most {MAX_TAGS} strings of 1 to {MAX_CHARS} characters", False, _TAGS),
    },
}  # fmt: skip


def integrations_schema() -> dict[str, Any]:
    """The field's JSON Schema, from the table that checks it."""
    return {
        "type": ["array", "null"],
        "maxItems": len(TYPES),
        "description": "Trackers that the job's metrics go to as well, each type once.",
        "items": {"anyOf": [_entry_schema(kind) for kind in TYPES]},
        "allOf": [
            {
                "contains": {"properties": {"type": {"const": kind}}},
                "minContains": 0,
                "maxContains": 1,
            }
            for kind in TYPES
        ],
    }


def _entry_schema(kind: str) -> dict[str, Any]:
    fields = _FIELDS[kind]
    needed = [name for name, (_, _, must, _) in fields.items() if must]
    optional = {k: f[3] if f[2] else {"anyOf": [f[3], {"type": "null"}]} for k, f in fields.items()}
    settings: dict[str, Any] = {"type": "object", "properties": optional, "additionalProperties": False}  # fmt: skip
    if needed:
        settings["required"] = needed
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, kind: settings},
        "required": ["type", *([kind] if needed else [])],
        "additionalProperties": False,
    }


class JobIntegration(BaseModel):
    """One tracker and how far it was told: `step` is the last that arrived, null for none yet; `run` its run there.

    `status` is open, done, or failed after it was tried in vain too often; `error` is what went wrong last.
    """

    id: str
    type: str
    settings: dict[str, Any]
    status: str
    step: int | None
    run: str | None
    error: str | None

    @classmethod
    def of(cls, found: Integration) -> "JobIntegration":
        """The tracker as a client sees it."""
        return cls(
            id=found.type,
            type=found.type,
            settings=found.settings,
            status=found.status,
            step=found.step if found.step >= 0 else None,
            run=found.run,
            error=found.error,
        )
