"""One table of error codes and one body for every answer that is not a success.

The body is read by two kinds of client at once: OpenAI's lift `error` out of it (and version 3 shows nothing but
`error.message`, so the message alone holds the fix), readers of RFC 9457 take `type`, `title`, `status`, `detail` and
`instance` beside it. The rooms below raise their own exceptions; which status each becomes is decided here and nowhere
else. The road not taken is FastAPI's `{"detail": ...}`, which reaches OpenAI's users as a bare status number.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from jobs import errors as store_errors
from sat_core.plan.errors import PlanError

log = logging.getLogger(__name__)

RETRY_NOT = "x-should-retry"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True)
class ErrorSpec:
    """What a code means on the wire."""

    status: int
    title: str
    kind: str = "invalid_request_error"


ERRORS: dict[str, ErrorSpec] = {
    "invalid_request": ErrorSpec(400, "The request cannot be understood"),
    "invalid_value": ErrorSpec(400, "A value is not allowed"),
    "missing_required_parameter": ErrorSpec(400, "A required parameter is missing"),
    "unknown_parameter": ErrorSpec(400, "A parameter is not known"),
    "unsupported_parameter": ErrorSpec(400, "A parameter is not supported"),
    "conflicting_parameters": ErrorSpec(400, "Parameters contradict each other"),
    "unknown_model": ErrorSpec(400, "The model does not exist"),
    "context_length_exceeded": ErrorSpec(400, "The model's context is too short for this"),
    "format_not_supported": ErrorSpec(400, "The model cannot be written in that format"),
    "model_unsupported": ErrorSpec(400, "The model cannot be trained"),
    "dataset_invalid": ErrorSpec(400, "The data set is not usable"),
    "unsupported_purpose": ErrorSpec(400, "The purpose is not supported"),
    "parts_mismatch": ErrorSpec(400, "The parts do not make the file that was announced"),
    "checksum_mismatch": ErrorSpec(400, "The bytes are not those that were sent"),
    "invalid_cursor": ErrorSpec(400, "The cursor names nothing in this list"),
    "url_not_allowed": ErrorSpec(400, "Webhooks are not sent there"),
    "webhook_unreachable": ErrorSpec(400, "The webhook's receiver did not answer"),
    "invalid_host": ErrorSpec(400, "The host name is not served here"),
    "invalid_api_key": ErrorSpec(
        401, "The API key is missing or not valid", "authentication_error"
    ),
    "insufficient_scope": ErrorSpec(
        403, "The API key lacks a scope that this needs", "permission_error"
    ),
    "project_mismatch": ErrorSpec(
        403, "The API key belongs to another project", "permission_error"
    ),
    "cross_site_request": ErrorSpec(403, "The request comes from another site", "permission_error"),
    "not_found": ErrorSpec(404, "No such path"),
    "job_not_found": ErrorSpec(404, "No such job"),
    "file_not_found": ErrorSpec(404, "No such file"),
    "upload_not_found": ErrorSpec(404, "No such upload"),
    "estimate_not_found": ErrorSpec(404, "No such estimate"),
    "secret_not_found": ErrorSpec(404, "No such secret"),
    "model_not_found": ErrorSpec(404, "No such model"),
    "project_not_found": ErrorSpec(404, "No such project"),
    "service_account_not_found": ErrorSpec(404, "No such service account"),
    "api_key_not_found": ErrorSpec(404, "No such API key"),
    "webhook_endpoint_not_found": ErrorSpec(404, "No such webhook endpoint"),
    "webhook_delivery_not_found": ErrorSpec(404, "No such webhook delivery"),
    "checkpoint_not_found": ErrorSpec(404, "No such checkpoint"),
    "export_not_found": ErrorSpec(404, "No such export"),
    "method_not_allowed": ErrorSpec(405, "The method is not allowed here"),
    "job_terminal": ErrorSpec(409, "The job has already ended"),
    "job_not_pausable": ErrorSpec(409, "The job cannot be paused or resumed now"),
    "file_in_use": ErrorSpec(409, "Jobs still need the file"),
    "model_in_use": ErrorSpec(409, "Jobs start from the model"),
    "model_not_deletable": ErrorSpec(409, "The model cannot be deleted here"),
    "last_admin_key": ErrorSpec(409, "A lasting key with scope admin must remain"),
    "project_not_archivable": ErrorSpec(409, "The project must stay"),
    "upload_closed": ErrorSpec(409, "The upload has ended"),
    "idempotency_in_progress": ErrorSpec(409, "The same request is still being answered"),
    "not_finished": ErrorSpec(409, "The job has not ended"),
    "export_not_ready": ErrorSpec(409, "The export is not finished"),
    "result_not_ready": ErrorSpec(409, "The job has no result"),
    "file_too_large": ErrorSpec(413, "The file is too large"),
    "request_too_large": ErrorSpec(413, "The request is too large"),
    "unsupported_media_type": ErrorSpec(415, "The content type is not supported"),
    "range_not_satisfiable": ErrorSpec(416, "The range lies outside the file"),
    "idempotency_key_reused": ErrorSpec(422, "The idempotency key was used with another body"),
    "rate_limited": ErrorSpec(429, "Too many requests", "rate_limit_error"),
    "too_many_streams": ErrorSpec(429, "Too many streams are open", "rate_limit_error"),
    "queue_quota_exceeded": ErrorSpec(429, "Too many jobs wait", "rate_limit_error"),
    "storage_quota_exceeded": ErrorSpec(429, "The storage is full", "rate_limit_error"),
    "internal_error": ErrorSpec(500, "The service has failed", "server_error"),
    "not_ready": ErrorSpec(503, "The service is not ready", "server_error"),
    "model_loading": ErrorSpec(503, "The model is being loaded", "server_error"),
    "gpu_busy": ErrorSpec(503, "No slot is free for the model", "server_error"),
}

# Codes of the framework's own answers, by status.
_BY_STATUS = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
}

_QUOTA_CODES = {
    "queued_jobs": "queue_quota_exceeded",
    "storage_bytes": "storage_quota_exceeded",
}


class ApiError(Exception):
    """An answer from the table; `problems` are places inside the input, `headers` join the answer."""

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        *,
        problems: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message, param)
        self.code, self.message, self.param = code, message, param
        self.problems, self.headers = tuple(problems), dict(headers or {})


def refuse_unknown(given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first name that is not known, with the nearest one that is: a typo must not cost a GPU-day."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            allowed = f" Allowed here: {', '.join(known)}."
            raise ApiError(
                "unknown_parameter", f"{name!r} is not a known parameter.{hint}{allowed}", name
            )


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """The one body, for OpenAI's clients and for RFC 9457 alike."""
    spec = ERRORS[error.code]
    inner: dict[str, Any] = {
        "message": error.message,
        "type": spec.kind,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }
    if error.problems:
        inner["problems"] = list(error.problems)
    return {
        "error": inner,
        "type": f"urn:satune:error:{error.code}",
        "title": spec.title,
        "status": spec.status,
        "detail": error.message,
        "instance": request_id,
    }


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The answer; a conflict says that trying again is useless, since OpenAI's clients retry 409 by default."""
    status = ERRORS[error.code].status
    headers = {"x-request-id": request_id, **error.headers}
    if status == 409 and error.code != "idempotency_in_progress":
        headers[RETRY_NOT] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error, request_id), status_code=status, headers=headers)


