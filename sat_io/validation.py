"""What can be said of a file before a job exists: broken rows, copies, and with a tokenizer what would be trained on.

Rows come through the check that an upload goes through, so the two cannot disagree; where a run stops at the first bad
row, this goes on and names each. With a tokenizer every good row is rendered, masked and cut as `prepare` would do
it. The road not taken is to estimate tokens from characters: the one number that matters here, how many tokens carry
loss, is no function of length.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import InitVar, asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sat_core.plan.errors import DataError
from sat_io.formats import NO_LINE, FileCheck, FileReport, Problem
from sat_io.intake import Tally, Tokens, copies, fit, hash_of, mark_of, new_marks, overlap
from sat_io.packing import packing_for
from sat_io.parsing import kind_of
from sat_io.reading import CHUNK_BYTES, parquet_rows, read_rows
from sat_io.rows import Conversation, RowError, Text
from sat_io.streams import Item

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from sat_io.sources import Source


@dataclass
class Validation:
    """One file being judged; `tokens` None looks at rows alone."""

    source: Source
    tokens: Tokens | None
    progress: InitVar[Callable[[int], None]]
    declared: str = "auto"
    tally: Tally = field(init=False)
    marks: array[int] = field(default_factory=new_marks)
    trained: array[int] = field(default_factory=new_marks)
    roles: Counter[str] = field(default_factory=Counter)
    _check: FileCheck = field(init=False)
    _seq_len: int = 0
    _trained_uncut: int = 0

    def __post_init__(self, progress: Callable[[int], None]) -> None:
        self.tally = Tally(progress)
        self._check = FileCheck(self.source.filename, self.declared, each=self._take)

    def run(self, against: Validation | None = None) -> dict[str, Any]:
        """The report; with `against`, another file that was run, also how many rows stand in both."""
        report = self.read()
        problems = list(report.problems)
        count, rows = report.problem_count, self.tally.rows
        if not problems and self.tokens is not None and not sum(self.trained):
            problems, count = [self._untrained(rows)], 1
        duplicates = copies(self.marks)
        shared = overlap(against.marks, self.marks) if against else None
        warnings = list(report.warnings) + self._warnings(rows, duplicates, shared)
        return {
            "file_format": report.format,
            "encoding": report.encoding,
            "rows": report.rows,
            "error_count": count,
            "errors": [asdict(problem) for problem in problems],
            "warnings": warnings if not problems else [],
            "duplicates": duplicates,
            "overlap_rows": shared,
            "roles": dict(self.roles),
            **(self._token_figures() if self.tokens is not None else {}),
        }

    def read(self) -> FileReport:
        """Judge every row, and count the good ones. Raises DataError for what is no uploaded file."""
        path, name = self.source.path, self.source.filename
        if path is None:
            raise DataError(f"{name}: only an uploaded file can be validated.")
        check = self._check
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                check.feed(chunk)
        kind, packed = kind_of(name)
        try:
            if kind == "parquet" and not packed:
                for number, row in parquet_rows(path, name):
                    check.judge(Item(number, 0, b"", row))
            elif kind == "text":
                for number, document in enumerate(read_rows(path, name), 1):
                    self._take(Item(number, 0, b""), document.content)
        except RowError as error:
            check.judge(NO_LINE._replace(error=error))
        except DataError as error:
            # The stream has named what is wrong with text by its line already.
            if kind == "parquet":
                check.judge(NO_LINE._replace(error=RowError("bad_parquet", "", error.message)))
        return check.finish()

    def _take(self, item: Item, content: Text | Conversation) -> None:
        """Count a good row. Raises RowError where the model's template cannot render it."""
        self.tally.begin_row()
        if isinstance(content, Conversation):
            self.roles.update(message["role"] for message in content.messages)
        if self.tokens is None:
            self.marks.append(hash_of(json.dumps(content, sort_keys=True).encode()))
            return
        try:
            whole = self.tokens.renderer.render(content)
        except DataError as error:
            raise RowError("template_failed", "", error.message) from error
        packing = packing_for(self.tokens.packing, self._check.format)
        self._seq_len = self.tokens.seq_len_for(packing != "none")
        parts, lost = fit(whole, self._check.format, packing, self._seq_len)
        trained = sum(
            sum(part.trained) if packing == "joined" else sum(part.trained[1:]) for part in parts
        )
        self.tally.end_row(len(whole.ids), lost, trained)
        self.trained.append(trained)
        self._trained_uncut += sum(whole.trained[1:])
        self.marks.append(mark_of(whole))

    def _untrained(self, rows: int) -> Problem:
        """Why the loss mask of the whole file is zero."""
        if self._trained_uncut:
            why = (
                f"every answer begins after token {self._seq_len}, where rows are cut; raise sat.train.max_seq_len or "
                "shorten the prompts"
            )
        else:
            why = "the model's chat template and tokenizer leave nothing of any answer"
        message = f"not one token of {rows} rows would be trained on: {why}"
        code = "no_trained_tokens"
        return Problem(line=1, byte_offset=0, pointer="", code=code, message=message)

    def _warnings(self, rows: int, duplicates: int, shared: int | None) -> list[str]:
        said = {
            f"{duplicates} of {rows} rows are exact repetitions of other rows.": duplicates,
            f"{shared} of {rows} rows stand in the other file too.": shared,
            f"{self.tally.truncated_rows} of {rows} rows are longer than {self._seq_len} tokens and would be cut there.": self.tally.truncated_rows,
            f"{self.tally.untrained_rows} of {rows} rows would be left out: not one of their tokens would carry loss.": self.tally.untrained_rows,
        }
        return [words for words, true in said.items() if true]

    def _token_figures(self) -> dict[str, Any]:
        lengths = np.asarray(self.tally.lengths, dtype=np.int64)
        total, trained = int(lengths.sum()), sum(self.trained)
        per_row = self.tally.row_tokens((50, 95), "max")
        suggestions = []
        if total:
            share = f"{100 * trained / total:.0f} % of the tokens would be trained on."
            suggestions.append(share)
        if total and self.tally.truncated_rows == 0:
            fitting = 2 ** max(3, (per_row["max"] - 1).bit_length())
            if fitting < self._seq_len:
                suggestions.append(
                    f"The longest row has {per_row['max']} tokens: sat.train.max_seq_len {fitting} is enough."
                )
        return {
            "seq_len": self._seq_len,
            "tokens": {
                "total": total,
                "trained": trained,
                "per_row": per_row,
                "histogram": _histogram(lengths),
            },
            "truncated_rows": self.tally.truncated_rows,
            "truncated_tokens": self.tally.truncated_tokens,
            "empty_targets": self.tally.untrained_rows,
            "suggestions": suggestions,
        }


def _histogram(lengths: np.ndarray[Any, Any]) -> list[dict[str, int]]:
    """Rows by their length, in classes that double: `from` included, `to` excluded."""
    edges = [0, 16]
    while edges[-1] <= lengths.max(initial=0):
        edges.append(2 * edges[-1])
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    return [
        {"from": start, "to": end, "rows": rows}
        for (start, end), rows in zip(itertools.pairwise(edges), counts, strict=True)
    ]
