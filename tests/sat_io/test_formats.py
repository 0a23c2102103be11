"""Which rows mean what, whatever file they come in, and how a fault in one is named."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sat_core.plan.errors import DataError
from sat_io import reading, streams
from sat_io.formats import FileCheck, FileReport
from sat_io.reading import read_rows
from sat_io.rows import Conversation, RowError, Text, detect_format, parse_row

PAIRS = [{"prompt": f"a {i}", "completion": f"b {i}"} for i in range(5)]
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"tz": "UTC"}'}}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def parsed(row: dict[str, Any]) -> Text | Conversation:
    return parse_row(row, detect_format(row))


def judged(filename: str, data: bytes, size: int = 2**16, **settings: Any) -> FileReport:
    check = FileCheck(filename, **settings)
    for i in range(0, len(data), size):
        check.feed(data[i : i + size])
    return check.finish()


def as_csv(rows: list[dict[str, str]], **kwargs: Any) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **kwargs)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], **kwargs: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **kwargs)
    return out.getvalue()


FILES = {
    "d.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS).encode(),
    "d.json": json.dumps(PAIRS, indent=1).encode(),
    "d.csv": as_csv(PAIRS),
    "semicolons.csv": as_csv(PAIRS, delimiter=";", lineterminator="\n"),
    "quoted.csv": as_csv(PAIRS, quoting=csv.QUOTE_ALL),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(PAIRS),
    "d.parquet": as_parquet(PAIRS, row_group_size=2),
}
FILES |= {
    f"{name}.gz": gzip.compress(data, mtime=0)
    for name, data in FILES.items()
    if name != "d.parquet"
}


@pytest.mark.parametrize("filename", FILES)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, filename: str) -> None:
    (tmp_path / filename).write_bytes(FILES[filename])
    found = list(read_rows(tmp_path / filename, filename))
    assert [row.content for row in found] == [Text(r["prompt"], r["completion"]) for r in PAIRS]
    report = judged(filename, FILES[filename])
    assert report.ok, report.summary(filename)
    assert (report.rows, len(report.warnings)) == ((0, 1) if "parquet" in filename else (5, 0))


@pytest.mark.parametrize("filename", FILES)
def test_a_file_is_judged_the_same_however_it_is_cut(filename: str) -> None:
    reports = [judged(filename, FILES[filename], size) for size in (1, 7, 2**16)]
    assert reports[0] == reports[1] == reports[2]


def test_a_text_file_is_its_documents(tmp_path: Path) -> None:
    path = tmp_path / "d.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb<|endoftext|>\nc\n"))
    assert [row.content for row in read_rows(path, path.name)] == [Text("", "a\nb"), Text("", "c")]


def test_a_text_without_line_ends_is_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    text = "äbc d" * (streams.MAX_LINE_BYTES // 4)
    path.write_text(text, encoding="utf-8")
    parts = [row.content.completion for row in read_rows(path, path.name)]  # type: ignore[union-attr]
    assert len(parts) > 1
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")


def test_parquet_leaves_columns_that_nobody_needs_unread(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "image": [b"\x00" * 10], "n": [{"x": 1}]})
    pq.write_table(table, tmp_path / "d.parquet")
    assert [row.content for row in read_rows(tmp_path / "d.parquet", "d.parquet")] == [
        Text("", "a")
    ]


def test_messages_come_through_parquet_without_the_nulls_it_adds(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    ]
    (tmp_path / "d.parquet").write_bytes(as_parquet(rows))
    found = [row.content for row in read_rows(tmp_path / "d.parquet", "d.parquet")]
    assert found == [parsed(row) for row in rows]
    assert isinstance(found[0], Conversation)
    assert found[0].messages == [USER, ASSISTANT]


def test_a_parquet_row_that_is_unusable_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(as_parquet([*PAIRS, {"prompt": "a", "completion": None}]))
    with pytest.raises(DataError, match=r"d\.parquet, line 6, /completion: completion must be a"):
        list(read_rows(tmp_path / "d.parquet", "d.parquet"))


def test_a_parquet_file_that_is_damaged_inside_is_refused(tmp_path: Path) -> None:
    data = bytearray(FILES["d.parquet"])
    data[4:40] = b"\xff" * 36
    (tmp_path / "d.parquet").write_bytes(bytes(data))
    with pytest.raises(DataError, match="not readable as Parquet"):
        list(read_rows(tmp_path / "d.parquet", "d.parquet"))


def test_a_row_group_that_would_not_fit_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_GROUP_BYTES", 10)
    (tmp_path / "d.parquet").write_bytes(FILES["d.parquet"])
    with pytest.raises(DataError, match="smaller row groups"):
        list(read_rows(tmp_path / "d.parquet", "d.parquet"))


def test_a_gzip_bomb_is_left_before_it_is_unpacked() -> None:
    bomb = gzip.compress(b" " * (streams.FREE_EXPANDED_BYTES + 2**24))
    report = judged("d.txt.gz", bomb)
    assert [p.code for p in report.problems] == ["too_long"]
    assert "200 times" in report.problems[0].message


def test_gzip_that_ends_between_two_pieces_of_output_is_whole() -> None:
    for extra in range(3):
        data = gzip.compress(b"a" * (2**20 + extra))
        unpacked = streams.Gunzip()
        assert len(b"".join(unpacked.feed(data, last=True))) == 2**20 + extra


@pytest.mark.parametrize(
    ("filename", "data", "code", "words"),
    [
        ("d.csv", b"prompt,completion\na,b\nc\n", "bad_csv", "line 3: 1 fields; the header has 2"),
        ("d.csv", b"prompt,prompt\na,b\n", "bad_csv", "names 'prompt' twice"),
        ("d.csv", b"what,ever\na,b\n", "unknown_format", "first row must name the columns"),
        ("d.csv", b'prompt,completion\n"a,b\n', "bad_csv", "line 2: not valid CSV"),
        ("d.csv", b'prompt,completion\na,b\n\n"c\n d",\xff\n', "not_utf8", "at offset 30"),
        ("d.jsonl", gzip.compress(b"{}", mtime=0), "unknown_format", "must end in .gz"),
        (
            "d.jsonl.gz",
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "unknown_format",
            "gzip data",
        ),
        ("d.jsonl.gz", b"{}", "bad_gzip", "not valid gzip"),
        ("d.jsonl.gz", FILES["d.jsonl.gz"][:-4], "bad_gzip", "cut off"),
        ("d.parquet.gz", gzip.compress(FILES["d.parquet"], mtime=0), "bad_parquet", "without gzip"),
        ("d.parquet", FILES["d.parquet"][:-1], "bad_parquet", "PAR1"),
        ("d.parquet", b"", "empty_file", "no rows"),
        ("d.csv", b"prompt,completion\n", "empty_file", "no rows"),
        ("d.txt", "abc".encode("utf-16-le"), "not_text", "NUL byte"),
        ("d.json", b'{"data": []}', "unknown_format", "one array of rows"),
        ("d.json", b'[\n{"a]', "bad_json", "Unterminated string starting at column 2"),
        ("d.jsonl", b'{"a": "b', "bad_json", "Unterminated string starting at column 7"),
        ("d.jsonl", b"{a}", "bad_json", "double quotes at column 2"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_a_reason(
    tmp_path: Path, filename: str, data: bytes, code: str, words: str
) -> None:
    report = judged(filename, data)
    assert report.problems[0].code == code
    assert words in report.summary(filename)
    if code == "empty_file":
        return
    (tmp_path / filename).write_bytes(data)
    with pytest.raises(DataError):
        list(read_rows(tmp_path / filename, filename))


def test_a_quote_in_the_middle_of_a_field_swallows_no_row(tmp_path: Path) -> None:
    data = b'prompt,completion\n5" pipe,b\nc,"d\ne"\nf,g\n'
    (tmp_path / "d.csv").write_bytes(data)
    found = [row.content for row in read_rows(tmp_path / "d.csv", "d.csv")]
    assert found == [Text('5" pipe', "b"), Text("c", "d\ne"), Text("f", "g")]
    assert judged("d.csv", data).rows == 3


def test_a_conversation_is_what_chat_templates_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
        {"role": "assistant", "content": "noon", "weight": 1, "audio": None},
    ]
    found = parsed({"messages": messages, "tools": json.dumps([{"name": "now"}])})
    call = {"id": "c1", "type": "function"} | {
        "function": {"name": "now", "arguments": {"tz": "UTC"}}
    }
    assert found == Conversation(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "ab", "name": "me"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            {"role": "assistant", "content": "noon"},
        ],
        [False, False, False, False, True],
        [{"type": "function", "function": {"name": "now"}}],
    )


def test_sharegpt_is_the_same_conversation_by_other_names() -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "now", "arguments": {"tz": "UTC"}}'},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "b"},
    ]
    found = parsed({"conversations": turns, "system": "s", "tools": "[]"})
    assert isinstance(found, Conversation)
    assert [m["role"] for m in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "now", "arguments": {"tz": "UTC"}}}
    ]
    assert found.trained == [False, False, True, False, True]
    assert found.tools is None


def test_a_prompt_of_messages_is_context_and_its_completion_is_trained() -> None:
    found = parsed({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert isinstance(found, Conversation)
    assert found.trained == [False, False, False, True]


def test_alpaca_joins_the_input_to_the_instruction() -> None:
    found = parsed({"instruction": "a", "input": "b", "output": "c", "system": "s"})
    assert isinstance(found, Conversation)
    assert [m["content"] for m in found.messages] == ["s", "a\n\nb", "c"]


@pytest.mark.parametrize(
    ("row", "code", "pointer"),
    [
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "bad_type", "/messages/1/weight"),
        ({"messages": [USER, {**ASSISTANT, "weight": True}]}, "bad_type", "/messages/1/weight"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "no_assistant", "/messages"),
        ({"messages": [USER]}, "no_assistant", "/messages"),
        ({"messages": [{**USER, "role": ["user"]}]}, "bad_role", "/messages/0/role"),
        ({"messages": "[1"}, "bad_json", "/messages"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "bad_type", "/messages/1/tool_calls/0"),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, "bad_type", "/tools"),
        ({"messages": [USER, ASSISTANT] * 513}, "too_long", "/messages"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "bad_type", "/messages/0/content/0"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "bad_role", "/conversations/0/from"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "empty_content", "/conversations/0/value"),
        ({"conversations": [{"from": "gpt"}], "system": "s"}, "bad_type", "/conversations/0/value"),
        ({"conversations": [{"from": "function_call", "value": "now()"}]}, "bad_json", "/conversations/0/value"),
        ({"prompt": [USER], "completion": "b"}, "bad_type", "/prompt"),
        ({"text": "\ud800"}, "not_utf8", "/text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "unknown_format", ""),
    ],
)  # fmt: skip
def test_an_unusable_row_is_named_by_its_place(
    row: dict[str, Any], code: str, pointer: str
) -> None:
    with pytest.raises(RowError) as caught:
        parsed(row)
    assert (caught.value.code, caught.value.pointer) == (code, pointer)


@given(
    filename=st.sampled_from([*FILES, "d.txt", "d.txt.gz", "d"]),
    start=st.sampled_from([b"", *FILES.values()]),
    noise=st.binary(max_size=200),
    at=st.integers(0, 400),
    size=st.integers(1, 50),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_bytes_crash_the_check_or_the_reader(
    tmp_path: Path, filename: str, start: bytes, noise: bytes, at: int, size: int
) -> None:
    data = start[:at] + noise + start[at:]
    report = judged(filename, data, size)
    assert report.ok == judged(filename, data).ok
    (tmp_path / filename).write_bytes(data)
    try:
        found = list(read_rows(tmp_path / filename, filename))
    except DataError:
        assert not report.ok or "parquet" in filename
        return
    assert report.ok or not found, "what the check refuses is not trained on"


@pytest.mark.parametrize(
    ("filename", "data"),
    [
        ("d.json", b"[" + b"[]," * 2**20 + b"[]]"),
        ("d.json", b'{"prompt": "a", "completion": "b"}\n' * 2**16),
        ("d.json.gz", gzip.compress(b"[" + b"[]," * 2**20 + b"[]]")),
        ("d.jsonl", b'{"a": [' + b"[]," * 2**20 + b"[]]}\n"),
    ],
)
def test_json_in_large_pieces_is_left_unread_in_little_memory(filename: str, data: bytes) -> None:
    tracemalloc.start()
    report = judged(filename, data, piece_bytes=2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.ok, report.unread, report.rows, len(report.warnings)) == (True, True, 0, 1)
    assert peak < 16 * 2**20


def test_a_small_array_and_bad_lines_beside_a_large_one_are_judged_at_once() -> None:
    small = judged("d.json", FILES["d.json"], piece_bytes=2**20)
    assert (small.rows, small.unread) == (5, False)
    mixed = judged("d.jsonl", b"{broken\n" + b" " * 200 + b"{}\n", piece_bytes=100)
    assert (mixed.problem_count, mixed.problems[0].line, mixed.unread) == (1, 1, True)
    # What no worker would take either is refused here.
    assert judged("d.json", b"PK\x03\x04" + b"x" * 600, piece_bytes=100).problem_count == 1


def test_what_is_said_of_a_file_is_bounded_however_many_and_large_its_bad_rows_are() -> None:
    row = json.dumps({"conversations": [{"from": "x" * 10_000, "value": "a"}]}).encode()
    report = judged("d.jsonl", (row + b"\n") * 500)
    assert (report.problem_count, len(report.problems)) == (500, 100)
    assert all(len(p.message) < 500 and len(p.excerpt) <= 120 for p in report.problems)
