"""A worker's own clock: nobody else sweeps, tidies and looks, so nothing may stop it."""

from __future__ import annotations

from typing import Any

from jobs.db import make_engine
from jobs.queue import NullBell
from jobs.settings import Settings
from jobs.states import Stage
from jobs.store import Store
from tests.service import eventually
from worker.host import Host


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


def test_a_round_that_breaks_is_not_the_last(store: Store, quick: Settings) -> None:
    engine = make_engine(quick)
    host = Host(quick, Broken(engine), NullBell())
    host.start()
    try:
        eventually(lambda: any(w.beat_seq > 2 for w in store.workers()), seconds=10)
        assert host.slots.free(Stage.PREPARE)
    finally:
        host.stop()
        engine.dispose()
    assert store.workers() == []
