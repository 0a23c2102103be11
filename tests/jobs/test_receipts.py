"""Sending a create again makes nothing, on both databases."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from jobs import receipts
from jobs.errors import IdempotencyMismatch, InProgress
from jobs.receipts import Attempt, Opened, Receipt
from jobs.spec import JobRecord, NewJob
from jobs.tenant_models import ReceiptRow
from sat_core.plan.request import RunRequest

if TYPE_CHECKING:
    from jobs.store import Store

NEW = NewJob(request=RunRequest.from_dict({"model": "m"}).to_dict(), model="m", training_file="f")
KEYED = Attempt(
    project="default", key_id="k", scope="POST /x", fingerprint="print", key="key", retry=0
)
LOGGED = dataclasses.replace(KEYED, key=None)


def made(store: Store, token: str | None) -> JobRecord:
    assert token is not None
    return store.create_job("default", NEW, Receipt(token=token, render=lambda job: job.id))


def retried(number: int) -> Attempt:
    return dataclasses.replace(LOGGED, retry=number)


def age(store: Store, seconds: float) -> None:
    with store.writing() as session:
        session.execute(update(ReceiptRow).values(created_at=ReceiptRow.created_at - seconds))


def count(store: Store) -> int:
    return len(store.list_jobs("default").items)


def test_a_key_is_answered_with_what_it_was_answered_before(store: Store) -> None:
    job = made(store, store.open_receipt(KEYED).token)
    assert store.open_receipt(KEYED) == Opened(body=job.id)
    with pytest.raises(IdempotencyMismatch, match="another body"):
        store.open_receipt(dataclasses.replace(KEYED, fingerprint="other"))
    for other in ({"project": "b"}, {"scope": "POST /y"}, {"key": "key2"}):
        assert store.open_receipt(dataclasses.replace(KEYED, **other)).token


def test_many_at_once_open_one(store: Store) -> None:
    opened: list[Opened] = []
    threads = [
        threading.Thread(target=lambda: opened.append(store.open_receipt(KEYED))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([o for o in opened if o.token]) == 1
    assert len([o for o in opened if o == Opened()]) == 5


def test_an_error_leaves_the_key_free(store: Store) -> None:
    token = store.open_receipt(KEYED).token
    assert token
    store.close_receipt(token, 429)
    assert store.open_receipt(dataclasses.replace(KEYED, fingerprint="mended")).token


@pytest.mark.parametrize("attempt", [KEYED, retried(1)])
def test_who_was_taken_for_dead_can_create_nothing(store: Store, attempt: Attempt) -> None:
    first = store.open_receipt(dataclasses.replace(attempt, retry=0)).token
    assert store.open_receipt(attempt) == Opened()
    age(store, receipts.STALE_SECONDS + 1)
    second = store.open_receipt(attempt).token
    assert second not in (None, first)
    made(store, second)
    with pytest.raises(InProgress):
        made(store, first)
    assert count(store) == 1


def test_a_retry_is_known_by_its_body_and_key(store: Store) -> None:
    job = made(store, store.open_receipt(LOGGED).token)
    assert store.open_receipt(retried(1)) == Opened(body=job.id)
    assert store.open_receipt(retried(2)) == Opened(body=job.id)
    for other in ({"key_id": "other"}, {"fingerprint": "other"}, {"scope": "POST /y"}):
        assert store.open_receipt(dataclasses.replace(retried(1), **other)).token


def test_attempt_zero_is_always_new(store: Store) -> None:
    made(store, store.open_receipt(LOGGED).token)
    made(store, store.open_receipt(LOGGED).token)
    assert count(store) == 2


def test_a_retry_of_what_we_refused_is_new_even_beside_an_older_equal_job(store: Store) -> None:
    older = made(store, store.open_receipt(LOGGED).token)
    refused = store.open_receipt(LOGGED).token
    assert refused
    store.close_receipt(refused, 503)
    newer = made(store, store.open_receipt(retried(1)).token)
    assert newer.id != older.id
    # Its answer was lost, and the next retry means the newer one.
    assert store.open_receipt(retried(2)) == Opened(body=newer.id)


def test_a_retry_long_after_is_new_and_a_key_lives_a_day(store: Store) -> None:
    made(store, store.open_receipt(LOGGED).token)
    made(store, store.open_receipt(KEYED).token)
    age(store, receipts.RETRY_WINDOW_SECONDS + 1)
    assert store.open_receipt(retried(1)).token
    assert store.open_receipt(KEYED).body
    age(store, receipts.KEPT_SECONDS)
    assert store.open_receipt(KEYED).token


def test_what_fails_in_the_transaction_leaves_neither_answer_nor_job(store: Store) -> None:
    token = store.open_receipt(KEYED).token
    assert token

    def broken(_: JobRecord) -> str:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.create_job("default", NEW, Receipt(token=token, render=broken))
    assert count(store) == 0
    assert made(store, token).id
