"""Rows of a data file, one at a time.

The file was checked when it was uploaded; here a broken row stops the run with its place, it is never skipped silently.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from sat_core.plan.errors import DataError
from sat_core.plan.formats import RowError, check_row, detect_format

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT_SEPARATOR = "<|endoftext|>"
TEXT_CHUNK_CHARS = 2**20


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(
    path: Path, filename: str, declared: str = "auto"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (format, row) for each row; text files yield {"text": document}.

    Raises:
        DataError: naming the line and what is wrong with it.
    """
    if filename.lower().endswith((".txt", ".md")):
        yield from (("text", {"text": document}) for document in _documents(path))
        return
    found = declared
    for line, row in _json_rows(path, filename):
        try:
            found = detect_format(row) if found == "auto" else found
            check_row(row, found)
        except RowError as error:
            raise DataError(
                f"{filename}, line {line}{error.pointer and ', ' + error.pointer}: {error.message}."
            ) from error
        yield found, row


def _json_rows(path: Path, filename: str) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        if filename.lower().endswith(".json") and file.read(64).lstrip().startswith("["):
            file.seek(0)
            yield from enumerate(json.load(file), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{filename}, line {number}: not valid JSON: {error.msg}."
                ) from error


def _documents(path: Path) -> Iterator[str]:
    """Documents of a text file: split at the customary separator, and at a line end after a million characters."""
    held = ""
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(TEXT_CHUNK_CHARS):
            *whole, held = (held + chunk).split(TEXT_SEPARATOR)
            yield from (d.strip() for d in whole if d.strip())
            if len(held) > TEXT_CHUNK_CHARS and "\n" in held:
                head, _, held = held.rpartition("\n")
                yield head
    if held.strip():
        yield held.strip()
