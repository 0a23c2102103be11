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
    if isinstance(case.body, dict) and "file" in case.body:
        # The fields of a form stand before its file, and an object has no order.
        case.body["file"] = case.body.pop("file")
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
