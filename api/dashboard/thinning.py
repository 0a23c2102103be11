"""Fewer points for a chart without losing what a person looks for: the extremes and the steps of the ladder.

Whole measured rows are kept or left out, so a chart never shows a number that was not measured. The road not taken is
every k-th row, which loses a one-step spike.
"""

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
    rates = [index["omission_rate_mlp"], index["omission_rate_attention"]]
    keep = {0, len(rows) - 1}
    keep |= {i for i, row in enumerate(rows) if row[held_out] is not None}
    keep |= set(_changes(rows, rates))
    size = -(-2 * len(rows) // max_rows)
    for start in range(0, len(rows), size):
        known = [i for i in range(start, min(start + size, len(rows))) if rows[i][loss] is not None]
        if known:
            keep.add(min(known, key=lambda i: float(rows[i][loss])))
            keep.add(max(known, key=lambda i: float(rows[i][loss])))
    return [rows[i] for i in sorted(keep)]


def _changes(rows: Sequence[Row], places: Iterable[int]) -> Iterator[int]:
    """Both sides of every change, so that a stepped line falls where the rate fell."""
    places = tuple(places)
    for i in range(1, len(rows)):
        if any(rows[i][p] != rows[i - 1][p] for p in places):
            yield i - 1
            yield i
