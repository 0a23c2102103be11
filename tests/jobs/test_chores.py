"""Chores keep the promises of jobs: asked once, held by one, lost by observation, fenced ever after."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from jobs import chores
from jobs.errors import LeaseLost, NotFound, QuotaExceeded
from jobs.queue import NullBell
from jobs.settings import Settings
from jobs.spec import ChoreRecord
from jobs.store import Store
from worker.sweeper import Sweeper

ERROR = {"code": "dataset_invalid", "message": "bad", "param": None}


def claimed(store: Store, worker: str = "w1") -> ChoreRecord:
    claim = store.claim_chore(worker)
    assert claim is not None
    return claim


def test_asking_twice_is_asking_once(store: Store) -> None:
    first = store.ask_chore("default", "preview", "file-1", {"a": 1, "b": 2})
    again = store.ask_chore("default", "preview", "file-1", {"b": 2, "a": 1})
    others = [
        store.ask_chore("other", "preview", "file-1", {"a": 1, "b": 2}),
        store.ask_chore("default", "validation", "file-1", {"a": 1, "b": 2}),
        store.ask_chore("default", "preview", "file-2", {"a": 1, "b": 2}),
        store.ask_chore("default", "preview", "file-1", {"a": 1}),
    ]
    assert (first.status, first.attempt) == ("waiting", 0)
    assert again == first
    assert len({first.id, *(o.id for o in others)}) == 5
    assert store.chores_waiting() == 5


def test_many_who_ask_at_once_get_one_row(store: Store) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(store.ask_chore("p", "k", "s").id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_result_is_kept_and_handed_out_again(store: Store) -> None:
    asked = store.ask_chore("default", "k", "s")
    claim = claimed(store)
    assert (claim.id, claim.attempt, claim.owner, claim.status) == (asked.id, 1, "w1", "running")
    assert store.claim_chore("w2") is None
    store.finish_chore(claim, {"rows": [1]})
    done = store.ask_chore("default", "k", "s")
    assert (done.id, done.status, done.result, done.owner) == (
        asked.id,
        "succeeded",
        {"rows": [1]},
        None,
    )
    with pytest.raises(NotFound):
        store.get_chore("other", asked.id)


def test_whoever_lost_the_lease_writes_nothing(store: Store) -> None:
    store.ask_chore("default", "k", "s")
    old = claimed(store)
    (lease,) = store.chore_leases()
    store.beat_chore(old)
    assert not store.expire_chore(lease, max_failures=3)
    (lease,) = store.chore_leases()
    assert store.expire_chore(lease, max_failures=3)
    new = claimed(store, "w2")
    assert new.attempt == 2
    for write in (
        lambda: store.beat_chore(old),
        lambda: store.finish_chore(old, {}),
        lambda: store.fail_chore(old, ERROR),
        lambda: store.release_chore(old),
    ):
        with pytest.raises(LeaseLost):
            write()
    store.finish_chore(new, {"by": 2})
    assert store.get_chore("default", new.id).result == {"by": 2}


def test_a_chore_that_loses_every_worker_fails(store: Store) -> None:
    store.ask_chore("default", "k", "s")
    for _ in range(2):
        claimed(store)
        (lease,) = store.chore_leases()
        assert store.expire_chore(lease, max_failures=2)
    failed = store.ask_chore("default", "k", "s")
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "worker_lost"


def test_a_released_chore_waits_again_uncounted(store: Store) -> None:
    store.ask_chore("default", "k", "s")
    store.release_chore(claimed(store))
    again = claimed(store)
    assert (again.attempt, again.failures) == (2, 0)


def test_an_old_failure_is_tried_again_and_a_fresh_one_is_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ask_chore("default", "k", "s")
    store.fail_chore(claimed(store), ERROR)
    assert store.ask_chore("default", "k", "s").error == ERROR
    monkeypatch.setattr(chores, "RETRY_FAILED_SECONDS", -1)
    again = store.ask_chore("default", "k", "s")
    assert (again.status, again.error) == ("waiting", None)


def test_what_is_forgotten_is_fenced_off(store: Store) -> None:
    store.ask_chore("default", "k", "file-1")
    kept = store.ask_chore("default", "k", "file-2")
    claim = claimed(store)
    store.delete_chore("default", claim.id)
    with pytest.raises(LeaseLost):
        store.finish_chore(claim, {})
    assert claimed(store).id == kept.id


@pytest.mark.parametrize("slots", [1, 4])
def test_one_projects_many_chores_delay_nobody_elses(store: Store, slots: int) -> None:
    many = [store.ask_chore("default", "k", str(n)).id for n in range(3)]
    one = store.ask_chore("other", "k", "1").id
    order = []
    for _ in range(4):
        claim = claimed(store)
        order.append(claim.id)
        if slots == 1:
            store.finish_chore(claim, {})
    assert order == [many[0], one, *many[1:]]


def test_a_project_cannot_flood_the_workers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "MAX_WAITING", 2)
    first = store.ask_chore("default", "k", "1")
    store.ask_chore("default", "k", "2")
    with pytest.raises(QuotaExceeded):
        store.ask_chore("default", "k", "3")
    assert store.ask_chore("default", "k", "1").id == first.id
    assert store.ask_chore("other", "k", "3").status == "waiting"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("a\0b", "a\ufffdb"),
        ("\ud800é", "?é"),
        (float("nan"), None),
        ({"\0": [float("inf"), 1.5, None, True]}, {"\ufffd": [None, 1.5, None, True]}),
    ],
)
def test_text_that_a_database_refuses_is_kept_as_what_it_takes(
    store: Store, value: Any, kept: Any
) -> None:
    store.ask_chore("default", "k", "s")
    claim = claimed(store)
    store.finish_chore(claim, {"value": value})
    assert store.get_chore("default", claim.id).result == {"value": kept}


def test_the_sweeper_takes_back_what_stands_still(store: Store, quick: Settings) -> None:
    store.ask_chore("default", "k", "s")
    claimed(store)
    sweeper = Sweeper(quick.model_copy(update={"lease_seconds": 0.4}), store, NullBell())
    until = time.monotonic() + 10
    while not sweeper.sweep():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert claimed(store, "w2").attempt == 2


def test_a_chat_is_claimed_apart_tells_where_it_is_and_goes_with_its_lease(store: Store) -> None:
    asked = store.ask_chore("default", chores.CHAT, "local/tiny", {"model_version": None})
    other = store.ask_chore("default", "preview", "file-1")
    assert claimed(store).id == other.id
    assert store.claim_chore("w1") is None
    assert store.chores_waiting(chores.CHAT) == 1
    claim = store.claim_chore("w1", chat=True)
    assert claim is not None
    assert claim.id == asked.id
    store.withdraw_chore("default", asked.id)
    place = {"url": "http://127.0.0.1:9", "token": "t"}
    store.publish_chore(claim, place)
    found = store.ask_chore("default", chores.CHAT, "local/tiny", {"model_version": None})
    assert (found.id, found.status, found.result) == (asked.id, "running", place)
    (lease,) = (lease for lease in store.chore_leases() if lease.job_id == asked.id)
    assert store.expire_chore(lease, max_failures=3)
    with pytest.raises(LeaseLost):
        store.publish_chore(claim, place)
    again = store.ask_chore("default", chores.CHAT, "local/tiny", {"model_version": None})
    assert (again.id != asked.id, again.status, again.result) == (True, "waiting", None)
    store.withdraw_chore("default", again.id)
    assert not store.list_chores("default", chores.CHAT).items
