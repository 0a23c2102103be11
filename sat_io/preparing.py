"""`prepare`: render, mask and tokenise data files into a corpus, once per (data, tokenizer, settings).

The folder's name is the hash of all that decides its content, so a second attempt or a second job on the same data finds
it ready. Files that are mixed in follow the job's own file in the same corpus, because the order of training is a
permutation anyway; what is held out comes from the job's own file alone, so that the loss on it means one thing
whatever is mixed in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_core.plan.errors import DataError
from sat_core.plan.layout import CORPUS_FORMAT
from sat_io.intake import Intake, Tokens, copies, new_marks, overlap
from sat_io.writing import SplitWriter

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from sat_io.sources import Source

# Raised where the same rows and settings become other sequences or masks, so that no corpus of before is found for them.
RULES = 2
DEFAULT_VALIDATION_SPLIT = 0.05
MAX_CARVED_SEQUENCES = 200


@dataclass
class Preparation:
    """One corpus in the making.

    Attributes:
        tokens: how rows become some.
        training, validation: the job's own file, and what is held out (None carves it from the former).
        declared_format: of these two, or "auto".
        validation_split: share of sequences to hold out; None is .05.
        progress: told the rows done so far.
        mixes: files to mix in, each with a weight.
        seed: chooses the rows of a mixed file that is not used whole.
    """

    tokens: Tokens
    training: Source
    validation: Source | None
    declared_format: str
    validation_split: float | None
    progress: Callable[[int], None]
    mixes: tuple[Source, ...] = ()
    seed: int = 0

    def run(self, corpora: Path) -> tuple[Path, dict[str, Any]]:
        """The corpus folder and its figures, made now or found ready.

        Raises:
            DataError: for a row that cannot be trained on, or data without a trained token.
        """
        folder = corpora / self._key()
        if not folder.exists():
            corpora.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=corpora, prefix=".preparing-"))
            try:
                self._write(scratch)
                scratch.chmod(0o755)
                for path in scratch.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                if not folder.exists():
                    scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        os.utime(folder)  # its last use, by which whoever tidies goes
        return folder, json.loads((folder / "corpus.json").read_text("utf-8"))["figures"]

    @property
    def _sources(self) -> list[Source]:
        return [self.training, *([self.validation] if self.validation else []), *self.mixes]

    def _key(self) -> str:
        tokens, renderer = self.tokens, self.tokens.renderer
        parts = [
            CORPUS_FORMAT,
            RULES,
            [(s.fingerprint, s.filename, s.weight) for s in self._sources],
            self.validation is None,
            hashlib.sha256(renderer.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            str(renderer.tokenizer.chat_template),
            renderer.tokenizer.eos_token_id,
            (self.declared_format, renderer.train_on, self.validation_split, tokens.packing),
            (tokens.seq_len_for(True), tokens.seq_len_for(False)),
            self.seed if self.mixes else None,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _write(self, folder: Path) -> None:
        trained, kept_out = new_marks(), new_marks()
        with SplitWriter(folder, "train") as train, SplitWriter(folder, "validation") as held:
            main = self._intake(self.training, declared=self.declared_format)
            self._split(main, train, held, trained, kept_out)
            if train.trained_tokens == 0:
                raise _untrained(main)
            duplicates = copies(trained, kept_out)
            files = [main.figures("training", train.totals())]
            for number in range(len(self.mixes)):
                files.append(self._mix(number, train, files[0]["sequences"], trained))
            if self.validation is not None:
                second = self._intake(self.validation, declared=self.declared_format)
                held.extend(second.sequences(kept_out))
                if held.trained_tokens == 0:
                    raise _untrained(second)
                files.append(second.figures("validation", held.totals()))
            # A sequence carved from joined text holds pieces of rows, so there is no row to look for on the other side.
            unknown = self.validation is None and main.packing == "joined"
            figures = {
                **main.tally.figures(),
                "format": main.format,
                "packed": main.packing != "none",
                "packing": main.packing,
                "seq_len": main.seq_len,
                "carved": self.validation is None,
                "duplicate_rows": duplicates,
                "conversations": sum(file["conversations"] for file in files),
                "overlap_rows": None if unknown else overlap(trained, kept_out),
                **train.finish(),
                "validation": held.finish(),
                "files": files,
            }
        # Of files alone: what of the hub a corpus was made of is not here to be deleted.
        sources = [s.fingerprint for s in self._sources if s.path]
        (folder / "corpus.json").write_text(
            json.dumps({"format": CORPUS_FORMAT, "sources": sources, "figures": figures}, indent=1),
            "utf-8",
        )

    def _split(
        self,
        main: Intake,
        train: SplitWriter,
        held: SplitWriter,
        trained: array[int],
        kept_out: array[int],
    ) -> None:
        """The job's own file to both splits: by sequences where text is joined, else by rows."""
        split = DEFAULT_VALIDATION_SPLIT if self.validation_split is None else self.validation_split
        # The share that was meant: the float that is nearest to .7 is a little less.
        share = Fraction(split if self.validation is None else 0).limit_denominator()
        some, of = share.as_integer_ratio()

        def carved(number: int) -> bool:
            due = (number + 1) * some // of > number * some // of
            return due and held.sequences < MAX_CARVED_SEQUENCES

        if main.packing == "joined":
            for number, sequence in enumerate(main.sequences(trained)):
                (held if carved(number) else train).add(sequence)
            return
        sides = (train, main.packer(), trained), (held, main.packer(), kept_out)
        for number, (mark, parts) in enumerate(main.rows()):
            writer, packer, marks = sides[carved(number)]
            marks.append(mark)
            for part in parts:
                writer.extend(packer.add(part))
        for writer, packer, _ in sides:
            writer.extend(packer.finish())

    def _intake(self, source: Source, **settings: Any) -> Intake:
        return Intake(source, self.tokens, self.progress, **settings)

    def _mix(
        self, number: int, train: SplitWriter, own: int, trained: array[int]
    ) -> dict[str, Any]:
        """Sequences of one more file, as many as its weight asks for: a short file is read again, a long one left early."""
        source = self.mixes[number]
        before = train.totals()
        end = train.sequences + max(1, round((source.weight or 0.0) * own))
        first = intake = self._intake(source, order=(self.seed, number, 1))
        marks = trained
        for reading in itertools.count(1):
            start = train.sequences
            train.extend(itertools.islice(intake.sequences(marks), end - start))
            if train.sequences == start:
                raise _untrained(intake)
            if train.sequences == end:
                break
            intake = self._intake(source, order=(self.seed, number, reading + 1))
            marks = new_marks()
        written = {name: total - before[name] for name, total in train.totals().items()}
        if not written["trained_tokens"]:
            raise _untrained(first)
        return first.figures("mix", {**written, "readings": reading})


def _untrained(intake: Intake) -> DataError:
    return DataError(
        f"{intake.source.filename}: not one token of {intake.tally.rows} rows would be trained on. Either every answer "
        "is cut off by sat.train.max_seq_len, or the file is empty."
    )
