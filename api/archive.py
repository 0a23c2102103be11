"""A folder as a tar archive, made while it is sent: no second copy on disk, its length known beforehand, and any part of it alone.

An archive is a row of pieces - headers, files, padding - whose places follow from the sizes of the files, so a download that
was broken off goes on where it was. The road not taken is `tarfile.open(mode="w|")` onto a pipe with a thread behind it.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20


class Archive:
    """The files of a folder that stays as it is, under `name/`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._pieces: list[tuple[bytes | Path, int]] = []
        digest = hashlib.sha256()
        for path in files_of(folder):
            header, size = _header(path, folder, name), path.stat().st_size
            digest.update(header)
            self._add(header)
            self._pieces.append((path, size))
            self._add(bytes(-size % tarfile.BLOCKSIZE))
        self._add(bytes(2 * tarfile.BLOCKSIZE))
        self.size = sum(size for _, size in self._pieces)
        # Names, sizes and times: what tells two archives apart without reading gigabytes.
        self.etag = f'"{digest.hexdigest()}"'

    def read(self, first: int, end: int) -> Iterator[bytes]:
        """The bytes from `first` up to `end`."""
        at = 0
        for piece, size in self._pieces:
            begin, stop = max(first - at, 0), min(end - at, size)
            if begin < stop:
                if isinstance(piece, bytes):
                    yield piece[begin:stop]
                else:
                    yield from read_file(piece, begin, stop)
            at += size

    def _add(self, piece: bytes) -> None:
        self._pieces.append((piece, len(piece)))


def files_of(folder: Path) -> list[Path]:
    """The plain files of a folder, in the order in which they are packed."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def read_file(path: Path, first: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `first` up to `end`."""
    with path.open("rb") as file:
        file.seek(first)
        while first < end and (chunk := file.read(min(CHUNK_BYTES, end - first))):
            first += len(chunk)
            yield chunk


def _header(path: Path, folder: Path, name: str) -> bytes:
    info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
    stat = path.stat()
    info.size, info.mtime, info.mode = stat.st_size, int(stat.st_mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)
