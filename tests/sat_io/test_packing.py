"""Rows into sequences, files into mixtures, and what a corpus says of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sat_core.corpus import IGNORED_LABEL, Corpus
from sat_core.plan.errors import DataError
from sat_core.plan.layout import FIRST, TRAINED
from sat_io import sources
from sat_io.packing import Separate
from sat_io.reading import Row
from sat_io.rendering import Rendered
from sat_io.rows import Text
from sat_io.sources import Source, shuffled
from tests.sat_core.tiny import read_events, run_core, write_model
from tests.sat_io.corpora import contents, make, write_rows


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": f" {completion}"}


def letters(count: int, first: int = 0) -> str:
    return " ".join(chr(97 + (first + i) % 26) for i in range(count))


ROWS = [pair("a b", "c d e"), pair("f", "g"), pair("h i", letters(9)), pair("j", "k l")]


def test_separate_rows_share_a_sequence_and_keep_their_own_positions(
    tmp_path: Path, tokenizer: Any
) -> None:
    corpus, figures = make(
        tmp_path, tokenizer, write_rows(tmp_path / "d.jsonl", ROWS), packing="separate"
    )
    assert contents(corpus, tokenizer) == [
        "a b c d e <eos> f g <eos> j k l <eos>",
        "h i a b c d e f g h i <eos>",
    ]
    batch = corpus.batch([0, 1])
    assert batch.positions_BT is not None
    assert batch.positions_BT[0].tolist() == [*range(6), *range(3), *range(4), *range(3)]
    assert batch.positions_BT[1].tolist() == [*range(12), *range(4)]
    labels = [tokenizer.decode(row[row != IGNORED_LABEL]) for row in batch.labels_BT]
    assert labels == ["c d e <eos> g <eos> k l <eos>", "a b c d e f g h i <eos>"]
    assert (figures["packing"], figures["sequences"], figures["trained_tokens"]) == (
        "separate",
        2,
        19,
    )


def test_separate_documents_give_the_logits_they_give_alone(
    tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    """The plain twin: attention kept apart by positions is the same as one sequence for each document."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa").eval()
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    packed = make(tmp_path, tokenizer, data, packing="separate")[0].batch([0, 1])
    alone, _ = make(tmp_path, tokenizer, data, packing="none")
    with torch.no_grad():
        # With a cache transformers takes the positions for those of a continuation and lets documents see each other.
        together = model(
            input_ids=packed.input_ids_BT, position_ids=packed.positions_BT, use_cache=False
        ).logits
        for row, start, index in ((0, 0, 0), (0, 6, 1), (0, 9, 3), (1, 0, 2)):
            batch = alone.batch([index])
            length = int(batch.lengths_B[0])
            single = model(input_ids=batch.input_ids_BT[:, :length]).logits[0]
            torch.testing.assert_close(together[row, start : start + length], single)
    assert alone.batch([0]).positions_BT is None


def test_a_long_text_goes_on_as_a_document_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"text": letters(20)}, {"text": "x y"}])
    for packing, expected in (
        ("none", [letters(8), letters(8, 8), letters(4, 16) + " <eos>", "x y <eos>"]),
        ("separate", [letters(8), letters(8, 8), letters(4, 16) + " <eos> x y <eos>"]),
        ("joined", [letters(8), letters(8, 8), letters(4, 16) + " <eos> x y <eos>"]),
    ):
        corpus, figures = make(tmp_path, tokenizer, data, seq_len=8, packing=packing)
        assert contents(corpus, tokenizer) == expected
        assert figures["truncated_tokens"] == 0
        if packing == "separate":
            assert corpus.batch([2]).labels_BT[0, 5] == IGNORED_LABEL, (
                "no token is predicted across"
            )


def test_supervised_rows_can_be_joined_and_keep_their_mask(tmp_path: Path, tokenizer: Any) -> None:
    corpus, _ = make(tmp_path, tokenizer, write_rows(tmp_path / "d.jsonl", ROWS), packing="joined")
    assert contents(corpus, tokenizer)[0].startswith("a b c d e <eos> f g <eos> h i")
    first = corpus.batch([0])
    assert first.positions_BT is None
    assert (first.labels_BT[0] != IGNORED_LABEL).sum() == 4 + 2 + 16 - 11


