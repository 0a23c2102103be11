"""Small JSON bodies: a pydantic model that refuses what it does not know, read by the same rules as a job's body."""

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from api.errors import ApiError, refuse_unknown
from api.schemas.create import json_object

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """What a client sends; `model_fields_set` says which fields it named."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def read(request: Request, kind: type[B]) -> tuple[B, dict[str, Any]]:
    """The body as `kind`, and as it came. An absent body is an empty one: OpenAI's clients send none."""
    headers = request.headers
    empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    body = {} if empty else await json_object(request)
    return checked(body, kind), body


def checked(body: dict[str, Any], kind: type[B]) -> B:
    """The body as `kind`. Raises ApiError."""
    refuse_unknown(list(body), list(kind.model_fields))
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        got = "" if code.startswith("missing") else f"; got {first['input']!r:.200}"
        raise ApiError(code, f"{param}: {first['msg']}{got}.", param) from error


def described(kind: type[Body], *, required: bool = True) -> dict[str, Any]:
    """OpenAPI's `requestBody` for a body that the route reads itself."""
    schema = kind.model_json_schema()
    return {
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": schema}},
        }
    }
