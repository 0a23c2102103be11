"""Who asks: a bearer key on `/v1`, a signed session cookie on the dashboard. A router without either is a mistake.

The router asks for the key (`require_key`), its routes take what was found (`Caller`): FastAPI solves a dependency's own
dependencies anew wherever it is named, even where its answer is known.

The cookie holds a key's id, signed, and never its secret; it ends with the key. It is HttpOnly and SameSite=Strict, and pages of other
sites are refused before that (`api.gate`). The road not taken is to accept the cookie on `/v1`: then a link could act.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from itsdangerous import BadSignature, URLSafeTimedSerializer

from api.deps import App, Services, services
from api.errors import ApiError
from jobs.audit import acting
from jobs.spec import Key
from jobs.tenants import ADMIN

SESSION_SECONDS = 30 * 24 * 3600

_bearer = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key of this service."
)


# Path, scope to read, scope to write; the longest path that fits counts, and what is not named needs `admin`.
SCOPES: tuple[tuple[str, str | None, str], ...] = (
    ("/v1/files", "files", "files"),
    ("/v1/uploads", "files", "files"),
    ("/v1/fine_tuning", "jobs:read", "jobs:write"),
    ("/v1/fine_tuning/estimates", "jobs:read", "jobs:read"),
    ("/v1/exports", "models", "models"),
    ("/v1/models", "models", "models"),
    ("/v1/chat", "inference", "inference"),
    ("/v1/sat", "jobs:read", "jobs:read"),
    ("/v1/sat/limits", None, ADMIN),
    ("/v1/sat/secrets", "jobs:read", "jobs:write"),
    ("/v1/webhook_endpoints", "jobs:read", "jobs:write"),
    ("/v1/webhook_event_types", None, ADMIN),
)
READING = frozenset({"GET", "HEAD"})


def scope_of(method: str, path: str) -> str | None:
    """The scope that a request needs; None where any key will do."""
    fitting = [entry for entry in SCOPES if f"{path}/".startswith(f"{entry[0]}/")]
    if not fitting:
        return ADMIN
    _, read, write = max(fitting, key=lambda entry: len(entry[0]))
    return read if method in READING else write


async def require_key(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    """Let in whose key in the Authorization header may do what is asked; else 401, 403 or 429."""
    app = services(request)
    key = await app.together.ask(app.store.authenticate, given.credentials) if given else None
    if key is None:
        what = "This API key is not valid." if given else "No API key was given."
        raise ApiError(
            "invalid_api_key",
            f"{what} Send 'Authorization: Bearer KEY'; `satune up` prints the key and keeps it in connection.json.",
        )
    try:
        if key.requests_per_minute is not None:
            request.state.rate_headers = await run_in_threadpool(app.limiter.count, key)
    except ApiError as refused:
        if not _creates(request):
            raise
        # `api.once` answers with it, once it knows what was refused.
        request.state.refused = refused
    project = request.headers.get("openai-project")
    if project is not None and project != key.project:
        raise ApiError(
            "project_mismatch",
            f"The header OpenAI-Project says {project!r}, but this key belongs to {key.project!r}.",
            "OpenAI-Project",
        )
    need(key, scope_of(request.method, request.url.path))
    _acts(request, "api_key", key)
    request.state.key = key


async def _caller(request: Request) -> Key:
    found = request.state.key
    assert isinstance(found, Key)  # noqa: S101 - set by what every router asks for
    return found


def _creates(request: Request) -> bool:
    dependant = getattr(request.scope.get("route"), "dependant", None)
    needed = dependant.dependencies if dependant is not None else ()
    return any(getattr(needs.call, "creates", False) for needs in needed)


def may(key: Key, scope: str) -> bool:
    """Whether a key has a scope."""
    return scope in key.scopes or ADMIN in key.scopes


def need(key: Key, scope: str | None) -> None:
    """Refuse a key that lacks a scope; None is none. Raises ApiError."""
    if scope is None or may(key, scope):
        return
    has = ", ".join(sorted(key.scopes)) or "none"
    raise ApiError(
        "insufficient_scope", f"This needs a key with scope {scope}; this one has: {has}."
    )


def _acts(request: Request, kind: str, key: Key) -> None:
    """Say who acts, for the audit rows of what this request changes."""
    actor = acting.get()
    if actor is not None:
        actor.kind, actor.key_id = kind, key.id
        actor.operation = getattr(request.scope.get("route"), "operation_id", None) or ""


class SignInNeededError(Exception):
    """A page was asked for without a session: answered with the sign-in page and 401."""


def require_session(request: Request, app: App) -> str:
    """The project of the session, which lives no longer and may do no more than the key it was begun with."""
    token = request.cookies.get(cookie_name(app), "")
    try:
        key_id = _signer(app).loads(token, max_age=SESSION_SECONDS)
    except BadSignature as error:
        raise SignInNeededError from error
    key = app.store.key_of_session(str(key_id))
    if key is None:
        raise SignInNeededError
    need(key, "jobs:read" if request.method in READING else "jobs:write")
    _acts(request, "session", key)
    request.state.key = key
    return key.project


def start_session(response: Response, app: Services, key: Key) -> None:
    """Set the session cookie of a key."""
    response.set_cookie(
        cookie_name(app),
        _signer(app).dumps(key.id),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        path="/",
    )


def cookie_name(app: Services) -> str:
    """Different for each service: browsers share cookies between the ports of a host, and services on it are many."""
    return "satune_session_" + hashlib.sha256(app.session_secret.encode()).hexdigest()[:8]


def session_secret(data_dir: Path) -> str:
    """The secret that signs cookies, made once and kept in the data folder with mode 0600."""
    path = data_dir / "session-secret"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        # Written aside and linked into place: whoever comes second finds a whole secret, never an empty file.
        handle, aside = tempfile.mkstemp(dir=data_dir)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        os.unlink(aside)
    return path.read_text()


def _signer(app: Services) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(app.session_secret, salt="satune-session")


Caller = Annotated[Key, Depends(_caller)]
Viewer = Annotated[str, Depends(require_session)]
