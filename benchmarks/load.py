"""Requests by the thousand over kept connections: `press` sends a plan from a process of its own and times the answers.

Open loop (`rate` given): request i is due at i / rate, whatever became of those before it, and its time counts from when
it was due. So a server that stands still for a second is charged with every request that was due in it, which a client
that waits for answers never sends. Closed loop: each connection sends as soon as it has its answer.

The road not taken is a packaged generator: those that pip installs make a Python object or three of each request (httpx,
aiohttp, Locust) and need half a core for what is measured here, and those that do not (wrk, oha) cannot send back the
newest ETag as a polling client does. Parsing is llhttp's (`httptools`), the loop is libuv's (`uvloop`), both as in uvicorn.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop

# How long answers may stay out when the plan is over; what is still out then has failed, and counts as that late.
DRAIN_SECONDS = 10.0
TRIVIAL = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send: connection c goes round in `requests[c % len(requests)]`, or once through it where `once`."""

    port: int
    requests: Sequence[Sequence[bytes]]
    connections: int
    seconds: float
    rate: float | None = None
    etags: bool = False
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came back. `lags` are what the generator itself was late with a request that a connection was free for."""

    seconds: float
    latencies: tuple[float, ...]
    statuses: dict[int, int]
    lags: tuple[float, ...] = ()

    @property
    def per_second(self) -> float:
        """Answers a second, errors and losses left out."""
        good = sum(n for status, n in self.statuses.items() if 200 <= status < 400)
        return good / self.seconds

    def quantile(self, share: float) -> float:
        """The latency that `share` of all requests did not pass; unanswered ones count as very late."""
        return _quantile(self.latencies, share)

    @property
    def lag(self) -> float:
        """p99 of the generator's own lateness."""
        return _quantile(self.lags, 0.99)

    @property
    def failures(self) -> dict[int, int]:
        """Answers that are no success, by status; 0 is no answer."""
        return {status: n for status, n in self.statuses.items() if not 200 <= status < 400}


def request(
    method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> bytes:
    """The bytes of one request, for `Plan.requests`."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if method == "POST":
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def press(plan: Plan) -> Outcome:
    """Carry out the plan in a process of its own, so that it shares no interpreter lock with anyone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_press, (plan,))


@contextmanager
def trivial_server() -> Iterator[int]:
    """A server that does nothing but answer, on a port: what it can be asked is what the generator can send."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _press(plan: Plan) -> Outcome:
    return uvloop.run(_Generator(plan).run())


def _serve(pipe: Any) -> None:
    class Answering(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport: Any = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(TRIVIAL * data.count(b"\r\n\r\n"))

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


@dataclass
class _Generator:
    plan: Plan
    free: deque[_Connection] = field(default_factory=deque)
    waiting: deque[float] = field(default_factory=deque)
    latencies: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    out: int = 0
    last: float = 0.0

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        for number in range(self.plan.connections):
            own = self.plan.requests[number % len(self.plan.requests)]
            kept = iter(own) if self.plan.once else itertools.cycle(own)
            await loop.create_connection(
                lambda kept=kept: _Connection(self, kept),  # type: ignore[misc]
                "127.0.0.1",
                self.plan.port,
            )
        self.started = time.perf_counter()
        self.until = self.started + self.plan.seconds
        if self.plan.rate is None:
            for connection in [self.free.popleft() for _ in range(len(self.free))]:
                self.go_on(connection)
            await asyncio.sleep(self.plan.seconds)
        else:
            await self._keep_rate(self.plan.rate)
        limit = time.perf_counter() + DRAIN_SECONDS
        while (self.out or self.waiting) and time.perf_counter() < limit:  # noqa: ASYNC110 - every answer would set an event
            await asyncio.sleep(0.005)
        lost = self.out + len(self.waiting)
        self.statuses[0] += lost
        return Outcome(
            # To the last answer: a server that falls behind must not look as quick as the plan.
            seconds=max(self.last - self.started, 1e-9),
            latencies=tuple(self.latencies + [DRAIN_SECONDS] * lost),
            statuses={status: n for status, n in self.statuses.items() if n},
            lags=tuple(self.lags),
        )

    async def _keep_rate(self, rate: float) -> None:
        for number in range(round(self.plan.seconds * rate)):
            due = self.started + number / rate
            if (ahead := due - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            if self.free:
                self.lags.append(time.perf_counter() - due)
                self.free.popleft().send(due)
            else:
                self.waiting.append(due)

    def go_on(self, connection: _Connection) -> None:
        """What a connection does that has its answer."""
        if self.plan.rate is None:
            now = time.perf_counter()
            if now < self.until:
                connection.send(now)
        elif self.waiting:
            connection.send(self.waiting.popleft())
        else:
            self.free.append(connection)


class _Connection(asyncio.Protocol):
    def __init__(self, owner: _Generator, kept: Iterator[bytes]) -> None:
        self.owner, self.kept = owner, kept
        self.etag: bytes | None = None
        self.due: float | None = None
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.owner.free.append(self)

    def send(self, due: float) -> None:
        data = next(self.kept, None)
        if data is None:
            return
        if self.etag:
            head, _, body = data.partition(b"\r\n\r\n")
            data = head + b"\r\nif-none-match: " + self.etag + b"\r\n\r\n" + body
        self.due = due
        self.owner.out += 1
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.owner.plan.etags and name.lower() == b"etag":
            self.etag = value

    def on_message_complete(self) -> None:
        self._answered(self.parser.get_status_code())
        self.owner.go_on(self)

    def connection_lost(self, _: Exception | None) -> None:
        # Not opened again: connections are kept, and a server that closes one under load is charged with its request.
        if self.due is not None:
            self._answered(0)
        elif self in self.owner.free:
            self.owner.free.remove(self)

    def _answered(self, status: int) -> None:
        if self.due is None:
            return
        self.owner.last = time.perf_counter()
        good = 200 <= status < 400
        self.owner.latencies.append(self.owner.last - self.due if good else DRAIN_SECONDS)
        self.owner.statuses[status] += 1
        self.owner.out -= 1
        self.due = None


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
