"""From files to tokens and masks, and what is refused on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sat_core.corpus import IGNORED_LABEL, Corpus
from sat_core.plan.errors import DataError
from sat_io.formats import FileCheck
from sat_io.rendering import Renderer
from sat_io.rows import parse_row
from tests.sat_core.tiny import prepare, read_events, run_core, write_model, write_text
from tests.service import eventually

MESSAGES = {
    "messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
}
TWO_TURNS = {
    "messages": [
        *MESSAGES["messages"],
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def trained_text(
    folder: Path, format: str, row: dict[str, Any], template: str | None = "stock"
) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template != "stock":
        tokenizer.chat_template = template
    rendered = Renderer(tokenizer).render(parse_row(row, format))
    return str(
        tokenizer.decode([i for i, t in zip(rendered.ids, rendered.trained, strict=True) if t])
    )


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", MESSAGES, "c d <eos>"),
        ("messages", TWO_TURNS, "c d <eos> f <eos>"),
        ("prompt_completion", {"prompt": "a b", "completion": " c d"}, "c d <eos>"),
        ("alpaca", {"instruction": "a", "input": "b", "output": "c d"}, "c d <eos>"),
        ("text", {"text": "a b c"}, "a b c <eos>"),
    ],
)
def test_loss_falls_on_the_answer_only(
    tokenizer_folder: Path, format: str, row: dict[str, Any], expected: str
) -> None:
    assert trained_text(tokenizer_folder, format, row) == expected


def test_a_template_with_generation_marks_decides_itself(tokenizer_folder: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w1 {% generation %}{{ m['content'] }} <eos>{% endgeneration %}"
        "{% else %}w0 {{ m['content'] }} {% endif %}{% endfor %}"
    )
    assert trained_text(tokenizer_folder, "messages", MESSAGES, template) == "c d <eos>"


@pytest.mark.parametrize("opening", ["", "<eos> "])
def test_what_a_template_writes_before_a_first_answer_is_not_trained(
    tokenizer_folder: Path, opening: str
) -> None:
    """As Qwen2.5's does, which adds a system prompt; one may also open the last turn with what it drops from earlier ones."""
    template = (
        "{% if messages[0]['role'] != 'system' %}w2 c d <eos> {% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}w0 {{ m['content'] }} {% else %}w1\n{% if loop.last %}OPENING\n{% endif %}"
        "{{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}w1\n{% endif %}"
    ).replace("OPENING\n", opening and f"{opening}\n")
    answer_first = {"messages": [{"role": "assistant", "content": "c d"}, *TWO_TURNS["messages"]]}
    found = trained_text(tokenizer_folder, "messages", answer_first, template)
    assert found == f"c d <eos> c d <eos> {opening}f <eos>"


def test_a_first_answer_is_trained_like_any_other_where_a_space_begins_its_token(
    tmp_path: Path,
) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(["User: good Assistant: good"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path)
    template = (
        "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant: ' }}{{ m['content'] }}"
        "<eos>{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    first = {"role": "assistant", "content": "good"}
    row = {"messages": [first, {"role": "user", "content": "good"}, first]}
    assert trained_text(tmp_path, "messages", row, template) == " good<eos> good<eos>"


def test_a_model_without_a_template_gets_the_stated_plain_one(tokenizer_folder: Path) -> None:
    assert trained_text(tokenizer_folder, "messages", MESSAGES, None).endswith("<eos>")


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer_folder: Path) -> None:
    template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match="no exact loss mask"):
        trained_text(tokenizer_folder, "messages", TWO_TURNS, template)


