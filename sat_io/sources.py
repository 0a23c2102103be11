"""Where rows come from: a file with the name its owner gave it, or a data set on the hub.

A hub data set is named `org/name`, `org/name:split` or `org/name/subset:split` and streamed, so only what is needed is
fetched. Its commit is looked up once and stands for its content as the SHA-256 does for a file. Rows are data: a data
set that needs code of its own to be read is refused by the library. The road not taken is to download the
Parquet files by hand, which would leave out data sets that are kept as JSON, CSV or text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sat_core.plan.errors import DataError
from sat_core.plan.layout import sha256_of
from sat_io.reading import Row, meanings, read_rows
from sat_io.rows import KNOWN_COLUMNS, Text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A row of a mixture is drawn from this many, or from fewer that have this many characters together.
SHUFFLED_ROWS = 10_000
SHUFFLED_CHARS = 2**26


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data file and its owner's name for it, which decides how it is read; without a path, a data set of the hub.

    Attributes:
        weight: sequences for one of the main file; of files that are mixed in.
    """

    path: Path | None
    filename: str
    weight: float | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, or the commit of the data set.

        Raises:
            DataError: where it is no plain file, or the hub does not give it.
        """
        if self.path is None:
            return _hub_revision(self.filename)
        if not self.path.is_file():
            raise DataError(f"{self.filename}: there is no such file.")
        return sha256_of(self.path)

    def rows(self, declared: str = "auto") -> Iterator[Row]:
        """Each row, in order.

        Raises:
            DataError: naming the row and what is wrong with it.
        """
        if self.path is not None:
            return read_rows(self.path, self.filename, declared)
        return meanings(_hub_rows(self.filename, self.fingerprint), self.filename, declared)


def shuffled(rows: Iterator[Row], seed: tuple[int, ...]) -> Iterator[Row]:
    """The same rows in an order that `seed` decides, drawn from a bounded window."""
    draw = random.Random(repr(seed))  # noqa: S311 - an order, not a secret
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += _chars(row)
        while len(held) > SHUFFLED_ROWS or (size > SHUFFLED_CHARS and len(held) > 1):
            at = draw.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            size -= _chars(held[-1])
            yield held.pop()
    draw.shuffle(held)
    yield from held


def _chars(row: Row) -> int:
    content = row.content
    if isinstance(content, Text):
        return len(content.prompt) + len(content.completion)
    return sum(len(message["content"]) for message in content.messages)


def hub_parts(name: str) -> tuple[str, str | None, str]:
    """Repository, subset and split of `org/name[/subset][:split]`; the split is "train" where none is named.

    Raises:
        DataError: for any other shape.
    """
    whole, _, split = name.partition(":")
    parts = whole.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts) or ".." in whole:
        raise DataError(
            f"{name!r} names no data set of the hub; the form is org/name, org/name:split or org/name/subset:split."
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _hub_revision(name: str) -> str:
    from huggingface_hub import HfApi

    repository, _, _ = hub_parts(name)
    try:
        return str(HfApi().dataset_info(repository).sha)
    except Exception as error:
        raise _unreachable(name, error) from error


def _hub_rows(name: str, revision: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    repository, subset, split = hub_parts(name)
    try:
        rows = load_dataset(repository, subset, split=split, revision=revision, streaming=True)
        if known := KNOWN_COLUMNS & set(rows.column_names or ()):
            rows = rows.select_columns(sorted(known))
        yield from enumerate(rows, 1)
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}"[:500]
    return DataError(
        f"The data set {name} cannot be read from the hub: {reason}", code="dataset_download_failed"
    )
