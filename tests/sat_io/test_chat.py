"""A model that answers: what it says is what it wrote, whole characters, up to where it should stop."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_core.events import EventLog
from sat_core.plan.errors import ConfigError, PlanError
from sat_io import chat
from tests.sat_core.tiny import read_events, write_model

from .test_export import byte_model

HELLO = [{"role": "user", "content": "the cat sat"}]


def ask(**more: Any) -> chat.Ask:
    settings = {"max_tokens": 24, "temperature": 1.0, "top_p": 1.0, "stop": [], "seed": 3}
    return chat.Ask(**{"messages": HELLO, **settings, **more})


def answered(speaker: chat.Speaker, **more: Any) -> tuple[list[str], str, int]:
    asked = ask(**more)
    ids, most = speaker.prompt(asked)
    said: list[str] = []
    ended = speaker.answer(ids, asked, most=most, say=said.append, gone=lambda: False)
    return said, *ended


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> chat.Speaker:
    return chat.Speaker(str(byte_model(tmp_path_factory.mktemp("byte") / "model")))


def test_pieces_are_whole_characters_and_make_the_text(speaker: chat.Speaker) -> None:
    """A random model writes bytes that are seldom UTF-8; pieces then come with what makes them whole."""
    writer = chat._Writer(
        speaker._tokenizer.backend_tokenizer, [], (said := []).append, lambda: False
    )
    text = "the cät sat 日本 on"
    ids = speaker._tokenizer(text)["input_ids"]
    writer.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        writer.put(torch.tensor([token]))
    writer.end()
    assert "".join(said) == text
    assert len(said) > 5
    assert not any("\ufffd" in piece for piece in said)
    assert writer.tokens == len(ids)


@pytest.mark.parametrize(
    ("stop", "left"),
    [(["sat"], "the c"), (["c", "at "], "the "), (["zz", "on!"], None), (["n on"], None)],
)
def test_a_stop_text_ends_the_answer_and_does_not_stand_in_it(
    speaker: chat.Speaker, stop: list[str], left: str | None
) -> None:
    text = "the csat cat on"
    writer = chat._Writer(
        speaker._tokenizer.backend_tokenizer, stop, (said := []).append, lambda: False
    )
    writer.put(torch.tensor([[0]]))
    for token in speaker._tokenizer(text)["input_ids"]:
        writer.put(torch.tensor([token]))
    writer.end()
    assert "".join(said) == (text if left is None else left)
    assert writer.stopped is (left is not None)
    assert bool(writer(torch.tensor([[0]]), None)) is writer.stopped


def test_a_seed_gives_the_same_answer_and_nobody_who_listens_ends_it(speaker: chat.Speaker) -> None:
    first = answered(speaker)
    assert first == answered(speaker)
    assert first[0] != answered(speaker, seed=4)[0]
    assert answered(speaker, temperature=0) == answered(speaker, temperature=0, seed=9)
    assert first[1:] == ("length", 24)
    asked = ask(max_tokens=40)
    ids, most = speaker.prompt(asked)
    _, tokens = speaker.answer(ids, asked, most=most, say=lambda _: None, gone=lambda: True)
    assert tokens <= 2


def test_what_does_not_fit_is_refused_and_what_is_not_said_is_what_is_left(
    speaker: chat.Speaker,
) -> None:
    ids, most = speaker.prompt(ask(max_tokens=None))
    assert most == speaker.context - len(ids)
    for more in (
        {"max_tokens": most + 1},
        {"messages": [{"role": "user", "content": "cat " * 99}]},
    ):
        with pytest.raises(PlanError, match="context holds 64") as refused:
            speaker.prompt(ask(**more))
        assert refused.value.code == "context_length_exceeded"


def test_nothing_said_is_answered_where_the_template_says_something(tmp_path: Path) -> None:
    nothing = [{"role": "user", "content": ""}]
    folder = byte_model(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    assert answered(chat.Speaker(str(folder)), messages=nothing, max_tokens=2)[1:] == ("length", 2)
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(ConfigError, match="no token") as refused:
        chat.Speaker(str(folder)).prompt(ask(messages=nothing))
    assert (refused.value.code, refused.value.param) == ("invalid_value", "messages")


def test_a_model_without_a_template_gets_the_one_its_data_would_get(tmp_path: Path) -> None:
    folder = byte_model(tmp_path / "m")
    for name in ("chat_template.jinja",):
        (folder / name).unlink(missing_ok=True)
    plain = chat.Speaker(str(folder))
    ids, _ = plain.prompt(ask(max_tokens=1))
    assert plain._tokenizer.decode(ids) == "### User:\nthe cat sat\n\n### Assistant:\n"


def test_the_server_answers_who_knows_the_token_and_refuses_a_crowd(tmp_path: Path) -> None:
    speaker = chat.Speaker(str(write_model(tmp_path / "model")))
    body = json.dumps({**vars(ask(max_tokens=4)), "messages": [{"role": "user", "content": "a b"}]})
    with EventLog(tmp_path) as events, chat._Server("127.0.0.1", "x", speaker, events) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def post(token: str) -> tuple[int, list[dict[str, Any]]]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("POST", "/", body, {"authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            lines = [json.loads(line) for line in answer.read().splitlines()]
            connection.close()
            return answer.status, lines

        try:
            assert post("y") == (401, [])
            status, lines = post("x")
            assert (status, lines[0], lines[-1]["completion_tokens"]) == (
                200,
                {"prompt_tokens": 5},
                4,
            )
            with server.turn:
                crowd = [
                    threading.Thread(target=post, args=("x",)) for _ in range(chat.MAX_WAITING + 1)
                ]
                for one in crowd:
                    one.start()
                while server._count <= chat.MAX_WAITING:
                    pass
                status, lines = post("x")
                assert (status, lines[0]["code"]) == (503, "gpu_busy")
            for one in crowd:
                one.join()
        finally:
            server.shutdown()
            thread.join()
    kinds = [event["kind"] for event in read_events(tmp_path)]
    assert kinds == ["begun", "answering", "idle", "answering", "idle"]
