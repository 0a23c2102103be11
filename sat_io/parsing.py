"""Bytes of a data file to rows, pushed in as they come.

`RowStream` decides by the file's name, holds one row at a time (a .json array whole) and gives each row or what is wrong
with it, so the upload check and the reader of `prepare` see the same rows and the same faults. JSON takes some twenty
times its bytes as objects, and a process waits until the last one is made, so whoever serves others names the most that
it parses in one piece. The road not taken is pulling from an open file: an upload has none.
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any, Protocol

from sat_io.rows import RowError, detect_format
from sat_io.streams import MAX_ARRAY_BYTES, MAX_LINE_BYTES, Gunzip, Item, Line, Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEAD_BYTES = 512
_FOREIGN = (
    (b"\x1f\x8b", 0, "gzip data; its name must end in .gz, once"),
    (b"PK\x03\x04", 0, "a zip archive; unpack it and send the file inside"),
    (b"ustar", 257, "a tar archive; unpack it and send a file inside"),
    (b"PAR1", 0, "Parquet data; its name must end in .parquet"),
    (b"\xff\xfe", 0, "UTF-16 or UTF-32; save it as UTF-8"),
    (b"\xfe\xff", 0, "UTF-16; save it as UTF-8"),
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the file; fetch it with git lfs pull"),
    (b"<!doctype", 0, "a web page, not data"),
    (b"<html", 0, "a web page, not data"),
)

# In place of what is left to whoever may parse larger pieces.
UNREAD = RowError("unread", "", "more than is parsed in one piece here")
_KINDS = {".txt": "text", ".md": "text", ".json": "array", ".csv": "csv", ".parquet": "parquet"}


class _Parser(Protocol):
    def feed(self, data: bytes, *, last: bool) -> Iterator[Item]: ...


def kind_of(filename: str) -> tuple[str, bool]:
    """How a file of this name is read ("text", "array", "csv", "parquet" or "lines"), and whether it is gzipped."""
    name = filename.lower()
    plain = name.removesuffix(".gz")
    kinds = (kind for ending, kind in _KINDS.items() if plain.endswith(ending))
    return next(kinds, "lines"), plain != name


class RowStream:
    """The rows of one file: `feed` its bytes in order. After an item that is `last` all is ignored."""

    def __init__(self, filename: str, piece_bytes: int = MAX_ARRAY_BYTES) -> None:
        """Begin.

        Args:
            filename: the owner's name for the file; any but Parquet.
            piece_bytes: a line or an array of JSON that has more is UNREAD.
        """
        self._kind, packed = kind_of(filename)
        self._gunzip = Gunzip() if packed else None
        self._head: bytes | None = b""
        parsers: dict[str, Callable[[], _Parser]] = {
            "text": lambda: EachLine(_text_rows, cut=True),
            "array": lambda: JsonArray(piece_bytes),
            "csv": CsvRows,
            "lines": lambda: EachLine(_json_rows, piece_bytes),
        }
        self._parser = parsers[self._kind]()
        self._done = False

    def feed(self, chunk: bytes, *, last: bool = False) -> Iterator[Item]:
        """Rows that these bytes complete; the `last` bytes, if none, complete all."""
        if self._done:
            return
        try:
            for item in self._items(chunk, last=last):
                yield item
                if item.last:
                    self._done = True
                    return
        except RowError as error:
            self._done = True
            yield Item(1, 0, b"", error=error, last=True)

    def _items(self, chunk: bytes, *, last: bool) -> Iterator[Item]:
        for piece in self._gunzip.feed(chunk, last=last) if self._gunzip else (chunk,):
            yield from self._parse(piece, last=False)
        if last:
            yield from self._parse(b"", last=True)

    def _parse(self, piece: bytes, *, last: bool) -> Iterator[Item]:
        if self._head is not None:
            self._head += piece
            if len(self._head) < _HEAD_BYTES and not last:
                return
            piece, self._head = self._head, None
            _refuse_foreign(piece, self._kind)
        yield from self._parser.feed(piece, last=last)


class EachLine:
    """Rows of a file in which each line is one, or none; `read` says which."""

    def __init__(
        self,
        read: Callable[[Line], Iterator[Any]],
        piece_bytes: int = MAX_ARRAY_BYTES,
        *,
        cut: bool = False,
    ) -> None:
        self._read, self._most, self._lines = read, piece_bytes, Lines(cut=cut)

    def feed(self, data: bytes, *, last: bool) -> Iterator[Item]:
        """Rows that these bytes complete."""
        for line in self._lines.feed(data, last=last):
            try:
                if len(line.raw) > self._most:
                    raise UNREAD
                yield from map(line.item, self._read(line))
            except RowError as error:
                yield line.item(error=error)


class JsonArray:
    """One JSON array of rows, held whole; JSON Lines under the name .json are read as such."""

    def __init__(self, piece_bytes: int) -> None:
        self._most = piece_bytes
        self._held: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes, *, last: bool) -> Iterator[Item]:
        """All rows, after the last bytes."""
        self._size += len(data)
        self._held.append(data)
        if self._size > MAX_ARRAY_BYTES:
            self._held.clear()
            message = f"a .json array may have {MAX_ARRAY_BYTES} bytes; use JSON Lines"
            raise RowError("too_long", "", message)
        if self._size > self._most:
            self._held.clear()
            if last:
                raise UNREAD
        elif last:
            yield from self._rows()

    def _rows(self) -> Iterator[Item]:
        whole = Line(1, 0, b"".join(self._held), ended=False)
        self._held.clear()
        text = whole.text()
        if not text.strip():
            return
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") == "Extra data":
                yield from EachLine(_json_rows).feed(whole.raw, last=True)
                return
            line, at = getattr(error, "lineno", 1), getattr(error, "pos", 0)
            fault = RowError("bad_json", "", f"not valid JSON: {_reason(error)}")
            yield Item(line, len(text[:at].encode("utf-8", "replace")), b"", None, fault, last=True)
            return
        if not isinstance(rows, list):
            raise RowError("unknown_format", "", "a .json file must hold one array of rows")
        for number, row in enumerate(rows, 1):
            yield Item(number, 0, b"", row)


class CsvRows:
    """Rows of a table whose first row names the columns; fields are strings, and may hold line ends in quotes.

    A row ends where the quotes are even, which bounds what is held; the standard library's reader then decides.
    """

    def __init__(self) -> None:
        csv.field_size_limit(MAX_LINE_BYTES)
        self._lines = Lines()
        self._held: list[str] = []
        self._first: Line | None = None
        self._odd = False
        self._size = 0
        self._header: list[str] = []
        self._delimiter = ","

    def feed(self, data: bytes, *, last: bool) -> Iterator[Item]:
        """Rows that these bytes complete, and in the end a quote that never closed."""
        for line in self._lines.feed(data, last=last):
            yield from self._take(line)
        if last and self._first is not None:
            yield from self._records(self._first, final=True)

    def _take(self, line: Line) -> Iterator[Item]:
        try:
            text = line.text() + "\n" * line.ended
        except RowError as error:
            yield line.item(error=error)
            return
        first = self._first = self._first or line
        self._held.append(text)
        self._size += len(line.raw)
        self._odd ^= text.count('"') % 2 == 1
        if self._size > MAX_LINE_BYTES:
            message = f"a row of more than {MAX_LINE_BYTES} bytes; is a quote never closed?"
            yield first.item(error=RowError("too_long", "", message))._replace(last=True)
        elif not self._odd:
            yield from self._records(first, final=False)

    def _records(self, first: Line, *, final: bool) -> Iterator[Item]:
        self._delimiter = self._delimiter if self._header else _delimiter(self._held[0])
        reader = csv.reader(self._held, delimiter=self._delimiter, strict=True)
        records, at, fault = [], 0, None
        try:
            for record in reader:
                records.append((first.number + at, record))
                at = reader.line_num
        except csv.Error as error:
            if "unexpected end" in str(error) and not final:
                return
            fault = RowError("bad_csv", "", f"not valid CSV: {error}")
        self._held, self._first, self._odd, self._size = [], None, False, 0
        for number, record in records:
            if len(record) > 1 or (record and record[0].strip()):
                yield from self._row(record, first._replace(number=number))
        if fault:
            yield first._replace(number=first.number + at).item(error=fault)

    def _row(self, record: list[str], line: Line) -> Iterator[Item]:
        if not self._header:
            try:
                self._header = _header(record)
            except RowError as error:
                yield line.item(error=error)._replace(last=True)
        elif len(record) == len(self._header):
            yield line.item(dict(zip(self._header, record, strict=True)))
        else:
            message = f"{len(record)} fields; the header has {len(self._header)}"
            yield line.item(error=RowError("bad_csv", "", message))


def _header(names: list[str]) -> list[str]:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise RowError("bad_csv", "", f"the header names {double[0]!r:.60} twice")
    try:
        detect_format(dict.fromkeys(names, ""))
    except RowError as error:
        message = f"the first row must name the columns: {error.message}"
        raise RowError(error.code, error.pointer, message) from error
    return names


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _refuse_foreign(head: bytes, kind: str) -> None:
    for magic, at, what in _FOREIGN:
        text = magic.startswith(b"<")
        found = head.lower().lstrip() if text else head
        if found[at:].startswith(magic) and not (text and kind == "text"):
            raise RowError("unknown_format", "", f"this is {what}")


def _text_rows(line: Line) -> Iterator[str]:
    text = line.text()
    if "\0" in text:
        raise RowError("not_text", "", "holds a NUL byte; is it UTF-16, or no text at all?")
    yield text + "\n" * line.ended


def _json_rows(line: Line) -> Iterator[Any]:
    text = line.text()
    if not text.strip():
        return
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", "", f"not valid JSON: {_reason(error)}") from error
    yield row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
