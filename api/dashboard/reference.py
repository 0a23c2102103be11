"""The reference at `/docs`: the description of the API as a page, open to all as the description is.

Made by templates of our own. Swagger UI and its like were not taken: from a CDN they are nothing where there is no network,
vendored they are megabytes of script, and both want styles and scripts inline, which the pages of this service forbid.
"""

import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from api.auth import scope_of
from api.dashboard.rendering import render
from api.errors import ERRORS

reference = APIRouter(include_in_schema=False)

Schema = dict[str, Any]
MAX_DEPTH = 5
_LIST = "ListOf_"
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "maxLength": "up to {} characters",
    "maxItems": "up to {} items",
}


@reference.get("/docs")
def reference_page(request: Request) -> HTMLResponse:
    """Every operation by its noun, and the objects that they answer with."""
    described = request.app.openapi()
    operations = [
        _operation(method, path, operation, described)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    groups = [
        {**tag, "operations": [o for o in operations if o["tag"] == tag["name"]]}
        for tag in described["tags"]
    ]
    examples = described["components"]["examples"]
    shown = {name for operation in operations for name in operation["objects"]}
    objects = [
        {
            "name": name,
            "description": schema.get("description", ""),
            # Of an answer every field is there.
            "fields": [{**row, "required": False} for row in fields(schema, described)],
            "example": _text(examples[name]["value"]) if name in examples else None,
        }
        for name, schema in described["components"]["schemas"].items()
        if name in shown
    ]
    return render(request, "reference.html", groups=groups, objects=objects, errors=ERRORS)


def _operation(method: str, path: str, operation: Schema, described: Schema) -> dict[str, Any]:
    answers = [
        {"status": status, "kind": kind, "name": _object(media), "example": media.get("example")}
        for status, answer in operation["responses"].items()
        if status < "3"
        for kind, media in answer.get("content", {}).items()
    ]
    return {
        "id": operation["operationId"],
        "tag": operation["tags"][0],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "description": operation.get("description", ""),
        "scope": scope_of(method.upper(), path) if "security" in operation else None,
        "parameters": [
            {
                **_row(p["name"], p["schema"], described, required=p.get("required", False)),
                "description": p["description"],
                "where": p["in"],
            }
            for p in operation.get("parameters", ())
        ],
        "bodies": [
            {
                "kind": kind,
                "fields": list(fields(media["schema"], described)),
                "examples": [(n, _text(e["value"])) for n, e in media["examples"].items()],
            }
            for kind, media in operation.get("requestBody", {}).get("content", {}).items()
        ],
        "answers": [a for a in answers if a["kind"] != "application/json" or a["name"]],
        "objects": {a["name"].removeprefix(_LIST).removesuffix("_") for a in answers if a["name"]},
        "errors": [
            code
            for answer in operation["responses"].values()
            for code in answer.get("x-error-codes", ())
        ],
    }


def fields(
    schema: Schema, described: Schema, path: str = "", depth: int = 0
) -> Iterator[dict[str, Any]]:
    """What an object may hold, at any depth, by dotted names."""
    found = _resolved(schema, described)
    for name, item in found.get("properties", {}).items():
        inner = _inner(item, described)
        yield _row(path + name, item, described, required=name in found.get("required", ()))
        if "properties" in inner and depth < MAX_DEPTH:
            several = "[]" if "items" in _some(item, described) else ""
            yield from fields(inner, described, f"{path}{name}{several}.", depth + 1)


def _row(name: str, schema: Schema, described: Schema, *, required: bool) -> dict[str, Any]:
    default = schema.get("default")
    return {
        "name": name,
        "kind": kind_of(schema, described),
        "required": required,
        "description": schema.get("description") or "",
        "default": "" if default in (None, [], {}, schema.get("const")) else json.dumps(default),
        "where": "",
    }


def kind_of(schema: Schema, described: Schema) -> str:
    """What a value may be, in words."""
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind_of(s, described) for s in schema["anyOf"]))
    if "$ref" in schema:
        return kind_of(_resolved(schema, described), described)
    kinds = schema.get("type", "any")
    words = " or ".join(kinds) if isinstance(kinds, list) else str(kinds)
    if "items" in schema:
        words = words.replace("array", f"list of {kind_of(schema['items'], described)}")
    bounds = [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return ", ".join([words, *bounds])


def _some(schema: Schema, described: Schema) -> Schema:
    """The kind of value that is not null."""
    choices = [s for s in schema.get("anyOf", ()) if s != {"type": "null"}] or [schema]
    return _resolved(choices[0], described)


def _inner(schema: Schema, described: Schema) -> Schema:
    """The object that a field, or each item of its list, is."""
    some = _some(schema, described)
    return _some(some["items"], described) if isinstance(some.get("items"), dict) else some


def _resolved(schema: Schema, described: Schema) -> Schema:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Schema = described["components"]["schemas"][name] if name else schema
    return found


def _object(media: Schema) -> str:
    name: str = media.get("schema", {}).get("$ref", "").rpartition("/")[2]
    return name


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
