"""Which data files may be trained on, judged while the bytes arrive.

The checker sees each byte once and holds one row at a time, so an upload is judged when it ends, in bounded memory, and a
broken row is named by its line, byte offset and JSON pointer. Rows come from `plan.parsing` and their meaning from
`plan.rows`, both shared with the reader of `prepare`. Parquet is the exception: its index lies at the end, so only the
frame of the file is checked here, and `prepare` refuses a broken row with the same words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sat_core.plan.parsing import RowStream, kind_of
from sat_core.plan.rows import RowError, detect_format, parse_row
from sat_core.plan.streams import MAX_ARRAY_BYTES, MAX_LINE_BYTES

if TYPE_CHECKING:
    from sat_core.plan.streams import Item

__all__ = [
    "MAX_ARRAY_BYTES",
    "MAX_LINE_BYTES",
    "MAX_PROBLEMS",
    "FileCheck",
    "FileReport",
    "Problem",
]

MAX_PROBLEMS = 100
PARQUET_MAGIC = b"PAR1"
# Magic, four bytes of length and the magic again: what is left when a Parquet file holds nothing.
_PARQUET_FRAME_BYTES = 12


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
    """The verdict on a file; `rows` counts usable rows: lines of text for `text` files, 0 for Parquet."""

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


@dataclass
class FileCheck:
    """Judge a file while it streams: `feed` chunks, then `finish`.

    The name decides: `.txt` and `.md` are text, `.json` one array of rows (held in memory, at most 256 MiB), `.csv` a
    table with a header, `.parquet` a table of which the frame is checked, all else JSON Lines; `.gz` after any of them
    but Parquet is unpacked.
    """

    filename: str
    format: str = "auto"
    _rows: int = 0
    _problems: list[Problem] = field(default_factory=list)
    _problem_count: int = 0
    _bytes: int = 0
    _start: bytes = b""
    _end: bytes = b""

    def __post_init__(self) -> None:
        self._kind, packed = kind_of(self.filename)
        if self._kind == "text":
            self.format = "text"
        self._packed_parquet = packed and self._kind == "parquet"
        self._stream = None if self._kind == "parquet" else RowStream(self.filename)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file, in order."""
        self._bytes += len(chunk)
        if self._stream is None:
            self._start = (self._start + chunk[:4])[:4]
            self._end = (self._end + chunk)[-8:]
            return
        for item in self._stream.feed(chunk):
            self._judge(item)

    def finish(self) -> FileReport:
        """The verdict, once all bytes were fed."""
        warnings: tuple[str, ...] = ()
        if self._stream is None:
            self._judge_frame()
            warnings = ("The rows of a Parquet file are checked when a job prepares them.",)
        else:
            for item in self._stream.finish():
                self._judge(item)
            if self._rows == 0 and self._problem_count == 0:
                self._problem(RowError("empty_file", "", "the file holds no rows"))
        return FileReport(
            format=self.format,
            rows=self._rows,
            problems=tuple(self._problems),
            problem_count=self._problem_count,
            warnings=warnings if self._problem_count == 0 else (),
        )

    def _judge(self, item: Item) -> None:
        if item.error is not None:
            self._problem(item.error, item)
        elif self._kind == "text":
            self._rows += bool(item.row.strip())
        else:
            try:
                if self.format == "auto":
                    self.format = detect_format(item.row)
                parse_row(item.row, self.format)
                self._rows += 1
            except RowError as error:
                self._problem(error, item)

    def _judge_frame(self) -> None:
        length = int.from_bytes(self._end[:4], "little")
        if self._bytes == 0:
            self._problem(RowError("empty_file", "", "the file holds no rows"))
        elif self._packed_parquet:
            message = "a Parquet file is compressed inside; send it without gzip"
            self._problem(RowError("bad_parquet", "", message))
        elif (self._start, self._end[4:]) != (PARQUET_MAGIC, PARQUET_MAGIC):
            message = "not a Parquet file: it does not begin and end with PAR1"
            self._problem(RowError("bad_parquet", "", message))
        elif not 0 < length <= self._bytes - _PARQUET_FRAME_BYTES:
            message = f"the Parquet footer claims {length} bytes, the file has {self._bytes}"
            self._problem(RowError("bad_parquet", "", message))

    def _problem(self, error: RowError, item: Item | None = None) -> None:
        self._problem_count += 1
        if len(self._problems) == MAX_PROBLEMS:
            return
        raw = b"" if item is None else item.raw
        if not raw and item is not None and item.row is not None:
            raw = json.dumps(item.row).encode()
        self._problems.append(
            Problem(
                line=1 if item is None else item.line,
                byte_offset=0 if item is None else item.byte_offset,
                pointer=error.pointer,
                code=error.code,
                message=error.message,
                excerpt=raw[:120].decode("utf-8", "replace"),
            )
        )
