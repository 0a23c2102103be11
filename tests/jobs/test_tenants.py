"""Keys, limits and audit rows, on both databases."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update

from jobs.audit import Actor, acting
from jobs.errors import InvalidCursor, LastAdminKey, NotArchivable, NotFound, QuotaExceeded
from jobs.spec import NewFile, new_id
from jobs.states import Stage
from jobs.tenant_models import KeyRow

from .test_store import PREPARED, add_job, claimed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.store import Store


@pytest.fixture
def project(store: Store) -> str:
    store.ensure_key("sk-root", name="root")
    return store.create_project("Second").id


@pytest.fixture
def actor() -> Iterator[Actor]:
    who = Actor(request_id="req_1", kind="api_key", key_id="key_1", operation="op")
    token = acting.set(who)
    yield who
    acting.reset(token)


def queue(store: Store, project: str, number: int) -> None:
    for _ in range(number):
        add_job(store, project)
    for _ in range(number):
        store.finish_prepare(claimed(store, Stage.PREPARE), PREPARED)


def test_a_secret_is_valid_until_it_ends_or_is_revoked(store: Store, project: str) -> None:
    account, key, secret = store.create_service_account(project, "ci", ("files",))
    found = store.authenticate(secret)
    assert found is not None
    assert (found.project, found.scopes) == (project, {"files"})
    store.change_key(project, key.id, {"expires_at": time.time() - 1})
    assert store.authenticate(secret) is None
    second, other = store.create_key(project, account.id, "b", ("files",))
    assert store.authenticate(other)
    store.revoke_key(project, second.id)
    assert store.authenticate(other) is None
    assert store.key_of_session(second.id) is None
    with pytest.raises(NotFound):
        store.get_key(project, second.id)


def test_a_removed_account_or_archived_project_ends_its_keys(store: Store, project: str) -> None:
    account, _, secret = store.create_service_account(project, "ci", ("files",))
    _, _, stays = store.create_service_account(project, "cd", ("files",))
    store.delete_service_account(project, account.id)
    assert store.authenticate(secret) is None
    assert store.authenticate(stays)
    assert store.archive_project(project).archived_at
    assert store.authenticate(stays) is None
    assert project not in [p.id for p in store.list_projects().items]
    assert project in [p.id for p in store.list_projects(archived=True).items]


def test_somebody_must_be_able_to_administer(store: Store, project: str) -> None:
    root = store.list_keys("default").items[0]
    with pytest.raises(LastAdminKey):
        store.revoke_key("default", root.id)
    with pytest.raises(LastAdminKey):
        store.change_key("default", root.id, {"expires_at": time.time() + 60})
    assert store.authenticate("sk-root")
    with pytest.raises(NotArchivable):
        store.archive_project("default")
    store.create_service_account(project, "boss", ("admin",))
    store.revoke_key("default", root.id)


def test_use_is_noted_once_a_minute(store: Store, project: str) -> None:
    def used() -> float | None:
        return store.list_keys("default").items[0].last_used_at

    assert used() is None
    store.authenticate("sk-root")
    first = used()
    store.authenticate("sk-root")
    assert first is not None
    assert used() == first
    with store.writing() as session:
        session.execute(update(KeyRow).values(last_used_at=first - 61))
    store.authenticate("sk-root")
    assert (used() or 0) >= first


def test_lists_go_on_after_their_last_item(store: Store, project: str) -> None:
    for name in "abc":
        store.create_service_account(project, name, ("files",))
    for listing in (store.list_keys, store.list_service_accounts):
        first: Any = listing(project, limit=2)
        rest: Any = listing(project, limit=2, after=first.items[-1].id)
        assert [item.name for item in (*first.items, *rest.items)] == ["a", "b", "c"]
        assert (first.has_more, rest.has_more) == (True, False)
        with pytest.raises(InvalidCursor):
            listing(project, after="none")


def test_a_project_at_its_limit_queues_nothing_more(store: Store, project: str) -> None:
    store.set_limits(project, {"queued_jobs": 2})
    jobs = [add_job(store, project) for _ in range(2)]
    with pytest.raises(QuotaExceeded) as full:
        add_job(store, project)
    assert full.value.quota == "queued_jobs"
    add_job(store)
    store.cancel_job(project, jobs[0].id)
    add_job(store, project)


def test_storage_is_limited(store: Store, project: str) -> None:
    def add(size: int) -> None:
        new = NewFile(
            id=new_id("file-"), filename="f", purpose="fine-tune", bytes=size, sha256="0" * 64
        )
        store.add_file(project, new)

    store.set_limits(project, {"storage_bytes": 10})
    add(10)
    with pytest.raises(QuotaExceeded) as full:
        add(1)
    assert full.value.quota == "storage_bytes"
    assert store.limits(project)[1].storage_bytes == 10
    store.set_limits(project, {"storage_bytes": None})
    add(1)


def test_a_claim_respects_the_limit_of_running_jobs(store: Store, project: str) -> None:
    store.set_limits(project, {"running_jobs": 1})
    queue(store, project, 2)
    queue(store, "default", 2)
    running = [claimed(store, Stage.TRAIN) for _ in range(3)]
    assert [c.job.project for c in running] == [project, "default", "default"]
    assert store.claim("w", Stage.TRAIN) is None
    assert store.waiting(Stage.TRAIN) == 1
    assert not store.slot_wanted(Stage.TRAIN), "no slot is freed for a job that may not start"
    store.fail(running[0], {"code": "internal_error", "message": "m", "param": None})
    assert store.slot_wanted(Stage.TRAIN)
    assert claimed(store, Stage.TRAIN).job.project == project


def test_projects_take_turns(store: Store, project: str) -> None:
    queue(store, "default", 3)
    queue(store, project, 1)
    turns = [claimed(store, Stage.TRAIN).job.project for _ in range(4)]
    assert turns == ["default", project, "default", "default"]


def test_every_change_of_a_request_is_audited(store: Store, project: str, actor: Actor) -> None:
    job = add_job(store, project)
    store.cancel_job(project, job.id)
    _, key, secret = store.create_service_account(project, "ci", ("files",))
    store.revoke_key(project, key.id)
    store.set_limits(project, {"queued_jobs": 1})
    logs = store.audit_logs(projects=[project]).items
    assert [log.type for log in logs] == [
        "project.updated",
        "api_key.deleted",
        "api_key.created",
        "service_account.created",
        "fine_tuning.job.updated",
        "fine_tuning.job.created",
    ]
    assert {(log.actor, log.key_id, log.request_id, log.operation) for log in logs} == {
        ("api_key", "key_1", "req_1", "op")
    }
    assert logs[0].changed == ["queued_jobs"]
    assert logs[-1].target == job.id
    assert secret not in repr(logs)
    assert store.audit_logs(types=["api_key.created"]).items[0].target == key.id
    page = store.audit_logs(limit=1, projects=[project])
    assert page.has_more
    assert store.audit_logs(limit=1, after=page.items[0].id).items[0] == logs[1]


def test_what_fails_and_what_workers_do_leaves_no_audit_row(
    store: Store, project: str, actor: Actor
) -> None:
    with pytest.raises(LastAdminKey):
        store.revoke_key("default", store.list_keys("default").items[0].id)
    acting.set(None)
    queue(store, project, 1)
    assert not store.audit_logs().items
