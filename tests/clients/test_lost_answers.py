"""An answer that is lost on the wire, and what every client does then: it asks again, and there is one job."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import openai
import pytest

from tests.api.conftest import KEY, ROW
from tests.api.serving import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

    from .conftest import Client


def whole(sender: socket.socket) -> bytes:
    """One HTTP message, however it was cut on its way; empty where the sender has closed."""
    message = b""
    while True:
        head, end, body = message.partition(b"\r\n\r\n")
        length = [h for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")]
        if end and len(body) >= (int(length[0].split(b":")[1]) if length else 0):
            return message
        more = sender.recv(1 << 20)
        if not more:
            return b""
        message += more


@contextlib.contextmanager
def losing(address: str, path: bytes, times: int) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy in front of `address` that loses the answer to the first `times` POSTs of `path`; and what it lost."""
    target, lost = (urlsplit(address).hostname, urlsplit(address).port), []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                inward, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=pass_on, args=(inward,), daemon=True).start()

    def pass_on(inward: socket.socket) -> None:
        with inward, socket.create_connection(target) as outward:
            while request := whole(inward):
                outward.sendall(request)
                answer = whole(outward)
                if request.startswith(b"POST " + path) and len(lost) < times:
                    lost.append(answer)
                    return
                inward.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", lost
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_makes_one_job(client: Client, app: FastAPI, times: int) -> None:
    with (
        served(app) as address,
        losing(address, b"/v1/fine_tuning/jobs", times) as (proxied, lost),
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as direct,
    ):
        file = direct.files.create(file=("d.jsonl", ROW), purpose="fine-tune")
        before = direct.fine_tuning.jobs.create(model="local/tiny", training_file=file.id)
        said = client.run("one_job", proxied, KEY, model="local/tiny", file=file.id)
        job = json.loads(said[0])
        assert len(lost) == times
        assert all(job["id"].encode() in text for text in lost)
        assert job["headers"]["idempotent-replayed"] == "inferred"
        assert {j.id for j in direct.fine_tuning.jobs.list()} == {before.id, job["id"]}
