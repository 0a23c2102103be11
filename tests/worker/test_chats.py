"""What becomes of a chat, whatever its child does and whoever wants its slot: no row that lies, no child that stays."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.chores import CHAT
from jobs.settings import Settings
from jobs.spec import ChoreRecord
from jobs.store import Store
from tests.service import eventually
from worker.chats import ChatRunner
from worker.janitor import STALE_CHORE_SECONDS, Janitor

CHILD = Path(__file__).with_name("chat_child.py")


def begin(store: Store, settings: Settings, name: str) -> ChatRunner:
    model = settings.data_dir / "models" / name
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    store.ask_chore("default", CHAT, f"local/{name}")
    claim = store.claim_chore("w", chat=True)
    assert claim is not None
    program = (sys.executable, str(CHILD))
    return ChatRunner(settings, store, claim, "", threading.Event(), program=program)


@contextmanager
def running(chat: ChatRunner) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=chat.run)
    thread.start()
    try:
        yield thread
    finally:
        chat.stopping.set()
        thread.join(15)
        assert not thread.is_alive()


def row(store: Store) -> ChoreRecord | None:
    return next(iter(store.list_chores("default", CHAT).items), None)


def published(store: Store) -> dict[str, str] | None:
    found = row(store)
    return found.result if found else None


def test_the_row_says_where_it_listens_and_goes_when_nobody_asks(
    store: Store, quick: Settings
) -> None:
    chat = begin(store, quick.model_copy(update={"chat_idle_seconds": 1.0}), "silent")
    with running(chat) as thread:
        place = eventually(lambda: published(store), seconds=15)
        assert place["url"] == "http://127.0.0.1:9"
        assert len(place["token"]) > 30
        thread.join(15)
        assert not thread.is_alive()
    assert row(store) is None
    assert not chat.folder.exists()


def test_who_has_to_leave_is_found_by_nobody_and_ends_its_sentence(
    store: Store, quick: Settings
) -> None:
    chat = begin(store, quick, "brief")
    with running(chat) as thread:
        eventually(lambda: published(store) and chat.idle_seconds == 0.0, seconds=15)
        chat.leaving.set()
        eventually(lambda: row(store) is None, seconds=5)
        time.sleep(0.5)
        assert thread.is_alive()
        (chat.folder / "enough").touch()
        thread.join(5)
        assert not thread.is_alive()


def test_a_sentence_without_end_is_cut_off(store: Store, quick: Settings) -> None:
    chat = begin(store, quick.model_copy(update={"grace_seconds": 0.5}), "talker")
    with running(chat) as thread:
        eventually(lambda: published(store), seconds=15)
        chat.leaving.set()
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("name", "code"), [("crash", "internal_error"), ("refuse", "model_unsupported")]
)
def test_a_model_that_cannot_be_loaded_says_so(
    store: Store, quick: Settings, name: str, code: str
) -> None:
    begin(store, quick, name).run()
    failed = row(store)
    assert failed is not None
    assert (failed.status, failed.result) == ("failed", None)
    assert failed.error is not None
    assert failed.error["code"] == code


def test_a_lost_lease_ends_the_child(store: Store, quick: Settings) -> None:
    chat = begin(store, quick, "silent")
    with running(chat) as thread:
        eventually(lambda: published(store), seconds=15)
        (lease,) = store.chore_leases()
        assert store.expire_chore(lease, max_failures=3) or store.expire_chore(
            store.chore_leases()[0], max_failures=3
        )
        thread.join(5)
        assert not thread.is_alive()
    assert row(store) is None


def test_the_janitor_spares_the_folder_of_a_long_talk(store: Store, quick: Settings) -> None:
    chat = begin(store, quick, "silent")
    long_ago = time.time() - STALE_CHORE_SECONDS - 60
    with running(chat):
        eventually(lambda: published(store), seconds=15)
        forgotten = chat.folder.parents[1] / "chore_forgotten"
        forgotten.mkdir()
        for folder in (forgotten, chat.folder.parent):
            os.utime(folder, (long_ago, long_ago))
        Janitor(quick, store).tidy(now=True)
        assert chat.folder.exists()
        assert not forgotten.exists()
