"""Which rows a data file may hold, checked line by line while the bytes arrive.

The checker sees each byte once and holds one line at a time, so an upload is judged when it ends, in bounded memory,
and a broken row is named by its line, byte offset and JSON pointer. Reading for training is `sat_core.data`'s work.
The road not taken is a JSON Schema: its messages do not say what a trainer would have done with the row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_BYTES = 8 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
MAX_PROBLEMS = 100
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One unusable row; `line` is 1-based, `pointer` is RFC 6901 inside the row."""

    line: int
    byte_offset: int
    pointer: str
    code: str
    message: str
    excerpt: str = ""


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """The verdict on a file; `rows` counts usable rows (lines of text for `text` files)."""

    format: str
    rows: int
    problems: tuple[Problem, ...] = ()
    problem_count: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row can be trained on."""
        return self.problem_count == 0

    def summary(self, filename: str) -> str:
        """One sentence that holds the fix."""
        if self.ok:
            return f"{filename}: {self.rows} rows of format {self.format}."
        first = self.problems[0]
        if first.code == "empty_file":
            return f"{filename}: {first.message}."
        place = f"line {first.line}{', ' + first.pointer if first.pointer else ''}"
        return f"{filename}: {self.problem_count} unusable rows (first: {place}: {first.message})"


class RowError(ValueError):
    """A row that cannot be trained on: `code`, `pointer`, and the message as text."""

    def __init__(self, code: str, pointer: str, message: str) -> None:
        super().__init__(code, pointer, message)
        self.code, self.pointer, self.message = code, pointer, message


def detect_format(row: Any) -> str:
    """The format of one row.

    Raises:
        RowError: where the row has none of the known keys.
    """
    if not isinstance(row, dict):
        raise RowError(
            "unknown_format", "", f"a row must be a JSON object; got {type(row).__name__}"
        )
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    keys = ", ".join(map(repr, list(row)[:8])) or "none"
    raise RowError(
        "unknown_format",
        "",
        f"keys are {keys}; needed are 'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'",
    )


def check_row(row: Any, format: str) -> None:
    """Check one row of a known format.

    Raises:
        RowError: naming the place inside the row and what is allowed there.
    """
    found = detect_format(row)
    if found != format:
        raise RowError("mixed_formats", "", f"this row is {found}, the rows before it are {format}")
    if format == "messages":
        _check_messages(row["messages"])
    elif format == "prompt_completion":
        _text(row, "prompt", empty=True)
        _text(row, "completion")
    elif format == "alpaca":
        _text(row, "instruction")
        _text(row, "output")
        if row.get("input") is not None:
            _text(row, "input", empty=True)
    else:
        _text(row, "text")


def _text(row: dict[str, Any], key: str, *, empty: bool = False) -> None:
    value = row[key]
    if not isinstance(value, str):
        raise RowError("bad_type", f"/{key}", f"{key} must be a string; got {type(value).__name__}")
    if not empty and not value.strip():
        raise RowError("empty_content", f"/{key}", f"{key} is empty")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise RowError("bad_type", "/messages", "messages must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(
                "bad_type", f"/messages/{i}", "a message must be an object with role and content"
            )
        role = message.get("role")
        if role not in ROLES:
            raise RowError(
                "bad_role", f"/messages/{i}/role", f"role {role!r} is not one of {', '.join(ROLES)}"
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise RowError(
                "bad_type",
                f"/messages/{i}/content",
                f"content must be a string; got {type(content).__name__}",
            )
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise RowError(
                "empty_content", f"/messages/{i}/content", "an assistant's content is empty"
            )
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError(
            "no_assistant",
            "/messages",
            "no message has the role 'assistant', so there is nothing to train on",
        )


@dataclass
class FileCheck:
    """Judge a file while it streams: `feed` chunks, then `finish`.

    `.txt` is text, `.json` one array of rows (held in memory, at most 256 MiB), all else JSON Lines.
    """

    filename: str
    format: str = "auto"
    _tail: bytes = b""
    _offset: int = 0
    _line: int = 0
    _rows: int = 0
    _bytes: int = 0
    _problems: list[Problem] = field(default_factory=list)
    _problem_count: int = 0
    _skipping: bool = False

    def __post_init__(self) -> None:
        name = self.filename.lower()
        self._kind = (
            "text"
            if name.endswith((".txt", ".md"))
            else "array"
            if name.endswith(".json")
            else "lines"
        )
        if self._kind == "text":
            self.format = "text"

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file, in order."""
        self._bytes += len(chunk)
        data = self._tail + chunk
        if self._kind == "array":
            if len(data) <= MAX_ARRAY_BYTES:
                self._tail = data
            return
        *lines, self._tail = data.split(b"\n")
        for line in lines:
            self._take(line, ended=True)
        if len(self._tail) > MAX_LINE_BYTES and self._kind == "lines":
            self._too_long()
        elif self._kind == "text" and len(self._tail) > MAX_LINE_BYTES:
            cut = len(self._tail) - 4
            self._decode(self._tail[:cut], partial=True)
            self._offset += cut
            self._tail = self._tail[cut:]

    def finish(self) -> FileReport:
        """The verdict, once all bytes were fed."""
        if self._kind == "array":
            self._array()
        elif self._tail:
            self._take(self._tail, ended=False)
        if self._rows == 0 and self._problem_count == 0:
            self._problem("", "empty_file", "the file holds no rows", b"")
        return FileReport(
            format=self.format,
            rows=self._rows,
            problems=tuple(self._problems),
            problem_count=self._problem_count,
        )

    def _take(self, line: bytes, *, ended: bool) -> None:
        self._line += 1
        size = len(line) + ended
        if self._skipping:
            self._skipping = False
        elif self._kind == "text":
            text = self._decode(line)
            self._rows += bool(text is not None and text.strip())
        elif line.strip():
            if self._line == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            self._check_line(line)
        self._offset += size

    def _check_line(self, line: bytes) -> None:
        if len(line) > MAX_LINE_BYTES:
            self._problem("", "too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", line)
            return
        text = self._decode(line)
        if text is None:
            return
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            self._problem("", "bad_json", f"not valid JSON: {reason}{column}", line)
            return
        self._check(row, line)

    def _check(self, row: Any, raw: bytes) -> None:
        try:
            if self.format == "auto":
                self.format = detect_format(row)
            check_row(row, self.format)
            self._rows += 1
        except RowError as error:
            self._problem(error.pointer, error.code, error.message, raw)

    def _array(self) -> None:
        if self._bytes > MAX_ARRAY_BYTES:
            self._problem(
                "",
                "too_long",
                f"a .json array may have {MAX_ARRAY_BYTES} bytes; use JSON Lines",
                b"",
            )
            return
        text = self._decode(self._tail)
        if text is None or not text.strip():
            return
        try:
            rows = json.loads(text.removeprefix("\ufeff"))
        except (json.JSONDecodeError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                self._as_lines()
                return
            self._line, self._offset = getattr(error, "lineno", 1), getattr(error, "pos", 0)
            self._problem(
                "", "bad_json", f"not valid JSON: {getattr(error, 'msg', 'nested too deeply')}", b""
            )
            return
        if not isinstance(rows, list):
            self._problem("", "unknown_format", "a .json file must hold one array of rows", b"")
            return
        for number, row in enumerate(rows, 1):
            self._line = number
            self._check(row, json.dumps(row).encode()[:200])

    def _as_lines(self) -> None:
        """Some tools write JSON Lines under the name .json."""
        data, self._tail, self._kind = self._tail, b"", "lines"
        for line in data.split(b"\n"):
            self._take(line, ended=True)

    def _too_long(self) -> None:
        if not self._skipping:
            self._line += 1
            self._problem(
                "", "too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", self._tail[:200]
            )
            self._line -= 1
            self._skipping = True
        self._offset += len(self._tail)
        self._tail = b""

    def _decode(self, raw: bytes, *, partial: bool = False) -> str | None:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if partial and error.start >= len(raw) - 3:
                return raw[: error.start].decode("utf-8")
            at = self._offset + error.start
            self._problem(
                "", "not_utf8", f"byte 0x{raw[error.start]:02x} at offset {at} is not UTF-8", raw
            )
            return None

    def _problem(self, pointer: str, code: str, message: str, raw: bytes) -> None:
        self._problem_count += 1
        if len(self._problems) < MAX_PROBLEMS:
            excerpt = raw[:120].decode("utf-8", "replace")
            self._problems.append(
                Problem(
                    line=self._line,
                    byte_offset=self._offset,
                    pointer=pointer,
                    code=code,
                    message=message,
                    excerpt=excerpt,
                )
            )
