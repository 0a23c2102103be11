"""What is rendered, what of it is trained on, and how that is shown."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sat_core.plan.errors import ConfigError, DataError
from sat_io.intake import Tokens
from sat_io.preview import preview_rows
from sat_io.rendering import Renderer
from sat_io.rows import parse_row
from sat_io.sources import Source
from tests.sat_core.tiny import read_events, run_core, write_model
from tests.sat_io.corpora import make, write_rows

USER, ASSISTANT = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w1 {%- generation %} {{ m['content'] }} <eos>"
    "{%- endgeneration %} {% else %}w0 {{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def tokens_of(tokenizer: Any, packing: str = "auto") -> Tokens:
    return Tokens(Renderer(tokenizer), lambda packed: 8, packing)


def trained(tokenizer: Any, row: dict[str, Any], **settings: Any) -> str:
    rendered = Renderer(tokenizer, **settings).render(parse_row(row, "messages"))
    return str(tokenizer.decode([i for i, t in zip(*rendered, strict=True) if t]))


@pytest.mark.parametrize("template", [None, MARKED])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1, 1), "c d <eos> e <eos>"), ((0, 1), "e <eos>"), ((1, 0), "c d <eos>")],
)
def test_a_turn_of_weight_0_is_seen_and_not_trained(
    tokenizer: Any, template: str | None, weights: tuple[int, int], expected: str
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    first, second = weights
    row = {
        "messages": [
            USER,
            {**ASSISTANT, "weight": first},
            USER,
            {"role": "assistant", "content": "e", "weight": second},
        ]
    }
    assert trained(tokenizer, row) == expected
    assert "a b" in trained(tokenizer, row, train_on="all")


def test_a_template_may_open_the_last_turn_with_an_empty_thought(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}w0 {% else %}w1 "
        "{% if loop.last %}{{ 'w8 \nw9\n\n' }}{% endif %}{% endif %}{{ m['content'] }} "
        "{{- m.tool_calls[0].function.name if m.tool_calls }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [USER, ASSISTANT, USER, calling, USER, {**ASSISTANT, "content": "e"}]}
    assert trained(tokenizer, row) == "c d <eos> f <eos> w8 w9 e <eos>"


def test_a_thought_that_the_template_drops_later_is_not_missed(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {% if loop.last %}{{ m['content'] }}{% else %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    thinking = {"role": "assistant", "content": "<think>\nx\n</think>\n\nc d"}
    row = {"messages": [USER, thinking, USER, thinking]}
    assert trained(tokenizer, row) == "c d <eos> <unk> x <unk> c d <eos>"


def test_turns_that_the_marks_do_not_tell_apart_cannot_have_weights(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% generation %}{% for m in messages %}{{ m['content'] }} {% endfor %}{% endgeneration %}"
    )
    with pytest.raises(
        DataError, match="2 turns of the assistant, of which the chat template marks 1"
    ):
        trained(tokenizer, {"messages": [{**ASSISTANT, "weight": 0}, USER, ASSISTANT]})


def test_a_template_that_drops_tool_calls_is_refused(tokenizer: Any) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    with pytest.raises(DataError, match="does not render tool calls"):
        trained(tokenizer, {**row, "messages": [*row["messages"], USER]})
    tokenizer.chat_template = None
    rendered = Renderer(tokenizer)
    assert any(rendered.render(parse_row(row, "messages")).trained)
    text = tokenizer.apply_chat_template(
        parse_row({**row, "tools": [{"name": "f"}]}, "messages").messages,  # type: ignore[union-attr]
        tools=[{"name": "f"}],
        tokenize=False,
    )
    assert '### Tools:\n[{"name": "f"}]' in text
    assert '"arguments": {}' in text


def test_a_developer_speaks_as_system_where_the_template_knows_no_developer(tokenizer: Any) -> None:
    row = {"messages": [{"role": "developer", "content": "x"}, USER, ASSISTANT]}
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'system' %}w9{% endif %} {{ m['content'] }} {% endfor %}"
    assert "w9" in trained(tokenizer, row, train_on="all")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "out of all proportion"),
        ("{{ 'x' * 100000000 }}", "out of all proportion"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "no"),
    ],
)  # fmt: skip
def test_a_template_that_floods_or_fails_is_refused(
    tokenizer: Any, template: str, words: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        trained(tokenizer, {"messages": [USER, ASSISTANT]})


# It writes nothing, hides behind a filter that catches errors, and ends after some seconds only for the test's sake.
SILENT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if 'e' in messages[0]['content'] %}{% for i in range(40) %}"
    "{% for j in range(99999) %}{% if j | string | int %}{% endif %}{% endfor %}{% endfor %}{% endif %}"
)


@pytest.mark.parametrize("silent_row", [1, 2])
def test_a_template_that_loops_in_silence_is_refused_with_its_row(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, silent_row: int
) -> None:
    monkeypatch.setattr("sat_core.chat_template.RENDER_SECONDS", 0.1)
    tokenizer.chat_template = SILENT
    rows = [{"messages": [USER, ASSISTANT]}] * 3
    rows[silent_row - 1] = {"messages": [{**USER, "content": "e"}, ASSISTANT]}
    path = write_rows(tmp_path / "d.jsonl", rows)
    words = rf"d\.jsonl, line {silent_row}: .*did not end within 0\.4 s"
    began = time.process_time()
    with pytest.raises(DataError, match=words):
        preview_rows(Source(path=path, filename="d.jsonl"), tokens_of(tokenizer), rows=3)
    with pytest.raises(DataError, match=words):
        make(tmp_path, tokenizer, path)
    assert time.process_time() - began < 3
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_rows_are_rendered_in_threads_too(tokenizer: Any) -> None:
    row = {"messages": [USER, ASSISTANT]}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trained, tokenizer, row).result() == trained(tokenizer, row)


def test_a_preview_shows_what_is_trained_masked_and_cut(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {**ASSISTANT, "content": "e " * 9}]},
    ]
    path = write_rows(tmp_path / "d.jsonl", rows * 3)
    shown = preview_rows(Source(path=path, filename="d.jsonl"), tokens_of(tokenizer), rows=2)
    assert [row["row"] for row in shown] == [1, 2]
    first, second = shown
    assert first["tokens"] == ["w0", "a", "b", "<eos>", "w1", "c", "d", "<eos>"]
    assert [(s["kind"], s["text"]) for s in first["spans"]] == [
        ("masked", "w0 a b <eos> w1"),
        ("trained", "c d <eos>"),
    ]
    assert [(s["kind"], s["start"], s["end"]) for s in second["spans"]] == [
        ("masked", 0, 5),
        ("trained", 5, 8),
        ("truncated", 8, 15),
    ]
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize(
    ("packing", "masked", "kept"),
    [("auto", [], 17), ("joined", [], 17), ("none", [0, 8], 16), ("separate", [0, 8], 16)],
)
def test_a_text_goes_on_and_what_begins_a_sequence_is_no_label(
    tmp_path: Path, tokenizer: Any, packing: str, masked: list[int], kept: int
) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"text": "a " * 16}])
    source = Source(path=path, filename="d.jsonl")
    spans = preview_rows(source, tokens_of(tokenizer, packing))[0]["spans"]
    kinds = [span["kind"] for span in spans for _ in range(span["start"], span["end"])]
    assert [i for i, kind in enumerate(kinds) if kind == "masked"] == masked
    assert kinds.count("truncated") == 17 - kept


@pytest.mark.parametrize("rows", [0, 101, True, "5"])
def test_the_rows_of_a_preview_are_bounded(tmp_path: Path, tokenizer: Any, rows: Any) -> None:
    source = Source(path=tmp_path / "none", filename="d.jsonl")
    with pytest.raises(ConfigError, match="from 1 to 100"):
        preview_rows(source, tokens_of(tokenizer), rows=rows)


def test_the_program_writes_a_preview(tmp_path: Path, model_folder: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"messages": [USER, ASSISTANT]}] * 9)
    config: dict[str, Any] = {
        "format": "satune.prepare/1",
        "request": {"model": "m"},
        "model": {"name": "m", "path": str(model_folder), "revision": None},
        "training_file": {"path": str(data), "filename": "d.jsonl"},
        "validation_file": None,
        "corpora_dir": str(tmp_path / "corpora"),
        "rows": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_core("preview", tmp_path) == 0, read_events(tmp_path)[-1]
    shown = json.loads((tmp_path / "preview.json").read_text())
    assert (shown["format"], len(shown["rows"])) == ("satune.preview/1", 3)
    assert not (tmp_path / "corpora").exists()
