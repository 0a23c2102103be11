"""One body for every answer that is not a success, on every path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.errors import ERRORS, ApiError
from jobs.errors import JobTerminal
from jobs.settings import Settings

from .conftest import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_body(response, status: int, code: str) -> dict:
    body = response.json()
    assert response.status_code == status == body["status"] == ERRORS[code].status
    error = body["error"]
    assert error["code"] == code
    assert error["message"] == body["detail"] != ""
    assert error["request_id"] == body["instance"] == response.headers["x-request-id"]
    assert error["type"] == ERRORS[code].kind
    return error


def test_an_unknown_path_is_404_and_says_what_a_base_url_needs(client):
    check_body(client.get("/v1/nothing"), 404, "not_found")
    assert "/v1" in check_body(client.get("/files"), 404, "not_found")["message"]


def test_a_trailing_slash_is_no_redirect(client):
    check_body(client.get("/v1/files/x/content/"), 404, "not_found")


def test_a_wrong_method_is_405_with_allow(client):
    response = client.put("/v1/files")
    check_body(response, 405, "method_not_allowed")
    assert response.headers["allow"]


def test_broken_json_is_400(client):
    response = client.post(
        "/v1/fine_tuning/jobs", content=b"{", headers={"content-type": "application/json"}
    )
    check_body(response, 400, "invalid_request")


def test_a_large_body_is_413(client):
    response = client.post("/v1/fine_tuning/jobs", content=b" " * (2 << 20))
    check_body(response, 413, "request_too_large")


def test_a_limit_out_of_range_is_400_and_names_the_parameter(client):
    error = check_body(client.get("/v1/fine_tuning/jobs?limit=101"), 400, "invalid_value")
    assert error["param"] == "limit"


@pytest.fixture
def either(database: str, tmp_path: Path) -> Iterator[TestClient]:
    """A client of an app on SQLite, and of one on PostgreSQL."""
    settings = Settings(data_dir=tmp_path, database_url=database, api_key=KEY)
    with TestClient(
        create_app(settings), base_url="http://localhost", raise_server_exceptions=False
    ) as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


def test_what_no_database_keeps_is_refused_wherever_it_stands(either):
    for body, param in (
        (rb'{"name": "a\u0000b"}', "name"),
        (rb'{"name": [1, {"of": "\udc00"}]}', "name.1.of"),
        (rb'{"name": {"\ud800": 1}}', "name"),
        (rb'{"\ud800": null}', None),
    ):
        for path in ("organization/projects", "fine_tuning/jobs", "exports", "chat/completions"):
            error = check_body(either.post(f"/v1/{path}", content=body), 400, "invalid_value")
            assert error["param"] == param
    whole = either.post("/v1/organization/projects", content=rb'{"name": "\ud83d\ude00"}')
    assert whole.json()["name"] == "\N{GRINNING FACE}"
    deep = b'{"name": ' + b"[" * 900 + b"]" * 900 + b"}"
    assert either.post("/v1/organization/projects", content=deep).status_code == 400
    for path in ("/v1/files/%00", "/v1/models/a%00b", "/v1/files?after=%00", "/jobs/%00"):
        check_body(either.get(path), 400, "invalid_request")


def test_an_upload_that_is_no_form_is_415(client):
    check_body(client.post("/v1/files", json={}), 415, "unsupported_media_type")


def test_a_fault_of_ours_is_500_without_its_words(client, app):
    @app.get("/fault")
    def fault() -> None:
        raise ZeroDivisionError("secret")

    response = client.get("/fault")
    error = check_body(response, 500, "internal_error")
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("raised", "code"),
    [(ApiError("file_in_use", "x"), "file_in_use"), (JobTerminal("x"), "job_terminal")],
)
def test_conflicts_tell_clients_not_to_retry(client, app, raised, code):
    @app.get("/conflict")
    def conflict() -> None:
        raise raised

    response = client.get("/conflict")
    check_body(response, 409, code)
    assert response.headers["x-should-retry"] == "false"


def test_a_host_that_is_not_allowed_is_refused(client):
    check_body(client.get("/healthz", headers={"host": "evil.example"}), 400, "invalid_host")
    assert client.get("/healthz", headers={"host": "127.0.0.1:8000"}).status_code == 200
    assert client.get("/healthz", headers={"host": "[::1]:8000"}).status_code == 200


def test_a_page_of_another_site_cannot_post(client):
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ):
        check_body(
            client.post("/login", headers=headers, data={"key": "k"}), 403, "cross_site_request"
        )


def test_every_answer_carries_a_request_id_and_a_policy(client):
    for path in ("/healthz", "/v1/models", "/login", "/static/satune.css"):
        headers = client.get(path).headers
        assert headers["x-request-id"].startswith("req_")
        assert "default-src 'self'" in headers["content-security-policy"]