def test_text_is_packed_and_no_token_is_lost(tmp_path: Path) -> None:
    data = tmp_path / "d.txt"
    data.write_text("a b c\n<|endoftext|>\nd e f g h\n")
    prepared = prepare(
        tmp_path,
        data=data,
        sat={"train": {"max_seq_len": 8, "max_steps": 1}, "data": {"validation_split": 0}},
    )
    corpus = Corpus(Path(prepared["config"]["corpus"]), "train")
    ids = np.concatenate(
        [
            corpus.batch([i]).input_ids_BT[0, : int(corpus.batch([i]).lengths_B[0])]
            for i in range(len(corpus))
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(ids) == "a b c <eos> d e f g h <eos>"
    assert prepared["figures"]["tokens"] == 10


def test_supervised_rows_are_padded_and_masked(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in (MESSAGES, TWO_TURNS)))
    prepared = prepare(tmp_path, data=data, sat={"data": {"validation_split": 0}})
    assert prepared["hyperparameters"]["n_epochs"] == 3
    batch = Corpus(Path(prepared["config"]["corpus"]), "train").batch([0, 1])
    assert batch.input_ids_BT.shape == (2, 16)
    assert (batch.labels_BT != IGNORED_LABEL).sum(1).tolist() == [3, 5]


def test_a_batch_of_more_sequences_than_there_are_is_warned_of(tmp_path: Path) -> None:
    data = write_text(tmp_path / "d.jsonl")
    few = prepare(tmp_path, data=data, sat={}, hyperparameters={"batch_size": 65536})
    sequences = few["figures"]["sequences"]
    (warning,) = [said for said in few["warnings"] if "batch_size" in said]
    assert f"is 65536, and the data give {sequences} sequences" in warning


def test_a_second_preparation_of_the_same_data_finds_it_ready(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(MESSAGES))
    first = prepare(tmp_path, data=data, sat={})
    (tmp_path / "prepare").rename(tmp_path / "earlier")
    (corpus,) = (tmp_path / "corpora").iterdir()
    before = [p.stat().st_mtime_ns for p in sorted(corpus.iterdir())]
    os.utime(corpus, (0, 0))
    assert prepare(tmp_path, data=data, sat={}) == first
    assert [p.stat().st_mtime_ns for p in sorted(corpus.iterdir())] == before
    assert corpus.stat().st_mtime > 0


@pytest.mark.parametrize(
    ("content", "sat", "code", "words"),
    [
        ('{"messages": [', {}, "dataset_invalid", "line 1: not valid JSON"),
        (
            json.dumps(MESSAGES) + "\n" + json.dumps({"text": "a"}),
            {},
            "dataset_invalid",
            "line 2: this row is text",
        ),
        (
            json.dumps({"prompt": "a " * 40, "completion": "b"}),
            {"train": {"max_seq_len": 16}},
            "dataset_invalid",
            "not one token",
        ),
        ("", {}, "dataset_invalid", ""),
        (json.dumps(MESSAGES), {"train": {"max_seq_len": 999}}, "invalid_value", "context is 64"),
        (
            json.dumps(MESSAGES),
            {"mode": "off", "omission_rate": {"mlp": 0.5}},
            "conflicting_parameters",
            "drop one",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_its_place(
    tmp_path: Path, tokenizer_folder: Path, content: str, sat: dict[str, Any], code: str, words: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    data = tmp_path / "d.jsonl"
    data.write_text(content)
    config = {
        "format": "satune.prepare/1",
        "request": {"model": "m", "sat": sat},
        "model": {"name": "m", "path": str(tokenizer_folder), "revision": None},
        "training_file": {"path": str(data), "filename": "d.jsonl"},
        "validation_file": None,
        "corpora_dir": str(tmp_path / "corpora"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert run_core("prepare", folder) == 20
    event = read_events(folder)[-1]
    assert (event["kind"], event["code"]) == ("failed", code)
    assert words in event["message"]
    assert not list((tmp_path / "corpora").glob("*")), "nothing half-written stays"


def test_an_upload_is_judged_the_same_however_it_is_cut() -> None:
    rows = [
        json.dumps(MESSAGES).encode(),
        b"{broken",
        json.dumps({"messages": [{"role": "bot", "content": "x"}]}).encode(),
    ]
    data = b"\n".join(rows)
    reports = []
    for size in (1, 7, len(data)):
        check = FileCheck("d.jsonl")
        for i in range(0, len(data), size):
            check.feed(data[i : i + size])
        reports.append(check.finish())
    assert reports[0] == reports[1] == reports[2]
    first, second = reports[0].problems
    assert (first.line, first.byte_offset, first.code) == (2, len(rows[0]) + 1, "bad_json")
    assert (second.line, second.pointer, second.code) == (3, "/messages/0/role", "bad_role")


def test_a_hub_that_cannot_be_reached_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps(MESSAGES))
    config = {
        "format": "satune.prepare/1",
        "request": {"model": "some-org/no-such-model"},
        "model": {"name": "some-org/no-such-model", "path": None, "revision": None},
        "training_file": {"path": str(data), "filename": "d.jsonl"},
        "validation_file": None,
        "corpora_dir": str(tmp_path / "corpora"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_core("prepare", tmp_path) == 20
    event = read_events(tmp_path)[-1]
    assert event["code"] == "model_download_failed"
    assert "cannot be reached" in event["message"]
    assert "local/NAME" in event["message"]


def test_the_program_reads_rows_without_torch(tmp_path: Path) -> None:
    prepare(tmp_path, data=write_text(tmp_path / "d.jsonl"), sat={"mode": "on"})
    folder = tmp_path / "prepare"
    config = json.loads((folder / "config.json").read_text())
    hardware = {"device": "cpu", "name": "cpu", "memory_bytes": None}
    (folder / "config.json").write_text(json.dumps(config | {"hardware": hardware}))
    program = [sys.executable, "-P", "-X", "importtime", "-m", "sat_io", "prepare", str(folder)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers" in imported
    assert not {name for name in imported if name.startswith("torch")}
    assert json.loads((folder / "train.json").read_text())["quote"]["flops"]


def test_a_preparation_that_is_asked_to_end_leaves_nothing_half_made(tmp_path: Path) -> None:
    prepare(tmp_path, data=write_text(tmp_path / "few.jsonl"), sat={})
    config = json.loads((tmp_path / "prepare/config.json").read_text())
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps({"text": "a b c d"}) + "\n") * 400_000)
    config["training_file"] = {"path": str(many), "filename": many.name}
    (tmp_path / "prepare/config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "sat_io", "prepare", str(tmp_path / "prepare"), "--lifeline"]
    half_made = (tmp_path / "corpora").glob
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        eventually(lambda: any(half_made(".preparing-*")), seconds=60)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 128 + signal.SIGTERM
    assert not list(half_made(".*"))
