"""Small corpora for the tests of the data path."""

import json
from pathlib import Path
from typing import Any

from sat_core.corpus import Corpus
from sat_io.intake import Tokens
from sat_io.preparing import Preparation
from sat_io.rendering import Renderer
from sat_io.sources import Source


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(
    root: Path,
    tokenizer: Any,
    data: Path | Source,
    *,
    seq_len: int = 16,
    split: float | None = 0,
    packing: str = "auto",
    train_on: str = "assistant",
    mixes: dict[Path, float] | None = None,
    **settings: Any,
) -> tuple[Corpus, dict[str, Any]]:
    """The training split of a corpus of `data`, and its figures."""
    sources = [
        Source(path=path, filename=path.name, weight=weight)
        for path, weight in (mixes or {}).items()
    ]
    defaults: dict[str, Any] = {
        "validation": None,
        "declared_format": "auto",
        "validation_split": split,
    }
    preparation = Preparation(
        tokens=Tokens(Renderer(tokenizer, train_on=train_on), lambda packed: seq_len, packing),
        training=data if isinstance(data, Source) else Source(path=data, filename=data.name),
        progress=lambda rows: None,
        mixes=tuple(sources),
        **{**defaults, **settings},
    )
    folder, figures = preparation.run(root / "corpora")
    return Corpus(folder, "train"), figures


def contents(corpus: Corpus, tokenizer: Any) -> list[str]:
    """Each sequence as text."""
    batches = (corpus.batch([i]) for i in range(len(corpus)))
    return [tokenizer.decode(batch.input_ids_BT[0, : int(batch.lengths_B[0])]) for batch in batches]