def request_id_of(request: Request) -> str:
    """The id that the gate gave this request."""
    return str(getattr(request.state, "request_id", ""))


def translate(error: Exception) -> ApiError:
    """The table's answer to an exception of the rooms below."""
    match error:
        case ApiError():
            return error
        case PlanError():
            code = error.code if error.code in ERRORS else "invalid_value"
            return ApiError(code, error.message, error.param)
        case store_errors.NotFound():
            code = f"{error.kind}_not_found"
            return ApiError(code if code in ERRORS else "not_found", f"{error}.")
        case store_errors.InvalidCursor():
            return ApiError("invalid_cursor", str(error), "after")
        case store_errors.InvalidModelName():
            return ApiError("unknown_model", str(error), "model")
        case store_errors.FileInUse():
            return ApiError("file_in_use", str(error), "file_id")
        case store_errors.ModelInUse():
            return ApiError("model_in_use", str(error), "model")
        case store_errors.IdempotencyMismatch():
            return ApiError("idempotency_key_reused", str(error), "Idempotency-Key")
        case store_errors.InProgress():
            return ApiError(
                "idempotency_in_progress",
                f"{error}; send it again in a moment.",
                headers={"retry-after": "1"},
            )
        case store_errors.QuotaExceeded():
            # Nobody knows when there is room again, so clients are told not to wait for it.
            return ApiError(
                _QUOTA_CODES[error.quota],
                f"{error}.",
                headers={"retry-after": "600", RETRY_NOT: "false"},
            )
        case store_errors.UploadClosed():
            return ApiError("upload_closed", f"{error}.")
        case store_errors.PartsMismatch():
            return ApiError("parts_mismatch", f"{error}.", "part_ids")
        case store_errors.LastAdminKey():
            return ApiError("last_admin_key", f"{error}.")
        case store_errors.NotArchivable():
            return ApiError("project_not_archivable", f"{error}.")
        case store_errors.JobTerminal():
            return ApiError("job_terminal", str(error))
        case store_errors.JobNotPausable():
            return ApiError("job_not_pausable", str(error))
        case store_errors.StoreUnavailable():
            return ApiError("not_ready", "The database does not answer; try again in a moment.")
        case _:
            return ApiError(
                "internal_error",
                "The service has failed; its log holds the reason under this request id.",
            )