def test_first_fit_holds_few_sequences_open_and_loses_nothing() -> None:
    packer = Separate(8)
    rows = [Rendered([i] * (2 + i * 5 % 7), [True] * (2 + i * 5 % 7)) for i in range(500)]
    found = [s for row in rows for s in packer.add(row)]
    assert len(found) > 100, "sequences leave while rows come in"
    found += packer.finish()
    assert sorted(t for s in found for t in s.ids) == sorted(t for row in rows for t in row.ids)
    assert all(len(s.ids) <= 8 and s.mask[0] == FIRST for s in found)
    assert sum(s.mask.count(FIRST) for s in found) == 500
    assert {m for s in found for m in s.mask} == {FIRST, TRAINED}


def test_figures_tell_what_was_cut_copied_and_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair("a", "b"), pair("a", "b"), pair("a", letters(30)), pair(letters(20), "x")]
    held = write_rows(tmp_path / "held.jsonl", [pair("a", "b"), pair("c", "d")])
    _, figures = make(
        tmp_path,
        tokenizer,
        write_rows(tmp_path / "d.jsonl", rows),
        validation=Source(path=held, filename="held.jsonl"),
    )
    assert figures["rows"] == 4
    assert (figures["truncated_rows"], figures["truncated_tokens"]) == (2, 16 + 6)
    assert figures["untrained_rows"] == 1
    assert figures["row_tokens"] == {"p50": 3, "p90": 22, "p99": 22, "longest": 32}
    assert (figures["duplicate_rows"], figures["overlap_rows"]) == (1, 1)
    assert (figures["sequences"], figures["longest"], figures["carved"]) == (3, 16, False)
    main, second = figures["files"]
    assert (main["role"], main["filename"], main["sequences"]) == ("training", "d.jsonl", 3)
    assert (second["role"], second["rows"], second["trained_tokens"]) == ("validation", 2, 4)
    assert len(second["sha256"]) == 64


def test_a_row_that_is_carved_out_is_not_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair(f"w{i}", "a") for i in range(40)])
    for packing in ("none", "separate"):
        corpus, figures = make(tmp_path, tokenizer, data, split=0.1, packing=packing)
        held = Corpus(next((tmp_path / "corpora").glob("*")), "validation")
        assert len(held) > 0
        assert figures["overlap_rows"] == 0
        assert figures["tokens"] + figures["validation"]["tokens"] == 40 * 3
        assert figures["validation"]["tokens"] == 4 * 3
        assert len(corpus) == figures["sequences"]
    _, figures = make(tmp_path, tokenizer, data, split=0.1, packing="joined")
    assert figures["overlap_rows"] is None, "pieces of rows cannot be looked for"


@pytest.mark.parametrize(
    ("split", "rows"),
    [(0.25, (3, 7, 11)), (1 / 3, (2, 5, 8, 11)), (0.4, (2, 4, 7, 9)), (0.7, (1, 2, 4, 5, 7, 8, 9, 11))],
)  # fmt: skip
def test_as_large_a_share_is_carved_out_as_was_asked(
    tmp_path: Path, tokenizer: Any, split: float, rows: tuple[int, ...]
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair(f"w{i}", "a") for i in range(12)])
    make(tmp_path, tokenizer, data, split=split)
    held = Corpus(next((tmp_path / "corpora").glob("*")), "validation")
    assert contents(held, tokenizer) == [f"w{i} a <eos>" for i in rows]


