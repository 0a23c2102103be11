"""How a page is made: templates in the reader's theme, and static files that may be cached for ever."""

import functools
import hashlib
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.types import Scope

from api.auth import cookie_name, may
from api.dashboard.words import FILTERS
from api.deps import services
from api.routes.health import release
from jobs.states import TERMINAL, Status

HERE = Path(__file__).parent
THEMES = ("light", "dark")


@functools.cache
def templates() -> Environment:
    """The templates; an undefined name is an error, all output is escaped."""
    found = Environment(
        loader=PackageLoader("api.dashboard"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= FILTERS
    found.globals |= {
        "asset": asset,
        "release": release(),
        "terminal": TERMINAL,
        "statuses": tuple(Status),
    }
    return found


@functools.cache
def asset(name: str) -> str:
    """The address of a static file with a hash of its bytes, so that it may be cached for ever."""
    digest = hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"


class Assets(StaticFiles):
    """Static files; those asked for by hash never change."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, to be kept for a year where its address holds its hash."""
        response = await super().get_response(path, scope)
        fixed = b"v=" in scope["query_string"]
        response.headers["cache-control"] = (
            "public, max-age=31536000, immutable" if fixed else "no-cache"
        )
        return response


def render(request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A template as an answer, in the theme that the reader chose."""
    theme = request.cookies.get("satune_theme")
    key = getattr(request.state, "key", None)
    html = (
        templates()
        .get_template(name)
        .render(
            theme=theme if theme in THEMES else None,
            signed_in=status != 401 and cookie_name(services(request)) in request.cookies,
            path=request.url.path,
            may_write=key is not None and may(key, "jobs:write"),
            **values,
        )
    )
    return HTMLResponse(html, status_code=status, headers={"cache-control": "no-store"})


def missing(request: Request, message: str) -> HTMLResponse:
    """The page that says what is not there."""
    return render(request, "missing.html", status=404, title="Not found", message=message)
