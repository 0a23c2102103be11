"""What of OpenAI's chat parameters is done, and how the rest is refused; the answers are `tests/acceptance/test_chat.py`'s."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from api.datasets import model_version
from jobs.chores import CHAT

from .conftest import KEY

MESSAGES = [{"role": "user", "content": "hi"}]


def ask(client, **more):
    return client.post(
        "/v1/chat/completions", json={"model": "local/tiny", "messages": MESSAGES} | more
    )


def refusal(answer) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": True}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "conflicting_parameters", "max_tokens"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stream_options": {"include_usage": True}}, "conflicting_parameters", "stream_options"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
            "unsupported_parameter",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_parameter",
            "messages",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(client, more, code, param):
    assert refusal(ask(client, **more)) == (400, code, param)


def test_what_asks_for_nothing_is_let_through_to_a_service_without_a_worker(client, services):
    neutral = {
        "n": 1,
        "tools": [],
        "logprobs": False,
        "logit_bias": None,
        "user": "u",
        "stop": None,
    }
    began = time.monotonic()
    answer = ask(client, **neutral, response_format={"type": "text"}, frequency_penalty=0)
    assert refusal(answer) == (503, "gpu_busy", None)
    assert "no worker" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "5"
    assert time.monotonic() - began < 5
    # Nobody loads a model later that nobody waits for.
    assert not services.store.list_chores("default", CHAT).items


@pytest.mark.parametrize(
    "name", ["local/none", "gpt-4o", "ft:local/tiny:default::00000000", "../x"]
)
def test_a_model_that_is_not_there_is_404(client, name):
    assert refusal(ask(client, model=name)) == (404, "model_not_found", "model")


def test_chatting_needs_the_scope_inference(client, services):
    services.store.ensure_key("sk-sat-few", name="few", scopes=("jobs:read", "models"))
    client.headers["authorization"] = "Bearer sk-sat-few"
    assert refusal(ask(client))[:2] == (403, "insufficient_scope")
    services.store.ensure_key("sk-sat-talk", name="talk", scopes=("inference",))
    client.headers["authorization"] = "Bearer sk-sat-talk"
    assert refusal(ask(client))[:2] == (503, "gpu_busy")
    client.headers["authorization"] = f"Bearer {KEY}"


def test_a_model_that_cannot_be_loaded_says_why(client, services):
    ask(client)
    chore = services.store.ask_chore(
        "default", CHAT, "local/tiny", {"model_version": model_version(services, "local/tiny")}
    )
    claim = services.store.claim_chore("w", chat=True)
    assert claim is not None
    assert claim.id == chore.id
    error = {"code": "model_unsupported", "message": "It has no layers.", "param": "model"}
    services.store.fail_chore(claim, error)
    answer = ask(client)
    assert refusal(answer) == (400, "model_unsupported", "model")
    assert answer.json()["error"]["message"] == "It has no layers."


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_ends_with_the_key_that_asked_for_it(client, services, monkeypatch, streamed):
    monkeypatch.setattr("api.followers.KEY_SECONDS", 0.2)
    _, key, secret = services.store.create_service_account("default", "ci", ("inference",))
    params = {"model_version": model_version(services, "local/tiny")}
    services.store.ask_chore("default", CHAT, "local/tiny", params)
    claim = services.store.claim_chore("w", chat=True)
    left = threading.Event()

    class Talker(BaseHTTPRequestHandler):
        def do_POST(self):
            services.store.revoke_key("default", key.id)
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(50):
                    self.wfile.write(b'{"text": "on "}\n')
                    time.sleep(0.1)
            except ConnectionError:
                left.set()

    with HTTPServer(("127.0.0.1", 0), Talker) as server:
        threading.Thread(target=server.serve_forever).start()
        place = {"url": f"http://127.0.0.1:{server.server_port}", "token": "t"}
        services.store.publish_chore(claim, place)
        client.headers["authorization"] = f"Bearer {secret}"
        answer = ask(client, stream=streamed)
        server.shutdown()
    assert left.is_set()
    if streamed:
        last = answer.text.strip().splitlines()[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "invalid_api_key"
    else:
        assert refusal(answer) == (401, "invalid_api_key", None)


def test_an_address_that_is_another_ones_by_now_is_asked_for_again(client, services, monkeypatch):
    """The row of a model that is gone stays for a lease; whoever listens at its port knows no such token."""
    monkeypatch.setattr("api.chats.LOADING_SECONDS", 3.0)
    params = {"model_version": model_version(services, "local/tiny")}
    services.store.ask_chore("default", CHAT, "local/tiny", params)
    claim = services.store.claim_chore("w", chat=True)
    asked = []

    class Stranger(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.headers["authorization"])
            self.send_response(401)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever).start()
        place = {"url": f"http://127.0.0.1:{server.server_port}", "token": "t"}
        services.store.publish_chore(claim, place)
        assert refusal(ask(client)) == (503, "model_loading", None)
        server.shutdown()
    assert asked[:2] == ["Bearer t", "Bearer t"]
    # Now nobody listens there at all.
    assert refusal(ask(client, stream=True)) == (503, "model_loading", None)