@pytest.mark.parametrize(
    ("weight", "replay", "readings"), [(0.25, 2, 1), (1.0, 8, 2), (2.5, 20, 4)]
)
def test_a_mixture_has_as_much_of_a_file_as_its_weight_asks(
    tmp_path: Path, tokenizer: Any, weight: float, replay: int, readings: int
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair(f"w{i}", "a") for i in range(10)])
    other = write_rows(tmp_path / "r.jsonl", [{"text": f"{letters(14)} w{i}"} for i in range(5)])
    corpus, figures = make(tmp_path, tokenizer, data, split=0.2, mixes={other: weight})
    assert figures["validation"]["sequences"] == 2
    main, mix = figures["files"]
    assert (main["sequences"], mix["sequences"], mix["readings"]) == (8, replay, readings)
    assert (mix["role"], mix["weight"], mix["packing"]) == ("mix", weight, "joined")
    assert figures["sequences"] == len(corpus) == 8 + replay
    assert figures["tokens"] == main["tokens"] + mix["tokens"]
    held = Corpus(next((tmp_path / "corpora").glob("*")), "validation")
    assert all("w4" in text or "w9" in text for text in contents(held, tokenizer))


def test_conversations_are_counted_whatever_the_format_says(tmp_path: Path, tokenizer: Any) -> None:
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": [asked], "completion": [said]}, pair("a", "b")]
    _, figures = make(tmp_path, tokenizer, write_rows(tmp_path / "d.jsonl", rows))
    assert (figures["format"], figures["conversations"]) == ("prompt_completion", 1)
    text = write_rows(tmp_path / "t.jsonl", [{"text": letters(30)}] * 4)
    replay = write_rows(tmp_path / "r.jsonl", [{"messages": [asked, said]}] * 2)
    _, figures = make(tmp_path, tokenizer, text, mixes={replay: 0.5})
    assert (figures["format"], figures["conversations"]) == ("text", 2)
    assert [file["conversations"] for file in figures["files"]] == [0, 2]


def test_the_seed_chooses_what_is_used_of_a_longer_file(tmp_path: Path, tokenizer: Any) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair("a", "b")] * 4)
    other = write_rows(tmp_path / "r.jsonl", [pair(f"w{i}", "c") for i in range(60)])

    def mixed(seed: int, place: str) -> list[str]:
        corpus, _ = make(tmp_path / place, tokenizer, data, mixes={other: 1.0}, seed=seed)
        return contents(corpus, tokenizer)[4:]

    assert mixed(1, "a") == mixed(1, "b")
    assert mixed(1, "a") != mixed(2, "a")


def test_a_mixed_file_without_a_trained_token_is_named(tmp_path: Path, tokenizer: Any) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair("a", "b")])
    other = write_rows(tmp_path / "r.jsonl", [pair(letters(20), "x")])
    with pytest.raises(DataError, match=r"r\.jsonl: not one token of 1 rows"):
        make(tmp_path, tokenizer, data, mixes={other: 1.0})
    assert not list((tmp_path / "corpora").iterdir())


def test_the_window_that_rows_are_drawn_from_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("text", Text("", "x" * 10 + str(i))) for i in range(100)]
    whole = list(shuffled(iter(rows), (1, 2)))
    assert sorted(whole) == sorted(rows) != whole
    monkeypatch.setattr(sources, "SHUFFLED_CHARS", 60)
    near = list(shuffled(iter(rows), (1, 2)))
    assert sorted(near) == sorted(rows)
    assert rows.index(near[0]) < 10, "a row leaves once the window is full"


def test_the_program_takes_files_to_mix_in(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    config: dict[str, Any] = {
        "format": "satune.prepare/1",
        "request": {"model": "m", "seed": 1},
        "model": {"name": "m", "path": str(tmp_path / "model"), "revision": None},
        "training_file": {"path": str(data), "filename": "d.jsonl"},
        "mix_files": [{"path": str(data), "filename": "again.jsonl", "weight": 0.5}],
        "validation_file": None,
        "corpora_dir": str(tmp_path / "corpora"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_core("prepare", tmp_path) == 0, read_events(tmp_path)[-1]
    files = json.loads((tmp_path / "train.json").read_text())["figures"]["files"]
    assert [(f["filename"], f["sequences"]) for f in files] == [("d.jsonl", 4), ("again.jsonl", 2)]
    config["mix_files"][0]["weight"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_core("prepare", tmp_path) == 20
    assert read_events(tmp_path)[-1]["param"] == "mix_files.0.weight"
