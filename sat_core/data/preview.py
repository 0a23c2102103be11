"""What will be trained on, shown before anything is: the first rows of a file as tokens and spans.

It goes through the reader, the renderer and the cut of `prepare`, so what is shown is what is written. The road not
taken is to show the text with the answer in bold: a mask is a matter of tokens, and its faults are off by one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from sat_core.data.intake import fit
from sat_core.data.packing import packing_for
from sat_core.data.rendering import Rendered, Renderer
from sat_core.plan.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.data.sources import Source

MAX_PREVIEW_ROWS = 100


def preview(
    tokenizer: Any,
    source: Source,
    *,
    seq_len_for: Callable[[bool], int],
    declared_format: str = "auto",
    train_on: str = "assistant",
    packing: str = "auto",
    rows: int = 5,
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
    renderer = Renderer(tokenizer, train_on=train_on)
    shown = []
    for number, row in enumerate(itertools.islice(source.rows(declared_format), rows), 1):
        whole = renderer.render(row.content)
        chosen = packing_for(packing, row.format)
        _, lost = fit(whole, row.format, chosen, seq_len_for(chosen != "none"))
        shown.append(
            {
                "row": number,
                "format": row.format,
                "text": tokenizer.decode(whole.ids),
                "ids": whole.ids,
                "tokens": tokenizer.convert_ids_to_tokens(whole.ids),
                "spans": _spans(tokenizer, whole, len(whole.ids) - lost),
            }
        )
    return shown


def _spans(tokenizer: Any, row: Rendered, kept: int) -> list[dict[str, Any]]:
    kinds = [
        "truncated" if i >= kept else "trained" if flag else "masked"
        for i, flag in enumerate(row.trained)
    ]
    spans = []
    start = 0
    for kind, run in itertools.groupby(kinds):
        end = start + len(list(run))
        text = tokenizer.decode(row.ids[start:end])
        spans.append({"start": start, "end": end, "kind": kind, "text": text})
        start = end
    return spans
