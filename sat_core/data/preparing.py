"""`prepare`: render, mask and tokenise data files into a corpus, once per (data, tokenizer, settings).

The folder's name is the hash of all that decides its content, so a second attempt or a second job on the same data finds
it ready. Text is packed: documents follow each other with an end token between them and are cut into full sequences.
Supervised rows stay one sequence each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_core.data.reading import read_rows, sha256_of
from sat_core.data.rendering import Rendered, Renderer
from sat_core.data.writing import CORPUS_FORMAT, SplitWriter
from sat_core.plan.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_VALIDATION_SPLIT = 0.05
MAX_CARVED_SEQUENCES = 200
_NOTHING: dict[str, Any] = {"rows": 0, "truncated_rows": 0, "untrained_rows": 0}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data file and the name it was given by its owner (the name decides how it is read)."""

    path: Path
    filename: str


@dataclass
class Preparation:
    """One corpus in the making; `seq_len_for(packed)` gives the tokens in a sequence once the format is known."""

    tokenizer: Any
    training: Source
    validation: Source | None
    declared_format: str
    train_on: str
    validation_split: float | None
    seq_len_for: Callable[[bool], int]
    progress: Callable[[int], None]
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self, corpora: Path) -> tuple[Path, dict[str, Any]]:
        """The corpus folder and its figures, made now or found ready.

        Raises:
            DataError: for a row that cannot be trained on, or data without a trained token.
        """
        renderer = Renderer(self.tokenizer, train_on=self.train_on)
        folder = corpora / self._key(renderer)
        if not folder.exists():
            corpora.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=corpora, prefix=".preparing-"))
            try:
                self._write(scratch, renderer)
                scratch.chmod(0o755)
                if not folder.exists():
                    scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return folder, json.loads((folder / "corpus.json").read_text("utf-8"))["figures"]

    def _key(self, renderer: Renderer) -> str:
        backend = self.tokenizer.backend_tokenizer.to_str()
        parts = [
            CORPUS_FORMAT,
            sha256_of(self.training.path),
            sha256_of(self.validation.path) if self.validation else "",
            Path(self.training.filename).suffix,
            hashlib.sha256(backend.encode()).hexdigest(),
            str(renderer.tokenizer.chat_template),
            str(self.tokenizer.eos_token_id),
            self.declared_format,
            self.train_on,
            str(self.validation_split),
            f"{self.seq_len_for(True)} {self.seq_len_for(False)}",
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _write(self, folder: Path, renderer: Renderer) -> None:
        figures = {**_NOTHING, "carved": self.validation is None}
        split = DEFAULT_VALIDATION_SPLIT if self.validation_split is None else self.validation_split
        every = round(1 / split) if self.validation is None and split > 0 else 0
        with SplitWriter(folder, "train") as train, SplitWriter(folder, "validation") as held:
            for number, sequence in enumerate(self._sequences(self.training, renderer, figures)):
                carve = (
                    every and number % every == every - 1 and held.sequences < MAX_CARVED_SEQUENCES
                )
                (held if carve else train).add(sequence)
            if self.validation is not None:
                for sequence in self._sequences(self.validation, renderer, {**_NOTHING}):
                    held.add(sequence)
            figures |= train.finish()
            figures["validation"] = held.finish()
        if figures["trained_tokens"] == 0:
            raise DataError(
                f"{self.training.filename}: not one token of {figures['rows']} rows would be trained on. Either every "
                "answer is cut off by sat.train.max_seq_len, or the file is empty."
            )
        (folder / "corpus.json").write_text(
            json.dumps({"format": CORPUS_FORMAT, "figures": figures}, indent=1), "utf-8"
        )

    def _sequences(
        self, source: Source, renderer: Renderer, figures: dict[str, Any]
    ) -> Iterator[Rendered]:
        packer: list[int] = []
        for format, row in read_rows(source.path, source.filename, self.declared_format):
            figures["rows"] += 1
            packed = format == "text"
            seq_len = self.seq_len_for(packed)
            figures |= {"format": format, "packed": packed, "seq_len": seq_len}
            rendered = renderer.render(format, row)
            if figures["rows"] % 200 == 0:
                self.progress(figures["rows"])
            if packed:
                packer += rendered.ids
                while len(packer) >= seq_len:
                    yield Rendered(packer[:seq_len], [True] * seq_len)
                    del packer[:seq_len]
                continue
            figures["truncated_rows"] += len(rendered.ids) > seq_len
            cut = Rendered(rendered.ids[:seq_len], rendered.trained[:seq_len])
            if any(cut.trained[1:]):
                yield cut
            else:
                figures["untrained_rows"] += 1
        if len(packer) > 1:
            yield Rendered(packer, [True] * len(packer))
