"""What the runner of chores does with every way a child may end: the chore has its end, and the worker lives."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from jobs.settings import Settings
from jobs.spec import ChoreRecord
from jobs.store import Store
from tests.service import eventually
from worker.child import Bounds
from worker.chores import ChoreRunner
from worker.kinds import KINDS, Kind

CHILD = Path(__file__).with_name("chore_child.py")
BOUNDS = Bounds(memory_bytes=512 * 2**20, file_bytes=2**20)


def kind(seconds: float = 20) -> Kind:
    return Kind(
        command="behave",
        config=lambda chore, _: chore.params,
        result="result.json",
        seconds=seconds,
        bounds=BOUNDS,
    )


def claim_for(store: Store, behaviour: str) -> ChoreRecord:
    store.ask_chore("default", "behave", "s", {"behaviour": behaviour})
    claim = store.claim_chore("w")
    assert claim is not None
    return claim


def runner(store: Store, quick: Settings, claim: ChoreRecord, seconds: float = 20) -> ChoreRunner:
    return ChoreRunner(
        quick,
        store,
        claim,
        threading.Event(),
        program=(sys.executable, str(CHILD)),
        kinds={"behave": kind(seconds)},
    )


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("refuse", "dataset_invalid", "line 3 is bad"),
        ("crash", "internal_error", "exit code 3"),
        ("kill", "internal_error", "signal 9"),
        ("grow", "out_of_memory", "MemoryError"),
        ("flood", "internal_error", "signal 25"),
        ("big_log", "internal_error", "signal 25"),
        ("no_result", "internal_error", "no readable result"),
        ("half_result", "internal_error", "no readable result"),
        ("list_result", "internal_error", "no JSON object"),
    ],
)
def test_a_hostile_child_fails_its_chore_and_nothing_else(
    store: Store, quick: Settings, behaviour: str, code: str, words: str
) -> None:
    claim = claim_for(store, behaviour)
    runner(store, quick, claim).run()
    ended = store.get_chore("default", claim.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error["code"] == code
    assert words in ended.error["message"]
    assert not (quick.data_dir / "chores" / claim.id).exists()


def test_a_result_is_read_and_the_folder_goes(store: Store, quick: Settings) -> None:
    claim = claim_for(store, "succeed")
    runner(store, quick, claim).run()
    ended = store.get_chore("default", claim.id)
    assert (ended.status, ended.result) == ("succeeded", {"nice": 10})
    assert not (quick.data_dir / "chores" / claim.id).exists()


def test_a_chore_that_was_taken_back_leaves_its_successor_alone(
    store: Store, quick: Settings
) -> None:
    claim = claim_for(store, "succeed")
    lost = runner(store, quick, claim)
    (lease,) = store.chore_leases()
    assert store.expire_chore(lease, max_failures=3)
    again = store.claim_chore("w2")
    assert again is not None
    successor = runner(store, quick, again)
    successor.folder.mkdir(parents=True)
    lost.run()
    assert successor.folder.is_dir()
    assert not lost.folder.exists()


def test_a_child_that_never_ends_is_ended(store: Store, quick: Settings) -> None:
    claim = claim_for(store, "hang")
    runner(store, quick, claim, seconds=0.5).run()
    ended = store.get_chore("default", claim.id)
    assert ended.error is not None
    assert ended.error["code"] == "time_limit_exceeded"


def test_a_worker_that_ends_gives_its_chore_back(store: Store, quick: Settings) -> None:
    claim = claim_for(store, "hang")
    work = runner(store, quick, claim)
    thread = threading.Thread(target=work.run)
    thread.start()
    work.stopping.set()
    thread.join(10)
    assert not thread.is_alive()
    again = store.get_chore("default", claim.id)
    assert (again.status, again.failures, again.owner) == ("waiting", 0, None)


def test_a_forgotten_chore_takes_its_child_with_it(store: Store, quick: Settings) -> None:
    claim = claim_for(store, "hang")
    work = runner(store, quick, claim)
    thread = threading.Thread(target=work.run)
    thread.start()
    pid = work.folder / "pid"
    eventually(lambda: pid.exists() and pid.read_text(), seconds=60)
    child = Path(f"/proc/{pid.read_text()}")
    assert child.exists()
    store.delete_chore("default", claim.id)
    thread.join(10)
    assert not thread.is_alive()
    assert not child.exists()


@pytest.mark.parametrize(
    ("name", "code"), [("preview", "file_not_found"), ("unheard_of", "internal_error")]
)
def test_what_cannot_be_begun_is_said(store: Store, quick: Settings, name: str, code: str) -> None:
    store.ask_chore("default", name, "file-none", {"request": {"model": "a/b"}, "rows": 1})
    claim = store.claim_chore("w")
    assert claim is not None
    ChoreRunner(quick, store, claim, threading.Event()).run()
    ended = store.get_chore("default", claim.id)
    assert ended.error is not None
    assert ended.error["code"] == code


def test_every_kind_is_bounded() -> None:
    for found in KINDS.values():
        assert 0 < found.seconds <= 3600
        assert found.bounds.memory_bytes > 0
        assert found.bounds.file_bytes > 0
