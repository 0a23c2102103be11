"""Trying a model: the official client, a real worker, a real child; what comes and goes around them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from jobs.db import make_engine
from jobs.settings import Settings
from jobs.store import Store
from tests.cli.running import satune
from tests.sat_core.tiny import write_model, write_text
from tests.servers import alive, command_of
from tests.service import KEY, Worker, api, eventually

HELLO: Any = [{"role": "user", "content": "a b"}]


class Running:
    """API and worker, as processes."""

    def __init__(self, settings: Settings, client: httpx.Client) -> None:
        self.settings, self.http = settings, client
        self.worker = Worker(settings)
        self.sdk = openai.OpenAI(
            base_url=str(client.base_url.join("/v1")), api_key=KEY, _strict_response_validation=True
        )
        self.store = Store(make_engine(settings))

    def chats(self) -> list[psutil.Process]:
        return [p for p in self.worker.children() if "chat" in command_of(p)]

    def close(self) -> None:
        self.sdk.close()
        self.worker.stop()
        self.store._engine.dispose()


@pytest.fixture
def settings(quick: Settings, broker_url: str) -> Settings:
    for name in ("tiny", "other"):
        write_model(quick.data_dir / "models" / name)
    return quick.model_copy(update={"broker_url": broker_url, "lease_seconds": 6.0})


@pytest.fixture
def running(settings: Settings) -> Iterator[Running]:
    with api(settings) as client:
        found = Running(settings, client)
        try:
            eventually(found.store.workers, seconds=60)
            yield found
        finally:
            found.close()


def ask(running: Running, **more: Any) -> Any:
    more = {"model": "local/tiny", "messages": HELLO, "max_completion_tokens": 8, "seed": 1, **more}
    return running.sdk.chat.completions.create(**more)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_official_client_talks_to_a_model(running: Running) -> None:
    # An unmodified client with its two retries; the model loads meanwhile.
    whole = ask(running)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 8)
    assert whole.usage.total_tokens == 13
    text = whole.choices[0].message.content
    assert ask(running).choices[0].message.content == text, "a seed gives the same answer"
    assert ask(running, seed=2).choices[0].message.content != text

    pieces = list(ask(running, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage
    assert not pieces[-1].choices
    assert len({p.id for p in pieces}) == 1
    assert all(p.usage is None for p in ask(running, stream=True))

    stop = text.split()[2]
    cut = ask(running, stop=[stop, "nowhere"])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    greedy = [ask(running, temperature=0, seed=seed).choices[0].message.content for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    # What came can be sent back as it came, and text in parts is text.
    turns = [
        *HELLO,
        whole.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    assert ask(running, messages=turns, max_completion_tokens=1).usage.prompt_tokens > 13

    with pytest.raises(openai.BadRequestError, match="holds 64 tokens") as long:
        ask(running, max_completion_tokens=60)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="holds 64 tokens"):
        ask(running, messages=[{"role": "user", "content": "a " * 80}], stream=True)

    server = {"SATUNE_URL": str(running.http.base_url), "SATUNE_API_KEY": KEY}
    asked = ("chat", "local/tiny", "a b", "--max-tokens", "8", "--seed", "1")
    said = satune(*asked, **server)
    assert (said.returncode, said.stdout) == (0, f"{text}\n"), said.stderr
    assert json.loads(satune(*asked, "--json", **server).stdout)["usage"]["total_tokens"] == 13
    none = satune("chat", "local/none", "a", **server)
    assert (none.returncode, none.stdout) == (4, "")
    long_one = satune("chat", "local/tiny", "a", "--max-tokens", "99", **server)
    assert (long_one.returncode, "holds 64 tokens" in long_one.stderr) == (2, True)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_job_takes_the_slot_and_its_result_answers_after(running: Running) -> None:
    quick = running.sdk.with_options(max_retries=0)
    base = ask(running, temperature=0).choices[0].message.content
    (first,) = running.chats()
    data = write_text(running.settings.data_dir / "d.jsonl").read_bytes()
    file = running.sdk.files.create(file=("d.jsonl", data), purpose="fine-tune")
    sat = {
        "train": {"max_steps": 900, "max_seq_len": 32, "learning_rate": 1e-2},
        "data": {"validation_split": 0},
        "checkpoints": {"every": 20},
    }
    job = running.sdk.fine_tuning.jobs.create(
        model="local/tiny", training_file=file.id, extra_body={"sat": sat}
    )
    status = lambda: running.sdk.fine_tuning.jobs.retrieve(job.id).status  # noqa: E731
    eventually(lambda: status() == "running", seconds=90)
    assert not alive(first)
    with pytest.raises(openai.InternalServerError, match="1 of 1 slots train") as busy:
        quick.chat.completions.create(model="local/tiny", messages=HELLO)
    assert (busy.value.status_code, busy.value.code) == (503, "gpu_busy")
    assert busy.value.response.headers["retry-after"]

    eventually(lambda: running.sdk.fine_tuning.jobs.checkpoints.list(job.id).data, seconds=60)
    running.sdk.fine_tuning.jobs.pause(job.id)
    eventually(
        lambda: running.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["status"] == "paused",
        seconds=60,
    )
    saved = running.sdk.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    name = saved.fine_tuned_model_checkpoint
    assert ask(running, model=name, temperature=0).choices[0].message.content != base
    # A chat that nobody talks to makes room for another one.
    assert ask(running, temperature=0).choices[0].message.content == base
    assert len(running.chats()) == 1


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_who_leaves_ends_the_answer(running: Running) -> None:
    ask(running, max_completion_tokens=1)
    (child,) = running.chats()
    slow = {"model": "local/tiny", "messages": HELLO, "max_tokens": 59, "seed": 1}

    def leave(stream: bool) -> None:
        request = running.http.build_request(
            "POST", "/v1/chat/completions", json={**slow, "stream": stream}
        )
        raw = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {request.url.netloc.decode()}\r\n"
        raw += "".join(f"{k}: {v}\r\n" for k, v in request.headers.items() if k.lower() != "host")
        with socket.create_connection((request.url.host, request.url.port)) as connection:
            connection.sendall(raw.encode() + b"\r\n" + request.content)
            time.sleep(0.3)

    # The child stands still, so that the answer cannot have ended by itself when its client leaves.
    for stream in (True, False):
        child.suspend()
        leave(stream)
        time.sleep(1.5)
        child.resume()
        before = time.monotonic()
        assert ask(running).usage.completion_tokens == 8
        assert time.monotonic() - before < 10
    assert running.chats() == [child]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_killed_worker_takes_its_chats_and_another_one_answers(running: Running) -> None:
    ask(running)
    (child,) = running.chats()
    running.worker.kill()
    eventually(lambda: not alive(child), seconds=30)
    running.worker = Worker(running.settings)
    eventually(lambda: len(running.store.workers()) == 2, seconds=60)
    assert ask(running).choices[0].message.content


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_an_idle_model_is_unloaded_and_its_row_goes(settings: Settings) -> None:
    idle = settings.model_copy(update={"chat_idle_seconds": 5.0})
    with api(idle) as client:
        running = Running(idle, client)
        try:
            eventually(running.store.workers, seconds=60)
            talking = threading.Thread(target=ask, args=(running,))
            talking.start()
            eventually(lambda: running.store.list_chores("default", "chat").items, seconds=20)
            talking.join()
            eventually(lambda: not running.chats(), seconds=20)
            assert not running.store.list_chores("default", "chat").items
            eventually(lambda: not list(idle.data_dir.glob("chores/*")), seconds=5)
        finally:
            running.close()
