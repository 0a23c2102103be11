"""Bytes as they come: gzip members unpacked and lines cut, both in bounded pieces.

An offset here is one of the uncompressed bytes. The road not taken is `gzip.open`, which wants a file to pull from and
unpacks without a bound.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from sat_io.rows import RowError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LINE_BYTES = 8 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
# A gzip file may grow to this size, and past the free bytes to this many times its own: text seldom exceeds 20 times.
MAX_EXPANDED_BYTES = 16 * 2**30
MAX_EXPANSION = 200
FREE_EXPANDED_BYTES = 64 * 2**20
_PIECE_BYTES = 2**20
BOM = b"\xef\xbb\xbf"


class Item(NamedTuple):
    """One row, or its fault.

    Attributes:
        line: 1-based; in a .json array the row's number.
        byte_offset: where the line begins.
        raw: the bytes it came from; empty for a row of an array.
        row: what was read: an object of JSON or a table, or a line of text with its end.
        error: what is wrong, then `row` is None.
        last: whether nothing after it can be read.
    """

    line: int
    byte_offset: int
    raw: bytes
    row: Any = None
    error: RowError | None = None
    last: bool = False


class Gunzip:
    """A gzip stream of one or more members, decompressed in bounded pieces and to a bounded size."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._taken = self._given = 0

    def feed(self, data: bytes, *, last: bool) -> Iterator[bytes]:
        """Pieces of at most 1 MiB.

        Raises:
            RowError: where the data is not gzip, grows beyond bounds, or is cut off after the `last` bytes.
        """
        self._taken += len(data)
        more = bool(data)
        while more:
            if self._member.eof:
                data = data.lstrip(b"\0")  # tape padding
                if not data:
                    return
                self._member = zlib.decompressobj(wbits=31)
            try:
                piece = self._member.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise RowError("bad_gzip", "", f"not valid gzip data: {error}") from error
            data = self._member.unconsumed_tail or self._member.unused_data
            self._given += len(piece)
            # A full piece may have used up the input and left output inside the decompressor.
            more = bool(data) or (len(piece) == _PIECE_BYTES and not self._member.eof)
            self._refuse_bomb()
            yield piece
        if last and self._taken and not self._member.eof:
            raise RowError("bad_gzip", "", "the gzip data is cut off")

    def _refuse_bomb(self) -> None:
        if self._given > MAX_EXPANDED_BYTES:
            raise RowError(
                "too_long", "", f"expands to more than {MAX_EXPANDED_BYTES} bytes, the limit"
            )
        if self._given > max(FREE_EXPANDED_BYTES, MAX_EXPANSION * self._taken):
            raise RowError(
                "too_long",
                "",
                f"expands to more than {MAX_EXPANSION} times its size, the limit; send it uncompressed",
            )


class Line(NamedTuple):
    """One line without its end, or a part of one; `too_long` has the first bytes alone."""

    number: int
    byte_offset: int
    raw: bytes
    ended: bool
    too_long: bool = False

    def text(self) -> str:
        """The line decoded, without a byte-order mark.

        Raises:
            RowError: where it is not UTF-8, or too long.
        """
        if self.too_long:
            raise RowError("too_long", "", f"the line is longer than {MAX_LINE_BYTES} bytes")
        raw = self.raw.removeprefix(BOM) if self.byte_offset == 0 else self.raw
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = self.byte_offset + len(self.raw) - len(raw) + error.start
            raise RowError(
                "not_utf8", "", f"byte 0x{raw[error.start]:02x} at offset {at} is not UTF-8"
            ) from error

    def item(self, row: Any = None, error: RowError | None = None) -> Item:
        """The item that this line makes."""
        return Item(self.number, self.byte_offset, self.raw, row, error)


class Lines:
    """Lines of bounded length: one that is longer is named and skipped, or with `cut` given in parts."""

    def __init__(self, *, cut: bool = False) -> None:
        self._cut, self._tail, self._skipping = cut, b"", False
        self._number = self._offset = 0

    def feed(self, data: bytes, *, last: bool) -> Iterator[Line]:
        """Lines that these bytes complete; the `last` bytes complete the line without an end."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for raw in lines:
            yield from self._take(raw, ended=True)
        if last and self._tail:
            yield from self._take(self._tail, ended=False)
        elif len(self._tail) > MAX_LINE_BYTES:
            yield from self._part()

    def _part(self) -> Iterator[Line]:
        """The beginning of a line that is too long to wait for its end."""
        at = len(self._tail)
        if self._cut:
            at -= 1
            while self._tail[at] & 0xC0 == 0x80 and at > len(self._tail) - 4:
                at -= 1  # never inside a character
        part, self._tail = self._tail[:at], self._tail[at:]
        if not self._skipping:
            raw = part if self._cut else part[:200]
            yield Line(self._number + 1, self._offset, raw, ended=False, too_long=not self._cut)
        self._skipping = not self._cut
        self._offset += at

    def _take(self, raw: bytes, *, ended: bool) -> Iterator[Line]:
        self._number += 1
        if not self._skipping:
            long = len(raw) > MAX_LINE_BYTES and not self._cut
            yield Line(self._number, self._offset, raw[:200] if long else raw, ended, long)
        self._skipping = False
        self._offset += len(raw) + ended
