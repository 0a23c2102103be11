"""A folder as a tar archive, made while it is sent: no second copy on disk, and its length is known beforehand.

The road not taken is `tarfile.open(mode="w|")` onto a pipe with a thread behind it; blocks are simple enough to lay out.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20


def archive_size(folder: Path, name: str) -> int:
    """Bytes that `tar_stream` will give."""
    blocks = sum(len(_header(p, folder, name)) + _padded(p.stat().st_size) for p in _files(folder))
    return blocks + 2 * tarfile.BLOCKSIZE


def tar_stream(folder: Path, name: str) -> Iterator[bytes]:
    """The folder's files under `name/`, then the two empty blocks that end an archive."""
    for path in _files(folder):
        size = path.stat().st_size
        yield _header(path, folder, name)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        yield bytes(_padded(size) - size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _header(path: Path, folder: Path, name: str) -> bytes:
    info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
    stat = path.stat()
    info.size, info.mtime, info.mode = stat.st_size, int(stat.st_mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
