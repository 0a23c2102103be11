"""The body of a create, checked by hand: strict on names, and every refusal names the field, the value and the fix.

Ranges live in `sat_core.plan.request`, one place for web, command line and scripts; here is only what the service adds:
files, suffix, metadata. The body is read from the request rather than declared to FastAPI, so that a missing key is
answered before a broken body is looked at. The road not taken is a pydantic model beside the core's own dataclasses:
two sets of ranges, and messages that say "extra_forbidden" where the nearest name was wanted.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from api.errors import ApiError, refuse_unknown
from api.schemas.integrations import check_integrations, integrations_schema
from jobs.base import storable
from sat_core.plan.checking import json_schema
from sat_core.plan.request import Hyperparameters, RunRequest, sat_json_schema

MAX_BODY_BYTES = 1 << 20
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
SUFFIX_CHARS, SUFFIX = 64, r"^[A-Za-z0-9._-]+$"
MAX_ID = 64
# What a route may answer that reads settings, and one that reads the whole body.
SETTING_CODES = (
    "invalid_value",
    "missing_required_parameter",
    "unknown_parameter",
    "unsupported_parameter",
    "conflicting_parameters",
    "unknown_model",
    "request_too_large",
)
BODY_CODES = (*SETTING_CODES, "dataset_invalid", "file_not_found", "queue_quota_exceeded")
KEYS = (
    "model",
    "training_file",
    "validation_file",
    "suffix",
    "seed",
    "metadata",
    "method",
    "hyperparameters",
    "integrations",
    "sat",
)


@dataclass(frozen=True, kw_only=True)
class CreateJob:
    """A create whose every value is allowed; whether its files and model exist is the route's question."""

    run: RunRequest
    training_file: str
    validation_file: str | None
    suffix: str | None
    metadata: dict[str, str]
    integrations: tuple[dict[str, Any], ...]
    fingerprint: str


async def json_object(request: Request) -> dict[str, Any]:
    """The request's JSON object; refuses what is too large, and what `json_body` does."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise ApiError("request_too_large", f"The body has more than {MAX_BODY_BYTES} bytes.")
    return json_body(raw)


def json_body(raw: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body is; refuses what is no JSON, no object, or holds odd text."""
    try:
        body = json.loads(raw or b"null", parse_float=_number)
        if not isinstance(body, dict):
            raise ApiError("invalid_request", "The body must be a JSON object.")
        _refuse_unstorable(body)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_request", f"The body is not valid JSON: {error}.") from error
    return body


def _refuse_unstorable(value: Any, place: str = "") -> None:
    """Refuse text that neither PostgreSQL nor an answer can hold; `place` names the value."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_unstorable(name, place)
            _refuse_unstorable(item, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_unstorable(item, f"{place}.{number}")
    elif isinstance(value, str) and storable(value) != value:
        raise ApiError(
            "invalid_value",
            f"{place or 'The body'} holds {value!r:.100}; allowed is text without NUL and halves of surrogate pairs.",
            place or None,
        )


def _number(text: str) -> int | float:
    """JSON knows numbers only: 3.0 is the integer 3."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def check(body: dict[str, Any]) -> CreateJob:
    """The body as a CreateJob; raises ApiError or ConfigError at the first value that is not allowed."""
    refuse_unknown(list(body), KEYS)
    for name in ("model", "training_file"):
        if body.get(name) is None:
            raise ApiError("missing_required_parameter", f"{name} is missing.", name)
    named = ("model", "seed", "method", "hyperparameters", "sat")
    run = RunRequest.from_dict({name: body[name] for name in named if body.get(name) is not None})
    return CreateJob(
        run=run,
        training_file=_text(body, "training_file", MAX_ID) or "",
        validation_file=_text(body, "validation_file", MAX_ID),
        suffix=_suffix(body),
        metadata=_metadata(body.get("metadata")),
        integrations=check_integrations(body.get("integrations")),
        fingerprint=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
    )


def _text(body: dict[str, Any], name: str, limit: int) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= limit:
        raise ApiError(
            "invalid_value",
            f"{name} is {value!r}; allowed is a string of 1 to {limit} characters.",
            name,
        )
    return value


def _suffix(body: dict[str, Any]) -> str | None:
    suffix = _text(body, "suffix", SUFFIX_CHARS)
    if suffix is not None and not re.fullmatch(SUFFIX, suffix):
        raise ApiError(
            "invalid_value",
            f"suffix is {suffix!r}; allowed are letters, digits, dash, underscore and dot.",
            "suffix",
        )
    return suffix


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    good = (
        isinstance(value, dict)
        and len(value) <= MAX_METADATA
        and all(
            isinstance(item, str)
            and len(item) <= MAX_METADATA_VALUE
            and 1 <= len(name) <= MAX_METADATA_KEY
            for name, item in value.items()
        )
    )
    if not good:
        raise ApiError(
            "invalid_value",
            f"metadata is {value!r}; allowed is an object of at most {MAX_METADATA} strings, "
            f"names up to {MAX_METADATA_KEY} characters, values up to {MAX_METADATA_VALUE}.",
            "metadata",
        )
    return dict(value)


def openapi_body() -> dict[str, Any]:
    """The request body for OpenAPI, the `sat` part made from the fields that check it."""
    hyper = json_schema(Hyperparameters)
    method = {
        "type": "object",
        "description": "How to train, in OpenAI's words.",
        "properties": {
            "type": {"const": "supervised"},
            "supervised": {
                "type": "object",
                "properties": {"hyperparameters": hyper},
                "additionalProperties": False,
            },
            "dpo": {"type": "null"},
            "reinforcement": {"type": "null"},
        },
        "additionalProperties": False,
    }
    properties = {
        "model": {
            "type": "string",
            "minLength": 1,
            "description": "What to start from: local/NAME, ORG/NAME of the hub, a result or a checkpoint.",
        },
        "training_file": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_ID,
            "description": "Id of a file.",
        },
        "validation_file": {
            "type": ["string", "null"],
            "minLength": 1,
            "maxLength": MAX_ID,
            "description": "Id of a file that is held out.",
        },
        "suffix": {
            "type": ["string", "null"],
            "pattern": SUFFIX,
            "maxLength": SUFFIX_CHARS,
            "description": "Part of the result's name.",
        },
        "seed": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": 2**31 - 1,
            "description": "Decides all that is random in a run.",
        },
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": MAX_METADATA,
            "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_KEY},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
            "description": "Words of your own; lists of jobs can be filtered by them.",
        },
        "method": method,
        "hyperparameters": hyper
        | {"deprecated": True, "description": "The same in an older place; auto is resolved."},
        "integrations": integrations_schema(),
        "sat": sat_json_schema(),
    }
    schema = {
        "type": "object",
        "required": ["model", "training_file"],
        "properties": properties,
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
