"""What happens to every request before any route sees it: an id, the host, the origin, and safe headers.

A service on loopback is still reachable from a person's browser, so any page they open could speak to it: by a DNS name
that resolves to 127.0.0.1 (hence the host check) or by a form that posts across sites (hence the origin check). The
road not taken is Starlette's TrustedHostMiddleware, whose answer is plain text and would be the one error in another
shape than all others.
"""

import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, error_response
from jobs.audit import Actor, acting

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# No inline script, no inline style, nothing from elsewhere: the dashboard works where there is no network.
CSP = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
SECURITY_HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    # Not no-referrer: under that, browsers send "Origin: null" with our own forms too.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """ASGI middleware; `allowed_hosts` are host names without ports, "*" lets every host in."""

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...]) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = "req_" + secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        acting.set(Actor(request_id=request_id))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in state.get("rate_headers", {}).items():
                    headers[name] = value
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refuse(scope)
        answer = error_response(refused, request_id) if refused else self.app
        await answer(scope, receive, send_marked)

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if "*" not in self.hosts and _name(host) not in self.hosts:
            return ApiError(
                "invalid_host",
                f"Host {host!r} is not served here; allowed: {', '.join(sorted(self.hosts))} (SATUNE_ALLOWED_HOSTS).",
            )
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            # PostgreSQL would fail over it in an id, where SQLite finds nothing.
            return ApiError("invalid_request", "The address holds a NUL, which is in no name here.")
        if scope["method"] in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return ApiError(
                "cross_site_request",
                f"Requests from pages of another site are refused (origin {origin}).",
            )
        return None


def _name(host: str) -> str:
    """The host without its port; an IPv6 address keeps its brackets."""
    end = host.find("]") + 1 if host.startswith("[") else host.find(":")
    return (host[:end] if end > 0 else host).lower()
