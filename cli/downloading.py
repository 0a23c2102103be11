"""A file on its way home: under a temporary name that holds its hash until the bytes are what the server says they are.

So what was broken off is found again by the next try, of this command or of a later one, and never mixed with another file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from cli.client import FAILED, PAUSES, UNREACHABLE, USAGE, Client, CliError


def fetch(
    client: Client, export_id: str, file: dict[str, Any], path: Path, tell: Callable[[int], object]
) -> None:
    """Bring `file` (name, bytes, sha256) of an export to `path`; `tell` hears how many bytes are here.

    Raises:
        CliError: where it cannot be written, the server stays away, or the bytes are others.
    """
    partial = path.with_name(f".{path.name}.{file['sha256'][:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and _sha256(path) == file["sha256"]:
            tell(file["bytes"])
            return
        _receive(client, export_id, file, partial, tell)
        if _sha256(partial) != file["sha256"]:
            partial.unlink()
            raise CliError(f"{file['name']} arrived with other bytes; try again.", FAILED)
        partial.replace(path)
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}.", USAGE) from error


def _receive(
    client: Client,
    export_id: str,
    file: dict[str, Any],
    partial: Path,
    tell: Callable[[int], object],
) -> None:
    """All bytes into `partial`, from where it ends; a broken connection is taken up again while bytes come."""
    pauses = iter(PAUSES)
    with partial.open("ab") as target:
        while (here := target.tell()) < file["bytes"]:
            tell(here)
            try:
                with client.download(export_id, file["name"], file["sha256"], here) as response:
                    if here and response.status_code != httpx.codes.PARTIAL_CONTENT:
                        target.truncate(0)
                    for chunk in response.iter_bytes():
                        target.write(chunk)
                        tell(target.tell())
            except httpx.TransportError as error:
                if target.tell() > here:
                    pauses = iter(PAUSES)
                pause = next(pauses, None)
                if pause is None:
                    raise CliError(
                        f"{client.connection.url} does not answer ({error}). The same command goes on where this ended.",
                        UNREACHABLE,
                    ) from error
                time.sleep(pause)
        tell(file["bytes"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
