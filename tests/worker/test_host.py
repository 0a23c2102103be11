"""A worker's own clock: nobody else sweeps, tidies and looks, so nothing may stop it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from jobs.db import make_engine
from jobs.queue import NullBell
from jobs.settings import Settings
from jobs.states import Stage
from jobs.store import Store
from tests.service import eventually
from tests.worker.test_runner import claim_for
from worker.host import Host

CHILD = Path(__file__).with_name("protocol_child.py")


class Broken(Store):
    """A store that fails in ways that nobody has thought of, some of them once."""

    claims = 0

    def claim_chore(self, *arguments: Any, **named: Any) -> Any:
        self.claims += 1
        if self.claims == 1:
            raise ZeroDivisionError
        return super().claim_chore(*arguments, **named)

    def leases(self) -> Any:
        raise ZeroDivisionError


class Slow(Store):
    """A store whose claims take a while."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.claiming = threading.Event()

    def claim(self, worker_id: str, stage: Stage, *arguments: Any) -> Any:
        if stage is Stage.TRAIN:
            self.claiming.set()
            time.sleep(0.3)
        return super().claim(worker_id, stage, *arguments)


def test_a_round_that_breaks_is_not_the_last(store: Store, quick: Settings) -> None:
    engine = make_engine(quick)
    host = Host(quick, Broken(engine), NullBell())
    host.start()
    try:
        eventually(lambda: any(w.beat_seq > 2 for w in store.workers()), seconds=10)
        eventually(lambda: host.slots.free(Stage.PREPARE), seconds=10)
    finally:
        host.stop()
        engine.dispose()
    assert store.workers() == []


def test_what_is_being_claimed_when_a_worker_ends_goes_back(store: Store, quick: Settings) -> None:
    claim = claim_for(store, quick, "hang")
    store.release(claim, "for another")
    engine = make_engine(quick)
    slow = Slow(engine)
    host = Host(quick, slow, NullBell(), program=(sys.executable, str(CHILD)))
    looking = threading.Thread(target=host.look)
    looking.start()
    assert slow.claiming.wait(10)
    host.stop()
    looking.join(10)
    assert store.leases() == []
    assert store.get_job("default", claim.job_id).failures == 0
    engine.dispose()
