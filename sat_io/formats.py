"""Which data files may be trained on, judged while the bytes arrive.

The checker sees each byte once and holds one row at a time, so an upload is judged when it ends, in bounded memory, and a
broken row is named by its line, byte offset and JSON pointer. Rows come from `plan.parsing` and their meaning from
`plan.rows`, both shared with the reader of `prepare`. Parquet is the exception: its index lies at the end, so only the
frame of the file is checked here; and JSON in larger pieces than whoever checks may parse. Both are `unread`, for a
worker to judge, and `prepare` refuses a broken row with the same words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sat_io.parsing import UNREAD, RowStream, kind_of
from sat_io.rows import RowError, detect_format, parse_row
from sat_io.streams import BOM, MAX_ARRAY_BYTES, Item

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_io.rows import Conversation, Text

MAX_PROBLEMS = 100
UNREAD_WARNING = "The rows of this file are checked by a worker, not while they arrive."
PARQUET_MAGIC = b"PAR1"
# Magic, four bytes of length and the magic again: what is left when a Parquet file holds nothing.
_PARQUET_FRAME_BYTES = 12
EMPTY_FILE = RowError("empty_file", "", "the file holds no rows")
# Where a fault lies that is of the whole file.
NO_LINE = Item(1, 0, b"")


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
    """The verdict on a file; `rows` counts usable rows: lines of text for `text` files. `unread` ones are not judged yet."""

    format: str
    rows: int
    problems: tuple[Problem, ...] = ()
    problem_count: int = 0
    warnings: tuple[str, ...] = ()
    encoding: str | None = "utf-8"
    unread: bool = False

    @property
    def ok(self) -> bool:
        """Whether every row can be trained on."""
        return self.problem_count == 0

    def summary(self, filename: str) -> str:
        """One sentence that holds the fix."""
        if self.ok and self.unread:
            return f"{filename}: {UNREAD_WARNING}"
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
    but Parquet is unpacked. Whoever can read Parquet hands its rows to `judge`.

    Attributes:
        filename: the owner's name.
        format: of the rows, or "auto".
        piece_bytes: JSON that has more in one piece, a line or an array, is left unread.
        each: told every good row of a table of rows; may raise RowError, then the row is a bad one.
    """

    filename: str
    format: str = "auto"
    piece_bytes: int = MAX_ARRAY_BYTES
    each: Callable[[Item, Text | Conversation], None] | None = None
    _unread: bool = False
    _rows: int = 0
    _problems: list[Problem] = field(default_factory=list)
    _problem_count: int = 0
    _bytes: int = 0
    _start: bytes = b""
    _end: bytes = b""
    _bom: bool = False
    _crlf: int = 0

    def __post_init__(self) -> None:
        self._kind, packed = kind_of(self.filename)
        if self._kind == "text":
            self.format = "text"
        self._packed_parquet = packed and self._kind == "parquet"
        self._stream = (
            None if self._kind == "parquet" else RowStream(self.filename, self.piece_bytes)
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the file, in order."""
        self._bytes += len(chunk)
        if self._stream is None:
            self._start = (self._start + chunk[:4])[:4]
            self._end = (self._end + chunk)[-8:]
            return
        for item in self._stream.feed(chunk):
            self.judge(item)

    def finish(self) -> FileReport:
        """The verdict, once all bytes were fed."""
        if self._stream is None and self._problem_count == 0:
            self._judge_frame()
            self._unread = not (self._rows or self._problem_count)
        for item in self._stream.feed(b"", last=True) if self._stream else ():
            self.judge(item)
        if self._stream and not (self._rows or self._problem_count or self._unread):
            self._problem(EMPTY_FILE)
        return FileReport(
            format=self.format,
            rows=self._rows,
            problems=tuple(self._problems),
            problem_count=self._problem_count,
            warnings=self._warnings() if self._problem_count == 0 else (),
            encoding=None if self._stream is None else "utf-8-sig" if self._bom else "utf-8",
            unread=self._unread,
        )

    def _warnings(self) -> tuple[str, ...]:
        # In tables both are customary.
        lines = self._kind == "lines"
        said = {
            UNREAD_WARNING: self._unread,
            "The file begins with a byte-order mark, which is left out.": lines and self._bom,
            f"{self._crlf} lines end in CRLF.": lines and self._crlf,
        }
        return tuple(words for words, true in said.items() if true)

    def judge(self, item: Item) -> None:
        """Take one row, or what is wrong with it."""
        self._bom |= item.byte_offset == 0 and item.raw.startswith(BOM)
        self._crlf += item.raw.endswith(b"\r")
        if item.error is UNREAD:
            self._unread = True
        elif item.error is not None:
            self._problem(item.error, item)
        elif self._kind == "text":
            self._rows += bool(item.row.strip())
        else:
            try:
                if self.format == "auto":
                    self.format = detect_format(item.row)
                content = parse_row(item.row, self.format)
                if self.each is not None:
                    self.each(item, content)
                self._rows += 1
            except RowError as error:
                self._problem(error, item)

    def _judge_frame(self) -> None:
        length = int.from_bytes(self._end[:4], "little")
        if self._bytes == 0:
            self._problem(EMPTY_FILE)
            return
        if self._packed_parquet:
            message = "a Parquet file is compressed inside; send it without gzip"
        elif (self._start, self._end[4:]) != (PARQUET_MAGIC, PARQUET_MAGIC):
            message = "not a Parquet file: it does not begin and end with PAR1"
        elif not 0 < length <= self._bytes - _PARQUET_FRAME_BYTES:
            message = f"the Parquet footer claims {length} bytes, the file has {self._bytes}"
        else:
            return
        self._problem(RowError("bad_parquet", "", message))

    def _problem(self, error: RowError, item: Item = NO_LINE) -> None:
        self._problem_count += 1
        if len(self._problems) == MAX_PROBLEMS:
            return
        raw = item.raw
        if not raw and item.row is not None:
            raw = json.dumps(item.row).encode()
        excerpt = raw[:120].decode("utf-8", "replace")
        self._problems.append(
            Problem(
                line=item.line,
                byte_offset=item.byte_offset,
                pointer=error.pointer,
                code=error.code,
                message=error.message,
                excerpt=excerpt,
            )
        )
