"""Folders and their files on the way to a client, whole or from where an earlier download was broken off (RFC 9110, 14).

One range is served, of files and of archives alike; several at once are answered with everything, as the RFC allows.
`Repr-Digest` (RFC 9530) tells the hash of the whole file even where a part is sent. Starlette's FileResponse was not taken:
an archive is no file, and it refuses a malformed range in a body of its own.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import Depends, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from api.archive import Archive, files_of, read_file
from api.errors import ApiError

# What a route that downloads may answer besides its own codes.
CODES = ("file_not_found", "range_not_satisfiable")


def responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a download."""
    schema = {"type": "string", "contentMediaType": "application/octet-stream"}
    content = {kind: {"schema": schema} for kind in media_types}
    return {
        200: {"description": "The bytes.", "content": content},
        206: {"description": "The range that was asked for.", "content": content},
    }


RESPONSES = responses("application/octet-stream", "application/x-tar")


class FileEntry(BaseModel):
    """One file of a folder, with what a download of it must have."""

    name: str
    bytes: int
    sha256: str


class FileList(BaseModel):
    """The files of a folder; `?file=NAME` at its content downloads one."""

    object: Literal["list"] = "list"
    data: list[FileEntry]


class Wanted:
    """Which part of something a request wants; a dependency."""

    def __init__(
        self,
        range: Annotated[str | None, Header(description="One range of bytes.")] = None,
        if_range: Annotated[
            str | None, Header(description="The range counts only while the ETag is this one.")
        ] = None,
    ) -> None:
        self._range, self._if_range = range, if_range

    def part(self, size: int, etag: str) -> tuple[int, int] | None:
        """First byte and end of the range; None for everything.

        Raises:
            ApiError: where the range begins behind the end.
        """
        found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self._range or "", re.ASCII)
        if not found or not any(found.groups()) or self._if_range not in (None, etag):
            return None
        first, last = found.groups()
        begin = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if first and last and int(last) < begin:
            return None
        if begin >= size:
            raise ApiError(
                "range_not_satisfiable",
                f"There are {size} bytes; {self._range} begins after their end.",
                headers={"content-range": f"bytes */{size}"},
            )
        return begin, end


WantedPart = Annotated[Wanted, Depends()]
WantedFile = Annotated[
    str | None,
    Query(alias="file", description="Only this file; without it all as a tar archive."),
]


def download(
    folder: Path,
    name: str,
    file: str | None,
    wanted: Wanted,
    sha256: str | None = None,
) -> StreamingResponse:
    """A file of the folder, or all of it as NAME.tar; a file whose hash is not given is read before it is sent.

    Raises:
        ApiError: where there is no such file.
    """
    if file is None:
        archive = Archive(folder, name)
        return _sent(
            wanted, archive.read, archive.size, archive.etag, f"{name}.tar", "application/x-tar", {}
        )
    path = _found(folder, file)
    return download_file(path, path.name, sha256 or _sha256_of(path), wanted)


def download_file(
    path: Path,
    name: str,
    sha256: str,
    wanted: Wanted,
    media_type: str = "application/octet-stream",
) -> StreamingResponse:
    """One file, whose hash is known."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return _sent(
        wanted,
        lambda first, end: read_file(path, first, end),
        path.stat().st_size,
        f'"{sha256}"',
        name,
        media_type,
        {"repr-digest": f"sha-256=:{digest}:"},
    )


def listing(folder: Path) -> FileList:
    """Every file with size and hash; a hash is made once and remembered."""
    return FileList(
        data=[
            FileEntry(
                name=path.relative_to(folder).as_posix(),
                bytes=path.stat().st_size,
                sha256=_sha256_of(path),
            )
            for path in files_of(folder)
        ]
    )


def _sent(
    wanted: Wanted,
    read: Callable[[int, int], Iterator[bytes]],
    size: int,
    etag: str,
    filename: str,
    media_type: str,
    more: dict[str, str],
) -> StreamingResponse:
    part = wanted.part(size, etag)
    first, end = part or (0, size)
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, no-cache",
        "content-disposition": f"attachment; filename*=utf-8''{quote(filename)}",
        "content-length": str(end - first),
        **more,
    }
    if part:
        headers["content-range"] = f"bytes {first}-{end - 1}/{size}"
    return StreamingResponse(
        read(first, end), 206 if part else 200, media_type=media_type, headers=headers
    )


def _found(folder: Path, name: str) -> Path:
    """By comparing with what is there: a name is never made a path."""
    known = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    if name not in known:
        raise ApiError("file_not_found", f"There is no file {name!r}: {', '.join(known)}.", "file")
    return known[name]


def _sha256_of(path: Path) -> str:
    stat = path.stat()
    return _hashed(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(4096)
def _hashed(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """Of a file that stays as it is; the rest of the arguments name its version."""
    digest = hashlib.sha256()
    for chunk in read_file(path, 0, size):
        digest.update(chunk)
    return digest.hexdigest()
