"""Status polls while a job trains: open loop at two rates, with ETag and without, and what that does to the training.

Beside them the ceilings of the generator and of the API, and the generator against a server that only answers at the same
rate: what that one's p99 is no service can be below on this machine at this moment.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import tracking
from benchmarks.load import Outcome, Plan, press, request
from benchmarks.report import figure, median
from benchmarks.servers import API, Server

CONNECTIONS = 32
P99_BARS_MS = {200: 20.0, 1000: 50.0}
Figures = list[dict[str, Any]]


@dataclass(frozen=True)
class Window:
    """One turn of an arm: when, what came back if anything was asked, and CPU seconds of the API."""

    start: float
    end: float
    outcome: Outcome | None
    cpu_seconds: float


def measure(
    server: Server, trivial: int, job_id: str, events: Path, *, database: str, rounds: int, seconds: float
) -> Figures:  # fmt: skip
    """Figures of polls for a job that trains; `trivial` is the port of a server that only answers."""
    found = _polled(server, trivial, job_id, database, rounds, seconds)
    return _figures(database, found, events)


def _polled(server: Server, trivial: int, job_id: str, database: str, rounds: int, seconds: float) -> dict[str, list[Window]]:  # fmt: skip
    path = f"/v1/fine_tuning/jobs/{job_id}"
    asked = request("GET", path, server.headers)
    arms: dict[str, Plan | None] = {"nobody asks": None}
    for rate in P99_BARS_MS:
        for etags in (True, False):
            arms[_arm(rate, etags)] = Plan(
                port=server.port, requests=[[asked]], connections=CONNECTIONS,
                seconds=seconds, rate=rate, etags=etags,
            )  # fmt: skip
    healthz = request("GET", "/healthz")
    for name, port in (("a server that only answers", trivial), ("/healthz", server.port)):
        arms[f"ceiling, {name}"] = Plan(
            port=port, requests=[[healthz]], connections=CONNECTIONS, seconds=seconds / 2
        )
    arms["1000/s to a server that only answers"] = Plan(
        port=trivial, requests=[[healthz]], connections=CONNECTIONS,
        seconds=seconds, rate=1000,
    )  # fmt: skip
    api = psutil.Process(server.pids[API])
    found: dict[str, list[Window]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm, plan in arms.items():
            started, used, outcome = time.time(), api.cpu_times(), None
            if plan:
                outcome = press(plan)
            else:
                time.sleep(seconds)
            now = api.cpu_times()
            cpu = now.user + now.system - used.user - used.system
            found[arm].append(Window(started, time.time(), outcome, cpu))
        print(f"{database}, polls: round {number + 1}/{rounds}", flush=True)
    return found


def _figures(database: str, found: dict[str, list[Window]], events: Path) -> Figures:
    figures = []
    outcomes = {arm: [w.outcome for w in windows if w.outcome] for arm, windows in found.items()}
    for rate, bar in P99_BARS_MS.items():
        for etags in (True, False):
            arm = _arm(rate, etags)
            told = f"{database}, training: polls {arm}"
            # Whole answers at the high rate have no bar: the issue counts 304 there.
            held = bar if etags or rate < max(P99_BARS_MS) else None
            p50 = [1000 * o.quantile(0.5) for o in outcomes[arm]]
            p99 = [1000 * o.quantile(0.99) for o in outcomes[arm]]
            figures += [
                median(f"{told}, p50", p50, "ms", better="lower"),
                median(f"{told}, p99", p99, "ms", held, better="lower"),
                median(f"{told}, answered", [o.per_second for o in outcomes[arm]], "1/s"),
            ]
            # What a busy machine changes least: it says how many a second one process could answer.
            cpu = [1000 * w.cpu_seconds / len(w.outcome.latencies) for w in found[arm] if w.outcome]
            figures.append(median(f"{told}, CPU of the API a request", cpu, "ms", better="lower"))
            failed = sum(sum(o.failures.values()) for o in outcomes[arm])
            figures.append(figure(f"{told}, failed or unanswered", failed, "", 0, "lower"))
            if etags:
                share = [100 * o.statuses.get(304, 0) / len(o.latencies) for o in outcomes[arm]]
                figures.append(median(f"{told}, 304", share, "%"))
    for arm in (a for a in outcomes if a.startswith("ceiling")):
        figures.append(median(f"{database}, training: {arm}", [o.per_second for o in outcomes[arm]], "1/s"))  # fmt: skip
    arm = "1000/s to a server that only answers"
    p99 = [1000 * o.quantile(0.99) for o in outcomes[arm]]
    figures.append(median(f"{database}, training: {arm}, p99", p99, "ms", better="lower"))
    lags = [1000 * o.lag for o in outcomes[_arm(1000, True)]]
    figures.append(median(f"{database}, training: generator's own lateness at 1000/s, p99", lags, "ms", better="lower"))  # fmt: skip
    return figures + _kept_speed(database, found, events)


def _kept_speed(database: str, found: dict[str, list[Window]], events: Path) -> Figures:
    """Steps a second while polled, as a share of those while nobody asks."""
    times = [e["time"] for e in map(json.loads, tracking.lines_of(events))]

    def speed(arm: str) -> list[float]:
        return [sum(w.start <= t < w.end for t in times) / (w.end - w.start) for w in found[arm]]

    quiet = speed("nobody asks")
    figures = [median(f"{database}: training steps, nobody asks", quiet, "1/s")]
    for rate in P99_BARS_MS:
        shares = [100 * s / q for s, q in zip(speed(_arm(rate, True)), quiet, strict=True) if q]
        figures.append(median(f"{database}: training speed kept, polls {_arm(rate, True)}", shares, "%"))  # fmt: skip
    return figures


def _arm(rate: int, etags: bool) -> str:
    return f"{rate}/s {'with ETag' if etags else 'whole answers'}"
