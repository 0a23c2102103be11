"""Everybody in this process who waits for something to happen to a job: streams and long polls.

One task asks the database for all followed jobs together, a few times a second, and only while somebody follows: five
hundred idle clients cost one small query, and none of them holds a session. Their keys are asked for together too, less
often. New events are read once a job and kept in a short memory that all its streams read; one that begins further back,
or has fallen behind, reads the rest by pages. The road not taken is LISTEN/NOTIFY or Redis: SQLite has none, Redis may
vanish, and half a second is soon enough.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi.concurrency import run_in_threadpool

from api.errors import ApiError
from jobs.errors import StoreUnavailable
from jobs.pulses import Pulse
from jobs.spec import EventRecord
from jobs.store import Store

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
AWAY_SECONDS = 2.0
KEY_SECONDS = 15.0
REMEMBERED = 500
PAGE = 200


class Followed:
    """One job while somebody follows it. Events with numbers above `floor` are all in `recent`."""

    def __init__(self, pulse: Pulse, floor: int) -> None:
        self.pulse, self.floor = pulse, floor
        self.recent: deque[EventRecord] = deque()
        self.followers = 0
        self._turn = asyncio.Event()

    @property
    def last(self) -> int:
        """The number of the newest event that is known here."""
        return self.recent[-1].seq if self.recent else self.floor

    def took(self, pulse: Pulse, events: list[EventRecord]) -> None:
        """The job has changed: remember, and wake everybody."""
        self.pulse = pulse
        self.recent.extend(events)
        while len(self.recent) > REMEMBERED:
            self.floor = self.recent.popleft().seq
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    async def changed(self, version: int, seconds: float) -> bool:
        """Whether the version is another one, after waiting so long at the most."""
        if self.pulse.version == version:
            try:
                async with asyncio.timeout(seconds):
                    await self._turn.wait()
            except TimeoutError:
                return False
        return self.pulse.version != version


class Followers:
    """All followed jobs of this process, and who holds how many streams."""

    def __init__(self, store: Store, *, streams_per_key: int) -> None:
        self._store, self._streams_per_key = store, streams_per_key
        self._jobs: dict[str, Followed] = {}
        self._seats: Counter[str] = Counter()
        self._ended: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._key_task: asyncio.Task[None] | None = None

    def take_seat(self, key_id: str) -> None:
        """A place for one more stream of this key. Raises ApiError where it has too many."""
        if self._seats[key_id] >= self._streams_per_key:
            raise ApiError(
                "too_many_streams",
                f"This key has {self._seats[key_id]} streams open, as many as it may "
                "(SATUNE_STREAMS_PER_KEY); close one; a job can be polled with wait and version.",
                headers={"retry-after": "5"},
            )
        self._seats[key_id] += 1
        # It was valid a moment ago, whatever it was when it was last looked at.
        self._ended.discard(key_id)
        if self._key_task is None or self._key_task.done():
            self._key_task = asyncio.create_task(self._look_at_keys())

    def check_key(self, key_id: str) -> None:
        """For a stream that goes on. Raises ApiError where its key was not valid any more when keys were last looked at."""
        if key_id in self._ended:
            raise ApiError(
                "invalid_api_key",
                "This API key is not valid any more, so its streams have ended; open them with another key.",
            )

    def leave_seat(self, key_id: str) -> None:
        """The stream has ended."""
        self._seats[key_id] -= 1
        if not self._seats[key_id]:
            del self._seats[key_id]

    @asynccontextmanager
    async def following(self, project: str, job_id: str) -> AsyncIterator[Followed]:
        """The job, kept up to date until the block ends. Raises NotFound."""
        pulse = await run_in_threadpool(self._store.pulse, project, job_id)
        if job_id not in self._jobs:
            floor = await run_in_threadpool(self._store.last_event, job_id)
            # The pulse is older than the floor, so the next look finds the job changed rather than misses it.
            self._jobs.setdefault(job_id, Followed(pulse, floor))
        job = self._jobs[job_id]
        job.followers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            yield job
        finally:
            job.followers -= 1
            if not job.followers:
                self._jobs.pop(job_id, None)

    async def events_after(self, job_id: str, job: Followed, number: int) -> list[EventRecord]:
        """What was told after an event: from memory, or where that does not reach back so far, a page."""
        if number >= job.floor:
            return [event for event in job.recent if event.seq > number]
        return await run_in_threadpool(self._store.events_after, job_id, number, limit=PAGE)

    async def _look(self) -> None:
        while self._jobs:
            await asyncio.sleep(POLL_SECONDS)
            try:
                pulses = await run_in_threadpool(self._store.pulses, list(self._jobs))
                for job_id, pulse in pulses.items():
                    await self._take(job_id, pulse)
            except StoreUnavailable as error:
                log.warning("Followers wait: %s", error)
                await asyncio.sleep(AWAY_SECONDS)

    async def _look_at_keys(self) -> None:
        while self._seats:
            await asyncio.sleep(KEY_SECONDS)
            held = set(self._seats)
            try:
                self._ended = held - await run_in_threadpool(self._store.valid_keys, held)
            except StoreUnavailable as error:
                log.warning("Keys of streams are not looked at: %s", error)

    async def _take(self, job_id: str, pulse: Pulse) -> None:
        job = self._jobs.get(job_id)
        if job is None or pulse.version == job.pulse.version:
            return
        events: list[EventRecord] = []
        while True:
            last = events[-1].seq if events else job.last
            page = await run_in_threadpool(self._store.events_after, job_id, last, limit=PAGE)
            events += page
            if len(page) < PAGE:
                break
        job.took(pulse, events)
