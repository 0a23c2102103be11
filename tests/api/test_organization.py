"""Keys, scopes, projects and limits over HTTP, and with OpenAI's own admin client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from api.auth import scope_of
from api.limiter import Limiter
from jobs.spec import Key, NewFile
from tests.servers import redis_server

from .conftest import KEY, ROW, create, upload
from .finished import new_job
from .serving import served
from .test_auth import OPEN, endpoints

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from api.deps import Services

PROJECTS = "/v1/organization/projects"
JOBS = "/v1/fine_tuning/jobs"


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def other(client: TestClient) -> str:
    """Id of a second project."""
    return client.post(PROJECTS, json={"name": "Other"}).json()["id"]


def secret_of(client: TestClient, project: str, *scopes: str) -> str:
    body = {"name": "ci"} | ({"scopes": list(scopes)} if scopes else {})
    answer = client.post(f"{PROJECTS}/{project}/service_accounts", json=body)
    return answer.json()["api_key"]["value"]


def test_the_admin_client_of_openai_works_unchanged(app: FastAPI) -> None:
    with (
        served(app) as address,
        openai.OpenAI(
            base_url=f"{address}/v1",
            api_key=KEY,
            admin_api_key=KEY,
            max_retries=0,
            _strict_response_validation=True,
        ) as sdk,
    ):
        projects = sdk.admin.organization.projects
        project = projects.create(name="Team")
        assert projects.retrieve(project.id).name == "Team"
        assert projects.update(project.id, name="Crew").name == "Crew"
        assert [p.id for p in projects.list()] == ["default", project.id]
        account = projects.service_accounts.create(project.id, name="ci", expires_in_seconds=60)
        assert account.api_key is not None
        assert account.api_key.value.startswith("sk-sat-")
        more = projects.service_accounts.api_keys.create(
            account.id, project_id=project.id, name="two", scopes=["files"]
        )
        assert [a.id for a in projects.service_accounts.list(project.id)] == [account.id]
        keys = {k.id: k for k in projects.api_keys.list(project.id)}
        assert set(keys) == {account.api_key.id, more.id}
        shown = projects.api_keys.retrieve(more.id, project_id=project.id)
        assert shown.redacted_value == f"sk-sat-...{more.value[-4:]}"
        assert shown.owner.service_account is not None
        assert projects.api_keys.delete(more.id, project_id=project.id).deleted
        assert sdk.with_options(api_key=account.api_key.value).models.list().data
        assert projects.service_accounts.delete(account.id, project_id=project.id).deleted
        logs = list(sdk.admin.organization.audit_logs.list(event_types=["api_key.created"]))
        assert {log.id for log in logs}
        assert logs[0].project.id == project.id
        assert projects.archive(project.id).status == "archived"


def test_a_key_may_do_what_its_scopes_say_and_no_more(client, other, file_id):
    reader = bearer(secret_of(client, "default", "jobs:read"))
    assert client.get(JOBS, headers=reader).status_code == 200
    for method, path in (("GET", "/v1/files"), ("POST", JOBS), ("GET", PROJECTS)):
        refused = client.request(method, path, headers=reader)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "insufficient_scope"
        assert refused.json()["error"]["type"] == "permission_error"
    # No scopes asked for are all but admin.
    member = bearer(secret_of(client, "default"))
    assert client.get("/v1/files", headers=member).status_code == 200
    assert client.get(PROJECTS, headers=member).status_code == 403
    bad = client.post(f"{PROJECTS}/{other}/service_accounts", json={"name": "a", "scopes": ["x"]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "scopes")


def test_the_dashboard_gives_no_more_than_the_key(client, services, file_id):
    job = create(client, file_id).json()["id"]
    secret = secret_of(client, "default", "jobs:read")
    del client.headers["authorization"]
    client.get(f"/login?key={secret}")
    assert client.get("/").status_code == 200
    assert client.post(f"/jobs/{job}/cancel").status_code == 403
    (key,) = (k for k in services.store.list_keys("default").items if k.name == "ci")
    services.store.revoke_key("default", key.id)
    assert client.get("/").status_code == 401


def test_every_route_has_a_scope_of_its_own(app):
    for method, path in endpoints(app):
        if path.startswith("/v1") and not path.startswith("/v1/organization"):
            assert scope_of(method, path) != "admin", (method, path)
    assert scope_of("GET", "/v1/files_of_all") == "admin"


def test_the_project_header_must_agree(client):
    agree = client.get(JOBS, headers={"openai-project": "default"})
    assert agree.status_code == 200
    differ = client.get(JOBS, headers={"openai-project": "proj_x"})
    assert (differ.status_code, differ.json()["error"]["code"]) == (403, "project_mismatch")


def test_ids_of_another_project_do_not_exist(client: TestClient, app, services: Services, other):
    """Every route with an id in its path, with an id that is real, but another project's."""
    job = new_job(services, project=other)
    theirs = services.store
    theirs.add_file(
        other, NewFile(id="file-x", filename="f", purpose="fine-tune", bytes=1, sha256="0" * 64)
    )
    endpoint = theirs.create_webhook(
        other, name="w", url="https://example.com", event_types=["fine_tuning.job.cancelled"]
    ).id
    theirs.cancel_job(other, job)
    (delivery,) = theirs.list_deliveries(other, endpoint).items
    theirs.put_secret(other, "wandb_api_key", "k")
    ids = {
        "job_id": job,
        "export_id": theirs.ask_chore(other, "export", "ft:x").id,
        "file_id": "file-x",
        "model:path": "ft:x",
        "webhook_endpoint_id": endpoint,
        "delivery_id": delivery.id,
        "name": "wandb_api_key",
    }
    # Routes whose body is looked at before the id get one that is good.
    bodies = {"test": {"event_type": "fine_tuning.job.cancelled"}}
    walked = 0
    for method, path in sorted(endpoints(app)):
        if not path.startswith("/v1/") or path.startswith("/v1/organization") or "{" not in path:
            continue
        if method == "PUT":  # makes what it names
            continue
        address = path
        for name in ids:
            address = address.replace(f"{{{name}}}", ids[name])
        address = address.replace("{", "").replace("}", "")
        query = {"model": "a/b"} if path.endswith("/preview") else None
        body = bodies.get(path.rsplit("/", 1)[-1])
        answer = client.request(method, address, json=body, params=query)
        assert answer.status_code == 404, (method, path, answer.text)
        walked += 1
    assert walked >= 17
    assert ("GET", "/healthz") in OPEN


