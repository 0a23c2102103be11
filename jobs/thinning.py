"""Fewer points for a chart without losing what a person looks for: the extremes and the steps of the ladder.

Whole measured rows are kept or left out, so a chart never shows a number that was not measured. The road not taken is
every k-th row, which loses a one-step spike; and a library of down-samplers, which wants all rows in memory as arrays,
where the point is not to read them (`jobs.spans`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = Sequence[Any]


def thin(columns: Sequence[str], rows: Sequence[Row], max_rows: int) -> list[Row]:
    """At most about `max_rows` of the rows, in order: of each bucket the lowest and the highest loss.

    First and last row, rows with an evaluation, and rows where an omission rate changes are kept beside those.
    """
    if len(rows) <= max_rows:
        return list(rows)
    index = {name: i for i, name in enumerate(columns)}
    loss, held_out = index["loss"], index["eval_loss"]
    known = [(i, float(row[loss])) for i, row in enumerate(rows) if row[loss] is not None]
    keep = {0, len(rows) - 1, *extremes(known, max_rows)}
    keep |= {i for i, row in enumerate(rows) if row[held_out] is not None}
    keep |= set(changes(columns, rows))
    return [rows[i] for i in sorted(keep)]


def extremes(known: Sequence[tuple[int, float]], most: int) -> set[int]:
    """Of (place, loss) in order of places: the places of the lowest and the highest loss of each of `most` / 2 buckets."""
    size = max(1, -(-2 * len(known) // most))
    kept: set[int] = set()
    for start in range(0, len(known), size):
        bucket = known[start : start + size]
        kept |= {min(bucket, key=_loss)[0], max(bucket, key=_loss)[0]}
    return kept


def changes(columns: Sequence[str], rows: Sequence[Row]) -> Iterator[int]:
    """Both sides of every change of a rate, so that a stepped line falls where the rate fell."""
    places = [columns.index(f"omission_rate_{unit}") for unit in ("mlp", "attention")]
    for i in range(1, len(rows)):
        if _differ(places, rows[i - 1], rows[i]):
            yield i - 1
            yield i


def _differ(places: Iterable[int], before: Row, after: Row) -> bool:
    return any(before[p] != after[p] for p in places)


def _loss(point: tuple[int, float]) -> float:
    return point[1]
