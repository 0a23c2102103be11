"""What `sat_io` writes and `sat_core` reads: the layout of a corpus on disk, and how files are told apart.

A corpus is a folder: corpus.json (format, figures), and of each split `<split>.tokens.bin` (uint32), `<split>.mask.bin`
(uint8 a token) and `<split>.offsets.npy` (int64, where sequences begin, and the end).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CORPUS_FORMAT = "satune.corpus/2"
# Bits of the mask: the token carries loss; it is the first of a document that sees nothing before it.
TRAINED, FIRST = 1, 2


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
