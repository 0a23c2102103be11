"""A file on its way to its place: written under a temporary name while it is hashed, bounded and judged.

What is not whole and good leaves no trace. Whole files and files in parts end here alike, so both are checked by the same
code, and once it is whole `new_file` says what the store is told of it.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from api.errors import ApiError, refuse_unknown
from jobs.base import storable
from jobs.spec import NewFile, new_id
from sat_io.formats import FileCheck, FileReport
from sat_io.rows import FORMATS as ROW_FORMATS

PURPOSE = "fine-tune"
FORMATS = ("auto", *ROW_FORMATS)
PARTIAL = ".part-"
# While JSON is parsed nobody else is answered: this takes some .1 s. What is larger waits for a worker.
PIECE_BYTES = 2**20
EXPIRES_SECONDS = (3600, 2_592_000)
MAX_PROBLEMS_SHOWN = 100
FORMAT_FIELD, KEEP_FIELD = "sat[format]", "sat[keep_invalid]"
ANCHOR_FIELD, SECONDS_FIELD = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("purpose", FORMAT_FIELD, KEEP_FIELD, ANCHOR_FIELD, SECONDS_FIELD)


class Draft:
    """One file being written: `feed` its bytes, then `finish`; `discard` in any case."""

    def __init__(
        self, folder: Path, max_bytes: int, refuse: Callable[[], ApiError], check: FileCheck | None
    ) -> None:
        """Begin.

        Args:
            folder: where its temporary name is.
            max_bytes: it may have.
            refuse: the answer to one that has more.
            check: that judges it; None for a part of a file.
        """
        self.path = folder / f"{PARTIAL}{secrets.token_hex(12)}"
        self.bytes = 0
        self.check = check
        self._max_bytes, self._refuse = max_bytes, refuse
        self._hash = hashlib.sha256()
        self._file = open(self.path, "xb")  # noqa: SIM115 - closed by `discard`

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        self.bytes += len(piece)
        if self.bytes > self._max_bytes:
            raise self._refuse()
        self._file.write(piece)
        self._hash.update(piece)
        if self.check is not None:
            self.check.feed(piece)

    def finish(self) -> str:
        """Make the bytes safe; their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Let go of the temporary name, where the file has got no other."""
        self._file.close()
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a client says of a file beside its bytes."""

    declared: str = "auto"
    keep_invalid: bool = False
    expires_seconds: int | None = None

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Terms":
        """From the fields of a form. Raises ApiError for a value that is not allowed."""
        purpose = fields.get("purpose")
        if purpose is None:
            raise ApiError(
                "missing_required_parameter",
                f"purpose is missing; send purpose={PURPOSE}.",
                "purpose",
            )
        if purpose != PURPOSE:
            raise ApiError(
                "unsupported_purpose",
                f"purpose is {purpose!r}; this service takes {PURPOSE!r}.",
                "purpose",
            )
        keep = fields.get(KEEP_FIELD, "false")
        if keep not in ("true", "false"):
            raise ApiError(
                "invalid_value", f"{KEEP_FIELD} is {keep!r}; allowed: true, false.", KEEP_FIELD
            )
        return cls(
            declared=declared_format(fields),
            keep_invalid=keep == "true",
            expires_seconds=_expiry(fields),
        )

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> "Terms":
        """From a JSON body, whose objects say what a form says in brackets."""
        fields = {"purpose": body["purpose"]}
        for name, known in (
            ("sat", ("format", "keep_invalid")),
            ("expires_after", ("anchor", "seconds")),
        ):
            given = body.get(name) or {}
            refuse_unknown([f"{name}.{key}" for key in given], [f"{name}.{key}" for key in known])
            for key, value in given.items():
                plain = str(value).lower() if isinstance(value, bool) else str(value)
                fields[f"{name}[{key}]"] = plain
        return cls.of(fields)


def row_check(filename: str, declared: str) -> FileCheck:
    """What judges a data set as it arrives, in pieces that hold up nobody else."""
    return FileCheck(filename, declared, PIECE_BYTES)


def declared_format(fields: Mapping[str, str]) -> str:
    """The format that a client says a file has, or auto. Raises ApiError for another."""
    declared = fields.get(FORMAT_FIELD, "auto")
    if declared not in FORMATS:
        raise ApiError(
            "invalid_value",
            f"{FORMAT_FIELD} is {declared!r}; allowed: {', '.join(FORMATS)}.",
            FORMAT_FIELD,
        )
    return declared


def _expiry(fields: Mapping[str, str]) -> int | None:
    if ANCHOR_FIELD not in fields and SECONDS_FIELD not in fields:
        return None
    anchor, seconds = fields.get(ANCHOR_FIELD), fields.get(SECONDS_FIELD, "")
    if anchor != "created_at":
        raise ApiError(
            "invalid_value",
            f"{ANCHOR_FIELD} is {anchor!r}; allowed is 'created_at'.",
            ANCHOR_FIELD,
        )
    least, most = EXPIRES_SECONDS
    if not (seconds.isascii() and seconds.isdigit() and least <= int(seconds[:12]) <= most):
        raise ApiError(
            "invalid_value",
            f"{SECONDS_FIELD} is {seconds!r:.60}; allowed is an integer from {least} to {most}.",
            SECONDS_FIELD,
        )
    return int(seconds)


def shown_name(filename: str) -> str:
    """Only the last segment, whichever system it was named on: the name is shown, never used as a path."""
    plain = PurePosixPath(filename.replace("\\", "/")).name
    return "".join(c for c in plain if c.isprintable())[:255] or "upload"


def new_file(draft: Draft, filename: str, terms: Terms) -> NewFile:
    """What the store is told of a file that is whole.

    Raises:
        ApiError: where it has a bad row, unless the terms are to keep it all the same.
    """
    assert draft.check is not None  # noqa: S101 - a whole file is judged
    sha256, report = draft.finish(), draft.check.finish()
    if not report.ok and not terms.keep_invalid:
        raise ApiError(
            "dataset_invalid",
            report.summary(filename),
            "file",
            problems=[asdict(problem) for problem in report.problems[:MAX_PROBLEMS_SHOWN]],
        )
    created_at, expires = time.time(), terms.expires_seconds
    return NewFile(
        id=new_id("file-"),
        filename=filename,
        purpose=PURPOSE,
        bytes=draft.bytes,
        sha256=sha256,
        format=report.format,
        rows=report.rows,
        report=storable(verdict(report, filename)),
        status="uploaded" if report.unread else "processed" if report.ok else "error",
        created_at=created_at,
        expires_at=None if expires is None else created_at + expires,
    )


def verdict(report: FileReport, filename: str) -> dict[str, Any]:
    """The part of a file's report that is known when its last byte has arrived."""
    status = "valid_with_warnings" if report.warnings else "valid"
    return {
        "status": status if report.ok else "invalid",
        "summary": report.summary(filename),
        "format": report.format,
        "rows": report.rows,
        "encoding": report.encoding,
        "warnings": list(report.warnings),
        "error_count": report.problem_count,
        "errors": [asdict(problem) for problem in report.problems],
    }
