"""A multipart form read as it comes: files go to disk while they arrive, the other parts are short fields.

The parser is python-multipart's, fed by hand. The road not taken is `UploadFile`: it spools the whole body to a temporary
file before the first line of ours runs, so a bad or oversized file would be known only when all of it had arrived, and
written twice.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.drafts import Draft
from api.errors import ApiError, refuse_unknown

MAX_FIELD_BYTES = 4096
# Chunks from the socket are small; a thread hop for each would cost more than the work in it.
FEED_BYTES = 1 << 20
# What a form may have around the part that is stored.
FORM_BYTES = 1 << 20

Opener = Callable[[str, Mapping[str, str]], Draft]


@dataclass
class _Part:
    """The part of the form that is being read."""

    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    name: str = ""
    body: bytearray = field(default_factory=bytearray)


class Form:
    """One multipart request: `feed` its chunks, then `finish`. Use through `receiving`, which cleans up."""

    def __init__(
        self,
        content_type: str,
        *,
        stored: tuple[str, ...],
        fields: tuple[str, ...],
        opener: Opener,
        field_bytes: int = MAX_FIELD_BYTES,
    ) -> None:
        """Begin.

        Args:
            content_type: of the request.
            stored: the parts that go to disk.
            fields: the others that are allowed.
            opener: makes a draft, given the part's file name and the fields that came before it.
            field_bytes: that a field may have.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                "unsupported_media_type",
                f"Send multipart/form-data with {stored[0]} as a file.",
            )
        self.fields: dict[str, str] = {}
        self.drafts: dict[str, Draft] = {}
        self.filenames: dict[str, str] = {}
        self._stored, self._allowed, self._opener = stored, (*fields, *stored), opener
        self._field_bytes = field_bytes
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

    def finish(self) -> None:
        """All was fed; raises ApiError where the body is cut off."""
        try:
            self._parser.finalize()
        except FormParserError as error:
            raise ApiError(
                "invalid_request", f"The multipart body ends too early: {error}."
            ) from error

    def first(self) -> Draft:
        """The first stored part; raises ApiError where it is missing."""
        first = self._stored[0]
        if first not in self.drafts:
            raise ApiError(
                "missing_required_parameter",
                f"The form has no {first}; send it as part '{first}'.",
                first,
            )
        return self.drafts[first]

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
        refuse_unknown([name], self._allowed)
        if name in self.fields or name in self.drafts:
            raise ApiError("conflicting_parameters", f"{name} was sent twice.", name)
        self._part.name = name
        if name in self._stored:
            filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self.filenames[name] = filename
            self.drafts[name] = self._opener(filename, self.fields)

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part.name in self._stored:
            self.drafts[self._part.name].feed(piece)
            return
        self._part.body += piece
        if len(self._part.body) > self._field_bytes:
            raise ApiError("invalid_value", f"{self._part.name} is too long.", self._part.name)

    def _end(self) -> None:
        if self._part.name not in self._stored:
            self.fields[self._part.name] = self._part.body.decode("utf-8", "replace")


async def receive(request: Request, form: Form, refuse: Callable[[], ApiError], most: int) -> Draft:
    """Read the whole request into the form whose first part must be there, as `read_form` does."""
    await read_form(request, form, refuse, most)
    return form.first()


async def read_form(
    request: Request, form: Form, refuse: Callable[[], ApiError], most: int
) -> None:
    """Read the whole request into the form; what is clearly longer than `most` bytes is refused unread."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most + FORM_BYTES:
        raise refuse()
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= FEED_BYTES:
            await run_in_threadpool(form.feed, bytes(waiting))
            waiting.clear()
    await run_in_threadpool(form.feed, bytes(waiting))
    await run_in_threadpool(form.finish)


@contextlib.contextmanager
def receiving(form: Form) -> Iterator[Form]:
    """The form; on the way out nothing of it stays under its temporary name."""
    try:
        yield form
    finally:
        for draft in form.drafts.values():
            draft.discard()
