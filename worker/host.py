"""Everything one worker does on one host: look for jobs, run them in slots, look after the jobs of others, and send webhooks.

Models that answer (`worker.chats`) stand in slots that no job wants: one leaves as soon as a job waits and no slot is free.

Looking is cheap and harmless in any number, so it happens at every bell and, because bells may be lost, every few seconds
besides: a job starts within one sweep even where no message ever arrives.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from jobs.chores import CHAT
from jobs.errors import StoreUnavailable
from jobs.queue import Bell
from jobs.settings import Settings
from jobs.states import Stage
from jobs.store import Store
from worker.chats import ChatRunner
from worker.chores import ChoreRunner
from worker.herald import Herald
from worker.janitor import Janitor
from worker.postman import Postman
from worker.runner import Runner
from worker.slots import Slot, Slots, count_gpus, hardware
from worker.sweeper import Sweeper

log = logging.getLogger(__name__)

# For what is under way when a worker ends.
LEAVING_SECONDS = 5.0
Work: TypeAlias = Runner | ChoreRunner | ChatRunner


class Host:
    """A worker process."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        bell: Bell,
        *,
        program: tuple[str, ...] | None = None,
    ) -> None:
        self.settings, self.store, self.bell, self.program = settings, store, bell, program
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.slots = Slots(cpu_slots=settings.cpu_slots, gpus=count_gpus())
        self.hardware = hardware()
        self.stopping = threading.Event()
        self._sweeper = Sweeper(settings, store, bell)
        self._janitor = Janitor(settings, store)
        self._postman = Postman(settings, store, self.stopping)
        self._herald = Herald(settings, store, self.stopping)
        self._runs: dict[threading.Thread, Work] = {}
        self._job_is_next = False
        self._lock = threading.Lock()
        self._clock = threading.Thread(target=self._tick, name="sweeper", daemon=True)

    def start(self) -> None:
        """Tell of this worker and begin."""
        log.info(
            "Worker %s with slots %s, data in %s", self.id, self.slots.total, self.settings.data_dir
        )
        self._clock.start()
        self._postman.start()
        self._herald.start()

    def stop(self) -> None:
        """Ask every child for a checkpoint, give the jobs back, wait for that."""
        self.stopping.set()
        # What was being claimed has begun by then, and nothing is claimed any more; a database may keep a claim for longer.
        claimed = self._lock.acquire(timeout=LEAVING_SECONDS)
        runs = list(self._runs)
        if claimed:
            self._lock.release()
        for thread in runs:
            thread.join(self.settings.grace_seconds + 5)
        until = time.monotonic() + LEAVING_SECONDS
        self._herald.stop(LEAVING_SECONDS)
        self._postman.stop(max(0.0, until - time.monotonic()))
        if self._clock.is_alive():
            self._clock.join(max(0.0, until - time.monotonic()))
        self._quietly(lambda: self.store.forget_worker(self.id))

    def look(self) -> None:
        """Claim what waits, for as long as slots are free."""
        for stage in Stage:
            while self._take_up(stage):
                pass

    def _take_up(self, stage: Stage) -> bool:
        """Claim one thing that waits, and begin it."""
        with self._lock:
            if self.stopping.is_set() or not (slot := self.slots.take(stage)):
                return False
            work = None
            try:
                work = self._claim(slot)
            finally:
                if work is None:
                    self.slots.give(slot)
            if work is not None:
                self._launch(work, slot)
            return work is not None

    def _claim(self, slot: Slot) -> Work | None:
        """Work for a slot. Jobs and chores share the CPU slots by turns, so that neither starves; chats come last."""
        turns: list[Callable[[Slot], Work | None]] = [self._claim_job]
        if slot.stage is Stage.PREPARE:
            turns.insert(int(self._job_is_next), self._claim_chore)
        else:
            turns.append(self._claim_chat)
        try:
            for turn in turns:
                if work := turn(slot):
                    self._job_is_next = isinstance(work, ChoreRunner)
                    return work
        except StoreUnavailable as error:
            log.warning("%s", error)
        return None

    def _claim_job(self, slot: Slot) -> Runner | None:
        claim = self.store.claim(self.id, slot.stage, self.hardware)
        if claim is None:
            return None
        return Runner(
            self.settings, self.store, claim, slot.devices, self.stopping, program=self.program
        )

    def _claim_chore(self, _: Slot) -> ChoreRunner | None:
        claim = self.store.claim_chore(self.id)
        if claim is None:
            return None
        return ChoreRunner(self.settings, self.store, claim, self.stopping, program=self.program)

    def _claim_chat(self, slot: Slot) -> ChatRunner | None:
        claim = self.store.claim_chore(self.id, chat=True)
        if claim is None:
            return None
        return ChatRunner(
            self.settings, self.store, claim, slot.devices, self.stopping, program=self.program
        )

    def _make_room(self) -> None:
        """Ask a chat to leave: any for a job that waits, one that nobody talks to for another chat."""
        chats = [work for work in list(self._runs.values()) if isinstance(work, ChatRunner)]
        if not chats or any(c.leaving.is_set() for c in chats) or self.slots.free(Stage.TRAIN):
            return
        longest = max(chats, key=lambda chat: chat.idle_seconds)
        if self.store.slot_wanted(Stage.TRAIN, self.hardware) or (
            longest.idle_seconds and self.store.chores_waiting(CHAT)
        ):
            longest.leaving.set()

    def _launch(self, work: Work, slot: Slot) -> None:
        """Begin; the lock is held."""
        name = work.folder.parent.name

        def attend() -> None:
            try:
                work.run()
            except Exception:
                # The lease runs out by itself and the work goes on elsewhere; the worker must live.
                log.exception("The runner of %s broke", name)
            finally:
                self.slots.give(slot)
                with self._lock:
                    del self._runs[thread]
            self.look()

        thread = threading.Thread(target=attend, name=name, daemon=True)
        self._runs[thread] = work
        thread.start()

    def _tick(self) -> None:
        registered = False
        while not self.stopping.wait(self.settings.sweep_seconds if registered else 0.1):
            if not registered:
                registered = self._quietly(self._register)
            self._quietly(lambda: self.store.beat_worker(self.id))
            self._quietly(self._sweeper.sweep)
            self._quietly(self._janitor.tidy)
            self._quietly(self.look)
            self._quietly(self._make_room)

    def _register(self) -> None:
        self.store.register_worker(
            self.id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            slots=self.slots.total,
            hardware=self.hardware,
            integrations=self._herald.types,
        )

    def _quietly(self, action: Callable[[], object]) -> bool:
        """Do it; whatever goes wrong is logged, and the next round tries again: nothing else would look after the jobs."""
        try:
            action()
        except (StoreUnavailable, OSError) as error:
            log.warning("%s", error)
            return False
        except Exception:
            log.exception("A round of the worker broke")
            return False
        return True