def _from_framework(error: HTTPException, request: Request) -> ApiError:
    code = _BY_STATUS.get(
        error.status_code, "internal_error" if error.status_code >= 500 else "invalid_request"
    )
    message = str(error.detail)
    if code == "not_found":
        path = request.url.path
        message = f"Nothing is served at {path}."
        if path.startswith(("/files", "/fine_tuning", "/models")):
            message += " A client's base_url must end in /v1."
    elif code == "method_not_allowed":
        allowed = ", ".join(_methods_at(request))
        message = f"{request.method} is not allowed at {request.url.path}; allowed: {allowed}."
        return ApiError(code, message, headers={"allow": allowed})
    return ApiError(code, message, headers=error.headers)


def _methods_at(request: Request) -> list[str]:
    """All methods of a path; the framework's own answer names those of the first route that it met."""
    return [
        method
        for method in METHODS
        if any(
            route.matches({**request.scope, "method": method.replace("HEAD", "GET")})[0]
            is Match.FULL
            for route in request.app.routes
        )
    ]


def _from_validation(error: RequestValidationError) -> ApiError:
    problems = [
        {
            "pointer": "/" + "/".join(str(part) for part in item["loc"]),
            "code": str(item["type"]),
            "message": str(item["msg"]),
        }
        for item in error.errors()
    ]
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"{param or 'The request'}: {first['msg']}; got {first.get('input')!r}."
    return ApiError(code, message, param, problems=problems)


def install(app: FastAPI) -> None:
    """Answer every exception with the one body."""

    def known(request: Request, error: Exception) -> JSONResponse:
        found = translate(error)
        if found.code == "internal_error":
            log.error("%s failed", request_id_of(request), exc_info=error)
        return error_response(found, request_id_of(request))

    def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
        return error_response(_from_framework(error, request), request_id_of(request))

    def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
        return error_response(_from_validation(error), request_id_of(request))

    for kind in (ApiError, PlanError, store_errors.JobsError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, validation)
