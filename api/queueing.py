"""Why a job waits, and when it may start: the queue and the workers as this process sees them.

The queue is read at most once a second, however many ask. A worker counts as alive while its heartbeat moves on this
process's own clock. Times are a range between two replays of the queue: one in which what runs and what waits before takes
as long as the quicker quarter of past runs did, and one with the slower quarter. Where too little is known no time is
said: a wrong promise is worse than none.
"""

import heapq
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.settings import Settings
from jobs.spec import JobRecord, WorkerRecord
from jobs.states import WAITING, Stage
from jobs.store import Store
from jobs.waiting import Line, Waiter

FRESH_SECONDS = 1.0
FEWEST_PAST = 5
# What a run says of its own end is not exact.
ETA_LOW, ETA_HIGH = 0.9, 1.3


@dataclass(frozen=True, kw_only=True)
class Place:
    """Why one job waits. `starts` are Unix seconds between which it may start."""

    stage: Stage
    position: int
    reason: str
    message: str
    starts: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The queue at one moment; `slots`, `hardware` and `integrations` are those of living workers."""

    lines: dict[Stage, Line]
    slots: dict[Stage, int]
    workers: int
    hardware: tuple[dict[str, Any] | None, ...]
    integrations: frozenset[str]
    taken_at: float


class Queueing:
    """What this process knows of the queue; safe for threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._lock = threading.Lock()
        self._last: Snapshot | None = None
        self._beats: dict[str, tuple[int, float]] = {}

    def snapshot(self, *, fresh_seconds: float = FRESH_SECONDS) -> Snapshot:
        """The queue, at most so old."""
        with self._lock:
            if self._last is None or time.monotonic() - self._last.taken_at > fresh_seconds:
                alive = self._alive(self._store.workers())
                self._last = Snapshot(
                    lines=self._store.lines(),
                    slots={s: sum(w.slots.get(s.value, 0) for w in alive) for s in Stage},
                    workers=len(alive),
                    hardware=tuple(w.hardware for w in alive),
                    integrations=frozenset(t for w in alive for t in w.integrations or ()),
                    taken_at=time.monotonic(),
                )
            return self._last

    def place(self, job: JobRecord) -> Place | None:
        """Why the job waits; None for one that does not."""
        stage = next((s for s in Stage if WAITING[s] == job.status), None)
        if stage is None or job.owner is not None:
            return None
        for fresh_seconds in (FRESH_SECONDS, 0.0):
            # A job that has just come is not in a picture of before.
            seen = self.snapshot(fresh_seconds=fresh_seconds)
            for number, waiter in enumerate(seen.lines[stage].waiting):
                if waiter.job_id == job.id:
                    return self.place_of(seen, stage, number)
        return None

    def place_of(self, seen: Snapshot, stage: Stage, index: int) -> Place:
        """The place of a job of the snapshot."""
        line, waiter = seen.lines[stage], seen.lines[stage].waiting[index]
        slots, busy = seen.slots[stage], len(line.left)
        reason, why = _why(seen, stage, waiter, index, slots, busy)
        starts = None
        if reason in ("slots_busy", "jobs_before", "starting", "retry_wait"):
            starts = _starts(line, slots, index, waiter, self._settings.sweep_seconds)
        position = index + 1
        depth = len(line.waiting)
        return Place(
            stage=stage,
            position=position,
            reason=reason,
            message=f"Place {position} of {depth} in the queue to {stage}: {why}",
            starts=starts,
        )

    def newcomer(self) -> tuple[float, float] | None:
        """Between which seconds from now a job that came now would find a slot to train in, were its data ready."""
        seen = self.snapshot()
        before = 0
        spans = []
        for stage in Stage:
            line = seen.lines[stage]
            before += len(line.waiting)
            spans.append(_free_in(line, seen.slots[stage], before))
            # What is being prepared will wait to train before it.
            before += len(line.left)
        known = [span for span in spans if span is not None]
        if len(known) < len(spans):
            return None
        low, high = (max(ends) for ends in zip(*known, strict=True))
        return low, high + self._settings.sweep_seconds

    def _alive(self, workers: Sequence[WorkerRecord]) -> list[WorkerRecord]:
        now, limit = time.monotonic(), self._settings.lease_seconds
        seen: dict[str, tuple[int, float]] = {}
        for worker in workers:
            before = self._beats.get(worker.id)
            if before is None:
                # Never seen: its own word on its last beat is all there is, until it is seen to move.
                silent = min(max(0.0, time.time() - worker.beat_at), 2 * limit)
                seen[worker.id] = (worker.beat_seq, now - silent)
            else:
                seen[worker.id] = before if before[0] == worker.beat_seq else (worker.beat_seq, now)
        self._beats = seen
        return [w for w in workers if now - seen[w.id][1] <= limit]


