"""Metrics as a plain CSV table: OpenAI's five columns first, under OpenAI's names, then ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jobs.measures import METRIC_COLUMNS

OPENAI_NAMES = {
    "step": "step",
    "loss": "train_loss",
    "token_accuracy": "train_accuracy",
    "eval_loss": "valid_loss",
    "eval_token_accuracy": "valid_mean_token_accuracy",
}
_ORDER = (*OPENAI_NAMES, *(name for name in METRIC_COLUMNS if name not in OPENAI_NAMES))
HEADER = tuple(OPENAI_NAMES.get(name, name) for name in _ORDER)
_PLACES = tuple(METRIC_COLUMNS.index(name) for name in _ORDER)


def csv_table(lots: Iterable[Sequence[Sequence[Any]]]) -> Iterator[str]:
    """The header, then each lot of rows, as text; what was not measured is empty."""
    yield _text([HEADER])
    for rows in lots:
        if rows:
            yield _text([row[place] for place in _PLACES] for row in rows)


def _text(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
