"""Streams of a job: what the official client reads, what comes again after a break, what they cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from api.app import create_app

from .conftest import KEY
from .finished import claim_job, events, finish_job, new_job, train_job
from .serving import served


@pytest.fixture
def app(settings):
    return create_app(settings.model_copy(update={"streams_per_key": 3}))


@pytest.fixture
def address(app):
    with served(app) as found:
        yield found


@pytest.fixture
def sdk(address):
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def services(app, address):
    return app.state.services


def stream(sdk, job: str, **query):
    return sdk.get(
        f"/fine_tuning/jobs/{job}/stream",
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
        options={"params": query} if query else {},
    )


def test_the_official_client_follows_a_job_to_its_end(sdk, services):
    job = new_job(services)
    claim = claim_job(services, 30)
    services.store.record(claim, events(1, 10, 30), run="r", read_position=1)
    later = threading.Timer(1.5, lambda: finish_job(services, 30, claim, first=11))
    later.start()
    seen = list(stream(sdk, job))
    later.join()
    assert all(isinstance(event, FineTuningJobEvent) for event in seen)
    kept = [event for event in seen if event.data["kind"] != "progress"]
    listed = list(sdk.fine_tuning.jobs.list_events(job, limit=100))
    assert [event.id for event in kept] == [event.id for event in listed][::-1]
    progress = [event for event in seen if event.data["kind"] == "progress"]
    assert progress[0].data["step"] == 10
    assert progress[0].type == "metrics"
    assert seen[-1].message.startswith("Succeeded")
    # An ended job's stream is its history.
    assert [e.id for e in stream(sdk, job)] == [e.id for e in kept]
    assert [e.id for e in stream(sdk, job, after=kept[-3].id)] == [e.id for e in kept[-2:]]


def lines_of(
    address: str, job: str, headers: dict[str, str] | None = None, **query
) -> Iterator[str]:
    with httpx.stream(
        "GET",
        f"{address}/v1/fine_tuning/jobs/{job}/stream",
        headers={"authorization": f"Bearer {KEY}", **(headers or {})},
        params=query,
        timeout=30,
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        yield from answer.iter_lines()


def test_blocks_are_such_that_every_client_can_read_them(address, services):
    job = new_job(services)
    finish_job(services, steps=5)
    lines = list(lines_of(address, job))
    assert lines[0] == "retry: 3000"
    assert [line for line in lines if line.startswith("retry")] == lines[:1]
    blocks = "\n".join(lines).strip().split("\n\n")
    assert all("data: " in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    numbers = [int(line[4:]) for line in lines if line.startswith("id: ")]
    assert numbers == sorted(numbers)
    rest = list(lines_of(address, job, {"last-event-id": str(numbers[1])}, after=str(numbers[0])))
    assert [int(line[4:]) for line in rest if line.startswith("id: ")] == numbers[2:]
    ended = list(lines_of(address, job, {"last-event-id": str(numbers[-1])}))
    assert [line for line in ended if line] == ["retry: 3000", "data: [DONE]"]


def test_a_silent_stream_pings_without_a_blank_line(address, services, monkeypatch):
    monkeypatch.setattr("api.streams.HEARTBEAT_SECONDS", 0.2)
    job = new_job(services)
    claim = claim_job(services, 9)
    lines = []
    for line in lines_of(address, job):
        lines.append(line)
        if lines.count(": ping") == 3 and line == ": ping":
            finish_job(services, 9, claim)
    pings = [i for i, line in enumerate(lines) if line == ": ping"]
    assert len(pings) >= 3
    assert all(lines[i + 1] for i in pings)


def test_streams_of_a_key_are_limited_and_freed(address, services, sdk):
    job = new_job(services)
    train_job(services, steps=2, total=9)
    opened = [stream(sdk, job) for _ in range(3)]
    for one in opened:
        next(iter(one))
    with pytest.raises(openai.RateLimitError, match="streams open") as refused:
        stream(sdk, job)
    assert refused.value.code == "too_many_streams"
    assert refused.value.response.headers["retry-after"] == "5"
    opened[0].close()
    deadline = time.monotonic() + 20
    while services.followers._seats.total() == 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    next(iter(stream(sdk, job)))
    with pytest.raises(openai.NotFoundError):
        stream(sdk, "ftjob-none")
    with pytest.raises(openai.BadRequestError, match="names no event"):
        stream(sdk, job, after="ftevent-none")
    for one in opened:
        one.close()


@pytest.mark.parametrize("by", ["revoking", "expiry"])
def test_a_stream_ends_with_its_key(address, services, sdk, monkeypatch, by):
    monkeypatch.setattr("api.streams.HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr("api.followers.KEY_SECONDS", 0.2)
    store = services.store
    _, key, secret = store.create_service_account("default", "ci", ("jobs:read",))
    job = new_job(services)
    claim = claim_job(services, 9)
    other = stream(sdk, job)
    keyed = sdk.with_options(api_key=secret)
    seen = iter(stream(keyed, job))
    next(seen)
    if by == "revoking":
        store.revoke_key("default", key.id)
    else:
        store.change_key("default", key.id, {"expires_at": time.time() - 1})
    with pytest.raises(openai.APIError, match="not valid any more") as ended:
        list(seen)
    assert ended.value.code == "invalid_api_key"
    finish_job(services, 9, claim)
    assert any(event.message.startswith("Succeeded") for event in other)
    if by == "expiry":
        store.change_key("default", key.id, {"expires_at": None})
        assert list(stream(keyed, job))


def test_an_idle_stream_holds_no_database_session(address, services, sdk):
    job = new_job(services)
    opened = [stream(sdk, job) for _ in range(3)]
    for one in opened:
        next(iter(one))
    held = []
    for _ in range(100):
        time.sleep(0.02)
        held.append(services.store._engine.pool.checkedout())
    # The one that all share asks now and then; between that nobody holds anything.
    assert max(held) <= 1
    assert held.count(0) > 50
    for one in opened:
        one.close()
    deadline = time.monotonic() + 20
    while services.followers._jobs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not services.followers._jobs
