"""The description of the API, made whole: FastAPI says what stands in the routes, this adds what they cannot say.

The same few parameters, errors and objects return everywhere, so each is explained and exemplified once, here or in
`schemas/examples.json`, and joined to every operation that has it. The examples are answers of a real service. The road
not taken is a description written by hand beside the code: it would be wrong within a week.
"""

import json
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.errors import ERRORS, ApiError, error_body

TAGS = {
    "files": "Data sets: uploaded whole, checked row by row, and shown as a model sees them.",
    "uploads": "Data sets in parts, for files that are large or connections that break.",
    "fine-tuning": "Jobs: what they will take, their life, what they tell, and what became of them.",
    "exports": "Models in the form in which a person takes them home.",
    "models": "Base models of this machine, and the results of jobs.",
    "chat": "A few words with a model, to try it.",
    "sat": "What may be asked of Sparsity-Accelerated Training, and what a ladder would do.",
    "integrations": "Trackers of experiments that metrics go to as well, and the secrets that workers sign in with.",
    "queue": "What waits, what runs, what is free.",
    "limits": "What this project may have at once.",
    "webhooks": "Other programs that are told of events.",
    "organization": "Projects, service accounts, keys, limits and the audit log, for keys with scope admin.",
    "health": "What may be asked without a key.",
}
# Of parameters that say nothing of themselves.
PARAMETERS = {
    "file_id": "Id of a file, `file-...`.",
    "upload_id": "Id of an upload, `upload_...`.",
    "job_id": "Id of a job, `ftjob-...`.",
    "checkpoint_id": "Id of a checkpoint, `ftckpt_...`.",
    "export_id": "Id of an export.",
    "estimate_id": "Id of an estimate.",
    "model": "Name of a model: `local/NAME`, or `ft:...` of a result or a checkpoint.",
    "project_id": "Id of a project.",
    "service_account_id": "Id of a service account.",
    "api_key_id": "Id of an API key, which is not its secret.",
    "webhook_endpoint_id": "Id of a webhook endpoint.",
    "delivery_id": "Id of a delivery.",
    "limit": "At most so many items.",
    "purpose": "Only files of this purpose.",
    "status": "Only those with this status.",
    "rows": "At most so many rows.",
    "include_archived": "Archived projects too.",
    "project_ids[]": "Only of these projects.",
    "event_types[]": "Only of these kinds.",
    "resource_ids[]": "Only on these things.",
    "range": "One range of bytes, as in `bytes=1000-`.",
    "if-none-match": "ETag of the answer that is known: 304 while it holds.",
    "idempotency-key": "Any text of the client's own. The same request with the same key is done once, and answered alike.",
}
REQUEST_ID = {
    "description": "Id of this request, as the service's log knows it.",
    "schema": {"type": "string"},
}
_LIST = "ListOf_"


def describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1 of all routes: every operation with its parameters, errors and examples."""
    schema = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version=app.openapi_version,
        description=app.description,
        routes=app.routes,
        license_info=app.license_info,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    components = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    told = json.loads((files("api.schemas") / "examples.json").read_text("utf-8"))
    components["headers"] = {"RequestId": REQUEST_ID}
    components["examples"] = {
        **{name: {"value": value} for name, value in told["objects"].items()},
        **{code: _error_example(code) for code in ERRORS},
    }
    for operations in schema["paths"].values():
        for operation in operations.values():
            _complete(operation, told, components["schemas"])
    _link(schema["paths"])
    return schema


def _complete(operation: dict[str, Any], told: dict[str, Any], schemas: dict[str, Any]) -> None:
    answers = operation["responses"]
    if "x-error-codes" not in answers.get("422", {"x-error-codes": []}):
        del answers["422"]  # FastAPI's own; ours is a 400, and says so
    for answer in answers.values():
        answer["headers"] = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
    for parameter in operation.get("parameters", ()):
        _complete_parameter(parameter)
    texts = told["texts"].get(operation["operationId"], {})
    for kind, media in answers["200"].get("content", {}).items():
        if kind in texts:
            media["example"] = texts[kind]
        else:
            _exemplify(media, told["objects"])
    for media in operation.get("requestBody", {}).get("content", {}).values():
        media["schema"] = _hoisted(media["schema"], schemas)
        requests = told["requests"].get(operation["operationId"], {})
        media.setdefault("examples", {name: {"value": v} for name, v in requests.items()})


def _complete_parameter(parameter: dict[str, Any]) -> None:
    parameter.setdefault("description", PARAMETERS.get(parameter["name"], ""))
    schema = parameter["schema"]
    if {"type": "null"} in schema.get("anyOf", ()):
        # Absent, not null: neither a path, a query nor a header can hold one.
        kinds = [kind for kind in schema.pop("anyOf") if kind != {"type": "null"}]
        parameter["schema"] = {**schema, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}


def _exemplify(media: dict[str, Any], objects: dict[str, Any]) -> None:
    name = media.get("schema", {}).get("$ref", "").rpartition("/")[2]
    item = name.removeprefix(_LIST).removesuffix("_")
    if name in objects:
        media["examples"] = {name: {"$ref": f"#/components/examples/{name}"}}
    elif name.startswith(_LIST) and item in objects:
        one = objects[item]
        page = {"object": "list", "data": [one], "has_more": False}
        media["example"] = page | {"first_id": one["id"], "last_id": one["id"]}


def _hoisted(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema with the definitions it brought along moved to where the document looks for them."""
    moved: dict[str, Any] = json.loads(
        json.dumps(schema).replace('"#/$defs/', '"#/components/schemas/')
    )
    schemas.update(moved.pop("$defs", {}))
    return moved


def _error_example(code: str) -> dict[str, Any]:
    title = ERRORS[code].title
    return {
        "summary": title,
        "value": error_body(ApiError(code, f"{title}."), "req_8d6f1c0b2a9e4f7755d3c1aa"),
    }


def _link(paths: dict[str, Any]) -> None:
    """Say of every create which operations take the id that it answers with."""
    for path, operations in paths.items():
        below = [p for p in paths if p.startswith(path + "/{")]
        if "post" not in operations or not below:
            continue
        name = below[0][len(path) + 2 :].partition("}")[0]
        operations["post"]["responses"]["200"]["links"] = {
            operation["operationId"]: {
                "operationId": operation["operationId"],
                "parameters": {name: "$response.body#/id"},
            }
            for p in below
            if p.startswith(f"{path}/{{{name}}}")
            for operation in paths[p].values()
        }
