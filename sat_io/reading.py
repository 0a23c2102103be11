"""Rows of a data file, one at a time: what each means, ready to be rendered.

The file may have been checked when it was uploaded; here a broken row stops the run with its place, it is never skipped
silently. Everything but Parquet and the hub goes through the stream that the upload check uses, so the two cannot
disagree; Parquet is read in batches by pyarrow. The road not taken is `datasets.load_dataset` for local files: it
infers one type per column and refuses rows that differ in a column nobody needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sat_core.plan.errors import DataError
from sat_io.parsing import RowStream, kind_of
from sat_io.rows import KNOWN_COLUMNS, Conversation, RowError, Text, detect_format, parse_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sat_io.streams import Item

TEXT_SEPARATOR = "<|endoftext|>"
TEXT_CHUNK_CHARS = 2**20
CHUNK_BYTES = 2**18
PARQUET_BATCH_ROWS = 256
# Pages are unpacked whole, and a group of rows is one page at worst; a larger one may not fit in memory.
MAX_ROW_GROUP_BYTES = 4 * 2**30


class Row(NamedTuple):
    """One row: the format it was read as, its meaning, and its line; documents of a text file have none."""

    format: str
    content: Text | Conversation
    line: int = 0


def read_rows(path: Path, filename: str, declared: str = "auto") -> Iterator[Row]:
    """Yield each row of a file; a text file yields its documents.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    kind, packed = kind_of(filename)
    if kind == "parquet":
        if packed:
            raise DataError(f"{filename}: a Parquet file is compressed inside; send it ungzipped.")
        yield from meanings(parquet_rows(path, filename), filename, declared)
    elif kind == "text":
        for document in _documents(line.row for line in _items(path, filename)):
            yield Row("text", Text("", document))
    else:
        rows = ((item.line, item.row) for item in _items(path, filename))
        yield from meanings(rows, filename, declared)


def meanings(rows: Iterator[tuple[int, Any]], filename: str, declared: str) -> Iterator[Row]:
    """What numbered rows mean; all have the declared format, or with "auto" the format of the first.

    Raises:
        DataError: naming the row and what is wrong with it.
    """
    format = declared
    for number, row in rows:
        try:
            format = detect_format(row) if format == "auto" else format
            yield Row(format, parse_row(row, format), number)
        except RowError as error:
            raise _at(filename, number, error) from error


def _at(filename: str, line: int, error: RowError) -> DataError:
    pointer = f", {error.pointer}" if error.pointer else ""
    return DataError(f"{filename}, line {line}{pointer}: {error.message}.")


def _items(path: Path, filename: str) -> Iterator[Item]:
    stream, chunk = RowStream(filename), b"-"
    with path.open("rb") as file:
        while chunk:
            chunk = file.read(CHUNK_BYTES)
            for item in stream.feed(chunk, last=not chunk):
                if item.error is not None:
                    raise _at(filename, item.line, item.error) from item.error
                yield item


def parquet_rows(path: Path, filename: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows, the columns that no format knows left unread.

    Raises:
        DataError: where it is not Parquet, or a group of rows is too large.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            for i in range(file.metadata.num_row_groups):
                if file.metadata.row_group(i).total_byte_size > MAX_ROW_GROUP_BYTES:
                    raise DataError(
                        f"{filename}: row group {i} unpacks to more than {MAX_ROW_GROUP_BYTES} bytes, the limit; write "
                        "the file with smaller row groups."
                    )
            columns = [name for name in file.schema_arrow.names if name in KNOWN_COLUMNS]
            number = 0
            if not columns:
                yield 1, dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{filename}: not readable as Parquet: {error}") from error


def _documents(lines: Iterator[str]) -> Iterator[str]:
    """Documents of a text file: split at the customary separator, and after a million characters at a line end or a space."""
    held = ""
    for chunk in _chunks(lines):
        *whole, held = (held + chunk).split(TEXT_SEPARATOR)
        yield from (d.strip() for d in whole if d.strip())
        if len(held) > TEXT_CHUNK_CHARS:
            end = "\n" if "\n" in held else " "
            head, _, held = held.rpartition(end) if end in held else (held, "", "")
            if head.strip():
                yield head
    if held.strip():
        yield held.strip()


def _chunks(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined until they are a million characters, because a split for each line would cost its square."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= TEXT_CHUNK_CHARS:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)
