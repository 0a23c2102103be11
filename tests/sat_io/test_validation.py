"""The report on a file: every fault named, and what would be trained on counted as `prepare` counts it."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.sat_core.tiny import prepare, read_events, run_core, write_model
from tests.sat_io.test_preview import SILENT

GOOD = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]}
OTHER = {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f g h"}]}
LONG = {
    "messages": [
        {"role": "user", "content": "a " * 200},
        {"role": "assistant", "content": "c"},
    ]
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def lines(*rows: Any) -> bytes:
    return b"".join((json.dumps(row) + "\n").encode() for row in rows)


def validated(
    root: Path,
    content: bytes,
    *,
    name: str = "data.jsonl",
    model: Path | None = None,
    against: bytes | None = None,
    sat: dict[str, Any] | None = None,
) -> dict[str, Any]:
    (root / name).write_bytes(content)
    if against is not None:
        (root / "other").write_bytes(against)
    config = {
        "format": "satune.prepare/1",
        "request": {"model": "local/tiny", "sat": sat or {}} if model else None,
        "model": {"name": "local/tiny", "path": str(model), "revision": None},
        "declared_format": "auto",
        "training_file": {"path": str(root / name), "filename": name},
        "validation_file": {"path": str(root / "other"), "filename": "other.jsonl"}
        if against is not None
        else None,
    }
    (root / "config.json").write_text(json.dumps(config))
    assert run_core("validate", root) == 0, read_events(root)
    return dict(json.loads((root / "validation.json").read_text()))


def test_every_bad_row_is_named_and_the_good_ones_are_counted(tmp_path: Path) -> None:
    first, bad = lines(GOOD), b'{"messages": [{"role": "bot", "content": "x"}]}\n'
    report = validated(tmp_path, first + bad + b"{broken\n" + lines(GOOD, OTHER))
    assert (report["rows"], report["error_count"], report["duplicates"]) == (3, 2, 1)
    role, syntax = report["errors"]
    assert (role["line"], role["byte_offset"], role["pointer"], role["code"]) == (
        2,
        len(first),
        "/messages/0/role",
        "bad_role",
    )
    assert role["excerpt"].startswith('{"messages"')
    assert (syntax["line"], syntax["byte_offset"], syntax["code"]) == (
        3,
        len(first + bad),
        "bad_json",
    )


def test_what_is_told_is_bounded_and_what_is_counted_is_not(tmp_path: Path) -> None:
    report = validated(tmp_path, b"{\n" * 250)
    assert (len(report["errors"]), report["error_count"]) == (100, 250)


def test_tokens_are_counted_as_prepare_counts_them(tmp_path: Path, model: Path) -> None:
    rows = [GOOD] * 30 + [OTHER] * 20 + [LONG]
    report = validated(tmp_path, lines(*rows), model=model)
    root = tmp_path / "job"
    root.mkdir()
    (root / "model").symlink_to(model)
    figures = prepare(root, data=tmp_path / "data.jsonl", sat={"data": {"validation_split": 0}})[
        "figures"
    ]
    assert report["tokens"]["trained"] == figures["trained_tokens"]
    assert report["truncated_rows"] == figures["truncated_rows"] == 1
    assert report["empty_targets"] == figures["untrained_rows"] == 1
    assert report["duplicates"] == figures["duplicate_rows"]
    assert report["tokens"]["per_row"]["p50"] == figures["row_tokens"]["p50"]
    assert report["tokens"]["per_row"]["max"] == figures["row_tokens"]["longest"]
    assert sum(bin["rows"] for bin in report["tokens"]["histogram"]) == 51
    assert report["roles"] == {"user": 51, "assistant": 51}
    told = " ".join(report["warnings"])
    assert "48 of 51 rows are exact repetitions" in told
    assert "1 of 51 rows are longer than 64 tokens" in told
    assert "1 of 51 rows would be left out" in told


def test_a_loss_mask_of_zeros_is_an_error_with_its_reason(tmp_path: Path, model: Path) -> None:
    report = validated(tmp_path, lines(LONG, LONG), model=model)
    (error,) = report["errors"]
    assert error["code"] == "no_trained_tokens"
    assert "begins after token 64" in error["message"]
    assert report["error_count"] == 1


def test_a_template_that_fails_is_an_error_of_its_rows(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "chat_template.jinja").unlink()
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no systems here') }}")
    report = validated(tmp_path, lines(GOOD, OTHER), model=broken)
    assert [e["code"] for e in report["errors"]] == ["template_failed"] * 2
    assert "no systems here" in report["errors"][0]["message"]


def test_a_template_that_loops_in_silence_costs_one_row_of_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_core.chat_template.RENDER_SECONDS", 0.1)
    looping = tmp_path / "model"
    looping.mkdir()
    for path in model.iterdir():
        (looping / path.name).symlink_to(path)
    (looping / "chat_template.jinja").unlink()
    (looping / "chat_template.jinja").write_text(SILENT)
    began = time.process_time()
    report = validated(tmp_path, lines(GOOD, *[OTHER] * 5), model=looping)
    assert time.process_time() - began < 2
    assert report["error_count"] == 5
    assert (report["errors"][0]["line"], report["errors"][0]["code"]) == (2, "template_failed")
    assert "did not end within 0.4 s" in report["errors"][0]["message"]


@pytest.mark.parametrize("with_model", [False, True])
def test_rows_on_both_sides_are_counted(tmp_path: Path, model: Path, with_model: bool) -> None:
    report = validated(
        tmp_path,
        lines(GOOD, OTHER, GOOD),
        against=lines(GOOD) + b"{broken\n",
        model=model if with_model else None,
    )
    assert report["overlap_rows"] == 2
    assert any("2 of 3 rows stand in the other file" in w for w in report["warnings"])


def test_parquet_rows_are_judged_here(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "", "z"]}), tmp_path / "t.parquet"
    )
    content = (tmp_path / "t.parquet").read_bytes()
    report = validated(tmp_path, content, name="data.parquet")
    assert (report["rows"], report["error_count"]) == (2, 1)
    assert (report["errors"][0]["line"], report["errors"][0]["pointer"]) == (2, "/completion")
    (tmp_path / "again").mkdir()
    broken = content[:60] + b"\xff" * 40 + content[100:]
    report = validated(tmp_path / "again", broken, name="data.parquet")
    assert report["errors"][0]["code"] == "bad_parquet"


def test_text_is_counted_by_documents(tmp_path: Path, model: Path) -> None:
    report = validated(tmp_path, b"a b c\n<|endoftext|>\nd e f\n", name="data.txt", model=model)
    assert (report["file_format"], report["error_count"]) == ("text", 0)
    assert report["tokens"]["total"] == 8


def test_marks_of_windows_are_told(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines(GOOD, OTHER).replace(b"\n", b"\r\n")
    report = validated(tmp_path, gzip.compress(content), name="data.jsonl.gz")
    assert (report["encoding"], report["rows"], report["error_count"]) == ("utf-8-sig", 2, 0)
    assert len(report["warnings"]) == 2
