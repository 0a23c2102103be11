"""Who asks: a bearer key on `/v1`, a signed session cookie on the dashboard. A router without either is a mistake.

The cookie holds a project's name, signed, and never the key. It is HttpOnly and SameSite=Strict, and pages of other
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
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from itsdangerous import BadSignature, URLSafeTimedSerializer

from api.deps import App, Services
from api.errors import ApiError
from jobs.spec import Key

SESSION_SECONDS = 30 * 24 * 3600

_bearer = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key of this service."
)


def require_key(
    app: App, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Key:
    """The key in the Authorization header, or 401."""
    key = app.store.authenticate(given.credentials) if given else None
    if key is None:
        what = "This API key is not valid." if given else "No API key was given."
        raise ApiError(
            "invalid_api_key",
            f"{what} Send 'Authorization: Bearer KEY'; `satune up` prints the key and keeps it in connection.json.",
        )
    return key


class SignInNeededError(Exception):
    """A page was asked for without a session: answered with the sign-in page and 401."""


def require_session(request: Request, app: App) -> str:
    """The project of the session cookie."""
    token = request.cookies.get(cookie_name(app), "")
    try:
        project = _signer(app).loads(token, max_age=SESSION_SECONDS)
    except BadSignature as error:
        raise SignInNeededError from error
    return str(project)


def start_session(response: Response, app: Services, key: Key) -> None:
    """Set the session cookie for the key's project."""
    response.set_cookie(
        cookie_name(app),
        _signer(app).dumps(key.project),
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


Caller = Annotated[Key, Depends(require_key)]
Viewer = Annotated[str, Depends(require_session)]
