"""Nothing answers without a key, but for an explicit list."""

from __future__ import annotations

import subprocess
import sys

from api.auth import cookie_name

from .conftest import KEY

OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/login"),
    ("POST", "/login"),
    ("POST", "/logout"),
}


def endpoints(app) -> set[tuple[str, str]]:
    """Every method and path, in routers too."""
    found, waiting = set(), list(app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            waiting.extend(inner)
        elif methods := getattr(route, "methods", None):
            found |= {(method, route.path) for method in methods}
    return found


def test_every_route_and_method_without_a_key_is_401_but_for_the_open_ones(app, anonymous):
    walked = endpoints(app)
    assert {path for _, path in walked} >= {"/", "/v1/files", "/v1/fine_tuning/jobs", "/v1/models"}
    assert len(walked) > 20
    for method, path in sorted(walked):
        address = path.replace(":path", "").replace("{", "").replace("}", "")
        status = anonymous.request(method, address).status_code
        if (method.replace("HEAD", "GET"), path) in OPEN:
            assert status != 401 or path == "/login", (method, path)
        else:
            assert status == 401, (method, path)


def test_static_files_are_open_and_nothing_above_them(anonymous):
    assert anonymous.get("/static/satune.css").status_code == 200
    assert anonymous.get("/static/..%2fpages.py").status_code == 404


def test_a_wrong_key_is_401_in_the_error_body(anonymous):
    response = anonymous.get("/v1/models", headers={"authorization": "Bearer wrong"})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_missing_key_is_answered_before_a_broken_body(anonymous):
    response = anonymous.post(
        "/v1/fine_tuning/jobs", content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 401


def test_the_link_signs_in_and_leaves_the_address(anonymous):
    response = anonymous.get(f"/login?key={KEY}", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert KEY not in cookie
    assert anonymous.get("/").status_code == 200


def test_the_cookie_does_not_open_the_api(anonymous):
    anonymous.get(f"/login?key={KEY}")
    assert anonymous.get("/v1/models").status_code == 401


def test_a_wrong_key_or_a_forged_cookie_does_not_sign_in(anonymous, app):
    assert anonymous.post("/login", data={"key": "wrong"}).status_code == 401
    anonymous.cookies.set(cookie_name(app.state.services), "ImRlZmF1bHQi.aaaa.bbbb")
    assert anonymous.get("/").status_code == 401


def test_signing_out_ends_the_session(anonymous):
    anonymous.get(f"/login?key={KEY}")
    anonymous.post("/logout")
    assert anonymous.get("/").status_code == 401


def test_importing_the_app_loads_no_torch():
    program = (
        "import sys, api.app; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_revoked_key_is_refused_at_the_next_request(client, services):
    _, key, secret = services.store.create_service_account("default", "ci", ("jobs:read",))
    theirs = {"authorization": f"Bearer {secret}"}
    assert client.get("/v1/fine_tuning/jobs", headers=theirs).status_code == 200
    services.store.revoke_key("default", key.id)
    assert client.get("/v1/fine_tuning/jobs", headers=theirs).status_code == 401
