"""Everything one worker does on one host: look for jobs, run them in slots, look after the jobs of others, and send webhooks.

Looking is cheap and harmless in any number, so it happens at every bell and, because bells may be lost, every few seconds
besides: a job starts within one sweep even where no message ever arrives.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable

from jobs.errors import StoreUnavailable
from jobs.queue import Bell
from jobs.settings import Settings
from jobs.spec import Claim
from jobs.states import Stage
from jobs.store import Store
from worker.child import CORE
from worker.postman import Postman
from worker.runner import Runner
from worker.slots import Slot, Slots, count_gpus
from worker.sweeper import Sweeper

log = logging.getLogger(__name__)


class Host:
    """A worker process."""

    def __init__(
        self, settings: Settings, store: Store, bell: Bell, *, program: tuple[str, ...] = CORE
    ) -> None:
        self.settings, self.store, self.bell, self.program = settings, store, bell, program
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.slots = Slots(cpu_slots=settings.cpu_slots, gpus=count_gpus())
        self.stopping = threading.Event()
        self._sweeper = Sweeper(settings, store, bell)
        self._postman = Postman(settings, store, self.stopping)
        self._runs: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._clock = threading.Thread(target=self._tick, name="sweeper", daemon=True)

    def start(self) -> None:
        """Tell of this worker and begin."""
        log.info(
            "Worker %s with slots %s, data in %s", self.id, self.slots.total, self.settings.data_dir
        )
        self._clock.start()
        self._postman.start()

    def stop(self) -> None:
        """Ask every child for a checkpoint, give the jobs back, wait for that."""
        self.stopping.set()
        for thread in list(self._runs):
            thread.join(self.settings.grace_seconds + 5)
        self._quietly(lambda: self.store.forget_worker(self.id))

    def look(self) -> None:
        """Claim what waits, for as long as slots are free."""
        for stage in Stage:
            while not self.stopping.is_set() and (slot := self.slots.take(stage)):
                claim = self._claim(stage)
                if claim is None:
                    self.slots.give(slot)
                    break
                self._launch(claim, slot)

    def _claim(self, stage: Stage) -> Claim | None:
        try:
            return self.store.claim(self.id, stage)
        except StoreUnavailable as error:
            log.warning("%s", error)
            return None

    def _launch(self, claim: Claim, slot: Slot) -> None:
        def work() -> None:
            try:
                Runner(
                    self.settings,
                    self.store,
                    claim,
                    slot.devices,
                    self.stopping,
                    program=self.program,
                ).run()
            except Exception:
                # The lease runs out by itself and the job goes on elsewhere; the worker must live.
                log.exception("The runner of %s broke", claim.job_id)
            finally:
                self.slots.give(slot)
                with self._lock:
                    self._runs.remove(thread)
            self.look()

        thread = threading.Thread(target=work, name=claim.job_id, daemon=True)
        with self._lock:
            self._runs.append(thread)
        thread.start()

    def _tick(self) -> None:
        registered = False
        while not self.stopping.wait(self.settings.sweep_seconds if registered else 0.1):
            if not registered:
                registered = self._quietly(self._register)
            self._quietly(lambda: self.store.beat_worker(self.id))
            self._quietly(self._sweeper.sweep)
            self.look()

    def _register(self) -> None:
        self.store.register_worker(
            self.id, hostname=socket.gethostname(), pid=os.getpid(), slots=self.slots.total
        )

    def _quietly(self, action: Callable[[], object]) -> bool:
        """Do it; a database that is away is logged, and the next round tries again."""
        try:
            action()
        except StoreUnavailable as error:
            log.warning("%s", error)
            return False
        return True
