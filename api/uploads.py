"""An upload goes straight to its place while it is hashed and checked; what is not whole and good leaves no trace.

The multipart parser is python-multipart's, fed by hand. The road not taken is `UploadFile`: it spools the whole body to
a temporary file before the first line of ours runs, so a bad or oversized file would be known only when all of it had
arrived, and written twice.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import ApiError, refuse_unknown
from sat_core.plan.formats import FileCheck, FileReport
from sat_core.plan.rows import FORMATS as ROW_FORMATS

MAX_FIELD_BYTES = 4096
FIELDS = ("purpose", "file", "sat[format]", "expires_after[anchor]", "expires_after[seconds]")
FORMATS = ("auto", *ROW_FORMATS)
PARTIAL = ".part-"


@dataclass(frozen=True, kw_only=True)
class Received:
    """A whole upload, on disk under a temporary name, judged."""

    path: Path
    filename: str
    purpose: str
    bytes: int
    sha256: str
    report: FileReport


@dataclass
class _Part:
    """The part of the form that is being read."""

    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    name: str = ""
    body: bytearray = field(default_factory=bytearray)


class Upload:
    """One multipart request: `feed` its chunks, then `finish`. Use inside `receiving`, which cleans up."""

    def __init__(self, folder: Path, content_type: str, max_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                "unsupported_media_type",
                "Send multipart/form-data with the fields purpose and file.",
            )
        self.path = folder / f"{PARTIAL}{secrets.token_hex(12)}"
        self.max_bytes = max_bytes
        self.fields: dict[str, str] = {}
        self.file: BinaryIO | None = None
        self._filename = ""
        self._size = 0
        self._hash = hashlib.sha256()
        self._check: FileCheck | None = None
        self._part = _Part()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the request."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ApiError("invalid_request", f"The multipart body is broken: {error}.") from error

    def finish(self) -> Received:
        """The upload as received, its bytes safely on disk; raises ApiError where a part is missing or not allowed."""
        try:
            self._parser.finalize()
        except FormParserError as error:
            raise ApiError(
                "invalid_request", f"The multipart body ends too early: {error}."
            ) from error
        if self.file is None or self._check is None:
            raise ApiError(
                "missing_required_parameter",
                "The form has no file; send it as part 'file'.",
                "file",
            )
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise ApiError(
                "missing_required_parameter",
                "purpose is missing; send purpose=fine-tune.",
                "purpose",
            )
        if purpose != "fine-tune":
            raise ApiError(
                "unsupported_purpose",
                f"purpose is {purpose!r}; this service takes 'fine-tune'.",
                "purpose",
            )
        if any(name.startswith("expires_after") for name in self.fields):
            raise ApiError(
                "unsupported_parameter",
                "expires_after is not supported; files stay until deleted.",
                "expires_after",
            )
        self.file.flush()
        os.fsync(self.file.fileno())
        return Received(
            path=self.path,
            filename=self._filename,
            purpose=purpose,
            bytes=self._size,
            sha256=self._hash.hexdigest(),
            report=self._check.finish(),
        )

    def _begin(self) -> None:
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD_BYTES:
            raise ApiError("invalid_request", "A header of a form part is too long.")

    def _header_end(self) -> None:
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition = bytes(self._part.value)
        self._part.header, self._part.value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        refuse_unknown([name], FIELDS)
        if name in self.fields or (name == "file" and self.file is not None):
            raise ApiError("conflicting_parameters", f"{name} was sent twice.", name)
        self._part.name = name
        if name == "file":
            self._open(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _open(self, filename: str) -> None:
        chosen = self.fields.get("sat[format]", "auto")
        if chosen not in FORMATS:
            raise ApiError(
                "invalid_value",
                f"sat[format] is {chosen!r}; allowed: {', '.join(FORMATS)}.",
                "sat[format]",
            )
        # Only the last segment, whichever system it was named on: the name is shown, never used as a path.
        plain = PurePosixPath(filename.replace("\\", "/")).name
        self._filename = "".join(c for c in plain if c.isprintable())[:255] or "upload"
        self._check = FileCheck(self._filename, chosen)
        self.file = open(self.path, "xb")  # noqa: SIM115 - closed by `receiving`

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part.name != "file":
            self._part.body += piece
            if len(self._part.body) > MAX_FIELD_BYTES:
                raise ApiError("invalid_value", f"{self._part.name} is too long.", self._part.name)
            return
        assert self.file is not None and self._check is not None  # noqa: S101, PT018 - opened with the part's headers
        self._size += len(piece)
        if self._size > self.max_bytes:
            raise too_large(self.max_bytes)
        self.file.write(piece)
        self._hash.update(piece)
        self._check.feed(piece)

    def _end(self) -> None:
        if self._part.name == "file":
            return
        if self._part.name == "sat[format]" and self.file is not None:
            raise ApiError(
                "invalid_request", "sat[format] must come before file in the form.", "sat[format]"
            )
        self.fields[self._part.name] = self._part.body.decode("utf-8", "replace")


def too_large(max_bytes: int) -> ApiError:
    """The answer to a file above the limit."""
    return ApiError(
        "file_too_large",
        f"The file has more than {max_bytes} bytes, the limit of this service (SATUNE_MAX_FILE_BYTES).",
        "file",
    )


@contextlib.contextmanager
def receiving(folder: Path, content_type: str, max_bytes: int) -> Iterator[Upload]:
    """An upload into `folder`; on the way out nothing of it stays under its temporary name."""
    upload = Upload(folder, content_type, max_bytes)
    try:
        yield upload
    finally:
        if upload.file is not None:
            upload.file.close()
        upload.path.unlink(missing_ok=True)


def keep(received: Received, target: Path) -> None:
    """Give the bytes their lasting name, so that a power cut leaves all of the file or nothing."""
    os.rename(received.path, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
