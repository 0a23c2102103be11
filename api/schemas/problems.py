"""The error body as OpenAPI shows it; `api.errors` makes the bytes."""

from typing import Any

from pydantic import BaseModel

from api.errors import ERRORS


class ErrorDetail(BaseModel):
    """What OpenAI's clients lift out of the body; `problems` name places inside the input."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str
    problems: list[dict[str, Any]] | None = None


class ErrorResponse(BaseModel):
    """Every answer that is not a success; the outer keys are RFC 9457's."""

    error: ErrorDetail
    type: str
    title: str
    status: int
    detail: str
    instance: str


# What any route may answer, and what any that asks for a key.
OPEN = ("invalid_host", "invalid_request", "internal_error")
ALWAYS = (
    "invalid_api_key",
    "insufficient_scope",
    "project_mismatch",
    "cross_site_request",
    "rate_limited",
    "not_ready",
    *OPEN,
)
# Of a route that answers 304 to `If-None-Match`.
UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "Nothing has changed since the answer with this ETag."}
}


def answers(*codes: str, always: tuple[str, ...] = ALWAYS) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for a route that may answer with these codes, beside those it `always` may."""
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys((*codes, *always)):
        by_status.setdefault(ERRORS[code].status, []).append(code)
    return {
        status: {
            "model": ErrorResponse,
            "description": "; ".join(ERRORS[code].title for code in found),
            "x-error-codes": found,
            "content": {
                "application/json": {
                    "examples": {code: {"$ref": f"#/components/examples/{code}"} for code in found}
                }
            },
        }
        for status, found in sorted(by_status.items())
    }
