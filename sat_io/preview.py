"""What will be trained on, shown before anything is: the first rows of a file as tokens and spans.

It goes through the reader, the renderer and the cut of `prepare`, so what is shown is what is written. The road not
taken is to show the text with the answer in bold: a mask is a matter of tokens, and its faults are off by one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from sat_core.plan.errors import ConfigError
from sat_io.intake import Tokens, fit, rendered
from sat_io.packing import packing_for
from sat_io.rendering import Rendered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sat_io.sources import Source

MAX_PREVIEW_ROWS = 100


def preview_rows(
    source: Source, tokens: Tokens, *, declared_format: str = "auto", rows: int = 5
) -> list[dict[str, Any]]:
    """The first rows, each as plain data.

    Returns:
        For each row: `row` (1-based), `format`, `text` (all tokens decoded), `ids`, `tokens` (the vocabulary's own
        strings), and `spans`, which cover all tokens in order: `start` and `end` (token positions, end excluded), `kind`
        ("trained", "masked" or "truncated") and `text`.

    Raises:
        ConfigError: for a number of rows outside 1 to 100.
        DataError: for a row that cannot be trained on.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MAX_PREVIEW_ROWS:
        raise ConfigError(
            f"rows is {rows!r}; allowed is an integer from 1 to {MAX_PREVIEW_ROWS}.", "rows"
        )
    tokenizer = tokens.renderer.tokenizer
    shown = []
    for number, row in enumerate(itertools.islice(source.rows(declared_format), rows), 1):
        whole = rendered(tokens.renderer, row, source.filename)
        chosen = packing_for(tokens.packing, row.format)
        parts, _ = fit(whole, row.format, chosen, tokens.seq_len_for(chosen != "none"))
        shown.append(
            {
                "row": number,
                "format": row.format,
                "text": tokenizer.decode(whole.ids),
                "ids": whole.ids,
                "tokens": tokenizer.convert_ids_to_tokens(whole.ids),
                "spans": _spans(tokenizer, whole.ids, _kinds(parts, joined=chosen == "joined")),
            }
        )
    return shown


def _kinds(parts: list[Rendered], *, joined: bool) -> Iterator[str]:
    """What becomes of each token that is kept; the first of a sequence is predicted from nothing, so it is no label."""
    for part in parts:
        for i, flag in enumerate(part.trained):
            yield "trained" if flag and (i or joined) else "masked"


def _spans(tokenizer: Any, ids: list[int], kinds: Iterator[str]) -> list[dict[str, Any]]:
    spans = []
    start = 0
    each = itertools.islice(itertools.chain(kinds, itertools.repeat("truncated")), len(ids))
    for kind, run in itertools.groupby(each):
        end = start + sum(1 for _ in run)
        spans.append(
            {"start": start, "end": end, "kind": kind, "text": tokenizer.decode(ids[start:end])}
        )
        start = end
    return spans
