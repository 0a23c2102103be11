"""Every create, sent again."""

from __future__ import annotations

import threading
import time

import pytest

from api import once
from jobs.receipts import Attempt

from .conftest import ROW

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def bodies(file_id):
    """What makes one of each kind."""
    return {
        JOBS: {"json": {"model": "local/tiny", "training_file": file_id}},
        "/v1/files": {"data": {"purpose": "fine-tune"}, "files": {"file": ("b.jsonl", ROW * 2)}},
        "/v1/organization/projects": {"json": {"name": "Two"}},
        "/v1/webhook_endpoints": {
            "json": {
                "name": "w",
                "url": "https://example.com",
                "event_types": ["fine_tuning.job.failed"],
            }
        },
    }


def test_each_create_is_replayed_byte_for_byte(client, bodies):
    for path, body in bodies.items():
        key = {"idempotency-key": f"for-{path}"}
        first = client.post(path, headers=key, **body)
        again = client.post(path, headers=key, **body)
        assert (first.status_code, again.status_code) == (200, 200), path
        assert again.content == first.content
        assert again.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
        assert again.headers["location"] == f"{path}/{first.json()['id']}"
        inferred = client.post(path, headers={"x-stainless-retry-count": "1"}, **body)
        # Another attempt than the one with the key, so new; its own retry is not.
        retry = client.post(path, headers={"x-stainless-retry-count": "2"}, **body)
        assert retry.content == inferred.content
        assert retry.headers["idempotent-replayed"] == "inferred"


def test_the_stored_answer_stands_though_the_job_went_on(client, bodies):
    first = client.post(JOBS, headers={"idempotency-key": "a"}, **bodies[JOBS])
    client.post(f"{JOBS}/{first.json()['id']}/cancel")
    again = client.post(JOBS, headers={"idempotency-key": "a"}, **bodies[JOBS])
    assert again.content == first.content


def test_a_refused_create_is_not_kept(client, file_id):
    key = {"idempotency-key": "a"}
    bad = client.post(JOBS, json={"model": "local/none", "training_file": file_id}, headers=key)
    assert bad.status_code == 400
    good = client.post(JOBS, json={"model": "local/tiny", "training_file": file_id}, headers=key)
    assert good.status_code == 200


def test_keys_that_cannot_be_one_are_refused(client, bodies):
    for key in ("", "a b", "x" * 256):
        assert (
            client.post(JOBS, headers={"idempotency-key": key}, **bodies[JOBS]).status_code == 400
        )


def open_attempt(services, body: dict) -> str:
    key = services.store.list_keys("default").items[0]
    opened = services.store.open_receipt(
        Attempt(
            project="default",
            key_id=key.id,
            scope=f"POST {JOBS}",
            fingerprint=once.fingerprint(body),
            key="slow",
            retry=0,
        )
    )
    assert opened.token
    return opened.token


def test_a_duplicate_waits_for_the_first(client, services, bodies):
    token = open_attempt(services, bodies[JOBS]["json"])
    timer = threading.Timer(0.5, services.store.close_receipt, (token, 500))
    begun = time.monotonic()
    timer.start()
    answer = client.post(JOBS, headers={"idempotency-key": "slow"}, **bodies[JOBS])
    assert answer.status_code == 200
    assert time.monotonic() - begun > 0.4
    timer.join()


def test_a_duplicate_that_waited_long_is_told_to_come_back(client, services, bodies, monkeypatch):
    monkeypatch.setattr(once, "HOLD_SECONDS", 0.3)
    open_attempt(services, bodies[JOBS]["json"])
    answer = client.post(JOBS, headers={"idempotency-key": "slow"}, **bodies[JOBS])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_in_progress")
    assert answer.headers["retry-after"] == "1"
    assert "x-should-retry" not in answer.headers
