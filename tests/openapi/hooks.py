"""What Schemathesis must know of this API beside its description."""

from __future__ import annotations

import os

import schemathesis

# Refusals of what is well formed.
BEYOND_SCHEMAS = {
    "unknown_model",
    "model_unsupported",
    "dataset_invalid",
    "parts_mismatch",
    "checksum_mismatch",
    "conflicting_parameters",
    "format_not_supported",
    "invalid_cursor",
    "url_not_allowed",
    "webhook_unreachable",
    "file_too_large",
    "idempotency_key_reused",
}


@schemathesis.hook
def before_call(context, case, kwargs):
    """Requests that end at once, and leave the tests their own key."""
    if case.query and "wait" in case.query:
        case.query["wait"] = 0
    form = case.body if case.media_type == "multipart/form-data" else None
    if isinstance(form, dict):
        # In a form all is text, so a file is never of a wrong type; and fields stand before it, where an object has no order.
        files = {n: form[n] for n in ("data", "file") if n in form}
        texts = {n: v if isinstance(v, str | bytes) else str(v) for n, v in files.items()}
        case.body = {n: v for n, v in form.items() if n not in files} | texts
    own = {"api_key_id": os.environ["OWN_KEY_ID"], "project_id": "default"}
    for name, value in own.items():
        if case.method != "GET" and case.path_parameters.get(name) == value:
            case.path_parameters[name] = "none"


@schemathesis.check
def refused_for_what_no_schema_says(context, response, case):
    """A request that the schema allows is refused only for what a schema cannot know."""
    if response.status_code in (400, 413, 415, 422) and case.meta.generation.mode.is_positive:
        error = response.json()["error"]
        assert error["code"] in BEYOND_SCHEMAS, f"{error['code']}: {error['message']}"