def _why(
    seen: Snapshot, stage: Stage, waiter: Waiter, index: int, slots: int, busy: int
) -> tuple[str, str]:
    if not seen.workers:
        return "no_worker", "no worker is alive"
    if not slots:
        return "no_slot", f"no living worker has a slot to {stage}"
    if stage is Stage.TRAIN and not any(waiter.fits(h) for h in seen.hardware):
        return "no_fitting_worker", f"no living worker has {_needed(waiter)}"
    if waiter.over_limit:
        return "project_limit", "the project already runs as many jobs as it may"
    if waiter.not_before > time.time():
        left = waiter.not_before - time.time()
        return "retry_wait", f"it is tried again in {left:.0f} s"
    if busy >= slots:
        noun = "slot is" if slots == 1 else "slots are"
        return "slots_busy", f"{busy} of {slots} {noun} busy"
    if index >= slots - busy:
        return "jobs_before", f"{slots - busy} of {slots} slots are free, and other jobs come first"
    return "starting", f"{slots - busy} of {slots} slots are free, a worker is about to take it"


def _needed(waiter: Waiter) -> str:
    device = {None: "a machine", "cpu": "a machine without GPU", "gpu": "a GPU"}[
        waiter.needs_device
    ]
    if waiter.needs_memory is None:
        return device
    return f"{device} with {waiter.needs_memory / 2**30:g} GiB of memory"


def _starts(
    line: Line, slots: int, index: int, waiter: Waiter, sweep_seconds: float
) -> tuple[float, float] | None:
    span = _free_in(line, slots, index)
    if span is None:
        return None
    low, high = (max(time.time() + end, waiter.not_before) for end in span)
    return low, high + sweep_seconds


def _free_in(line: Line, slots: int, index: int) -> tuple[float, float] | None:
    """Between which seconds from now a slot is free for the job at `index`."""
    quick, slow = _past(line)
    low = _replay(line, slots, index, quick, ETA_LOW)
    high = _replay(line, slots, index, slow, ETA_HIGH)
    return None if low is None or high is None else (low, high)


def _past(line: Line) -> tuple[float | None, float | None]:
    if len(line.past_seconds) < FEWEST_PAST:
        return None, None
    quarters = statistics.quantiles(line.past_seconds, n=4)
    return max(0.0, quarters[0]), quarters[2]


def _replay(line: Line, slots: int, index: int, usual: float | None, factor: float) -> float | None:
    """Seconds until a slot is free for the job at `index`, if each job takes `usual`; None where that is not known."""
    free: list[float] = [0.0] * max(0, slots - len(line.left))
    for so_far, eta in line.left:
        if eta is not None:
            free.append(factor * eta)
        elif usual is not None:
            free.append(max(0.0, usual - so_far))
        else:
            free.append(float("inf"))
    heapq.heapify(free)
    for _ in range(index):
        begin = heapq.heappop(free)
        heapq.heappush(free, float("inf") if usual is None else begin + usual)
    return free[0] if free and free[0] != float("inf") else None