def test_limits_are_shown_to_all_and_changed_by_admins(client, other):
    member = bearer(secret_of(client, other))
    limits = f"{PROJECTS}/{other}/limits"
    changed = client.post(limits, json={"queued_jobs": 1, "storage_bytes": 1000})
    assert changed.json()["limits"]["queued_jobs"] == 1
    seen = client.get("/v1/sat/limits", headers=member).json()
    assert seen == client.get(limits).json()
    assert seen["usage"] == {"queued_jobs": 0, "running_jobs": 0, "storage_bytes": 0}
    assert client.post(limits, json={"queued_jobs": None}).json()["limits"]["queued_jobs"] is None
    for bad in ({"queued_jobs": -1}, {"gpus": 1}, {"requests_per_minute": 0}, {"queued_jobs": "1"}):
        assert client.post(limits, json=bad).status_code == 400
    assert client.post(limits, json={}, headers=member).status_code == 403


def test_a_full_project_is_429_and_told_not_to_retry(client):
    limits = f"{PROJECTS}/default/limits"
    file = upload(client, ROW).json()["id"]
    client.post(limits, json={"queued_jobs": 1, "storage_bytes": len(ROW) + 10})
    assert create(client, file).status_code == 200
    for refused, code in (
        (create(client, file), "queue_quota_exceeded"),
        (upload(client, ROW), "storage_quota_exceeded"),
    ):
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == (code, "rate_limit_error")
        assert refused.headers["x-should-retry"] == "false"
        assert int(refused.headers["retry-after"]) > 120
    assert len(client.get("/v1/files").json()["data"]) == 1


@pytest.mark.usefixtures("early_in_a_minute")
def test_requests_a_minute_are_counted(client, other):
    member = bearer(secret_of(client, other))
    client.post(f"{PROJECTS}/{other}/limits", json={"requests_per_minute": 2})
    answers = [client.get("/v1/models", headers=member) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert answers[2].json()["error"]["code"] == "rate_limited"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    assert answers[2].headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-requests" not in client.get("/v1/models").headers


@pytest.mark.usefixtures("early_in_a_minute")
def test_a_retry_of_a_create_that_the_limit_refused_is_new(client, other):
    member = bearer(secret_of(client, other))
    limits = f"{PROJECTS}/{other}/limits"
    file = client.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("d.jsonl", ROW)},
        headers=member,
    ).json()["id"]
    body = {"model": "local/tiny", "training_file": file}

    def send(retry: int):
        return client.post(
            JOBS, json=body, headers=member | {"x-stainless-retry-count": str(retry)}
        )

    older = send(0).json()["id"]
    client.post(limits, json={"requests_per_minute": 1})
    client.get("/v1/models", headers=member)
    assert send(0).status_code == 429
    client.post(limits, json={"requests_per_minute": None})
    newer = send(1)
    assert newer.json()["id"] != older
    assert send(2).json()["id"] == newer.json()["id"]


@pytest.mark.usefixtures("early_in_a_minute")
def test_processes_count_together_and_alone_where_redis_is_away(tmp_path):
    key = Key(id="k", project="p", name="n", scopes=frozenset(), requests_per_minute=2)
    with redis_server(tmp_path) as url:
        one, two = Limiter(url), Limiter(url)
        assert one.count(key)["x-ratelimit-remaining-requests"] == "1"
        assert two.count(key)["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(Exception, match="may send 2 requests"):
            one.count(key)
    assert one.count(key)["x-ratelimit-remaining-requests"] == "1"


def test_a_change_over_http_is_in_the_audit_log_with_its_request(client, file_id):
    job = create(client, file_id)
    cancelled = client.post(f"{JOBS}/{job.json()['id']}/cancel")
    entries = client.get(
        "/v1/organization/audit_logs", params={"resource_ids[]": job.json()["id"]}
    ).json()["data"]
    assert [e["operation"] for e in entries] == ["cancelFineTuningJob", "createFineTuningJob"]
    assert entries[0]["request_id"] == cancelled.headers["x-request-id"]
    assert entries[0]["actor"]["api_key"]["id"].startswith("key_")
    assert "status" in entries[0]["changed"]


def test_what_leaves_something_behind_is_audited_whatever_it_is(client, services, file_id):
    new = {"purpose": "fine-tune", "filename": "a.txt", "bytes": 1, "mime_type": "text/plain"}
    upload = client.post("/v1/uploads", json=new).json()["id"]
    client.post(f"/v1/uploads/{upload}/cancel")
    export = services.store.ask_chore("default", "export", "ft:x").id
    client.delete(f"/v1/exports/{export}")
    client.get(f"/v1/files/{file_id}/validation")
    entries = client.get("/v1/organization/audit_logs").json()["data"]
    told = [(e["type"], e["target"], e["operation"]) for e in entries]
    assert told[:3] == [
        ("export.deleted", export, "deleteExport"),
        ("upload.updated", upload, "cancelUpload"),
        ("upload.created", upload, "createUpload"),
    ]
    assert not [kind for kind, *_ in told if "chore" in kind]
