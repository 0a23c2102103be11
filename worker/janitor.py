"""What nobody asks for and time alone brings about: files and uploads whose hour has come, folders nobody works in.

A corpus can be made again from its files, so it goes when no unfinished job trains on it and either nobody has asked for it
in a week or the bytes of a file in it were deleted.
Harmless in any number, like the sweeper. A file that an unfinished job needs stays until the job has ended.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from jobs.artifacts import Artifacts
from jobs.errors import FileInUse, NotFound
from jobs.settings import Settings
from jobs.store import Store

log = logging.getLogger(__name__)

TIDY_SECONDS = 60.0
# The folder of a chore goes with its runner; this is for runners that were killed. No chore but a chat lasts as long.
STALE_CHORE_SECONDS = 6 * 3600
CORPUS_SECONDS = 7 * 24 * 3600
# Whoever has just prepared it names it in its job's row a moment later.
FRESH_CORPUS_SECONDS = 3600


class Janitor:
    """One process's sweeping up."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.store, self.artifacts = store, Artifacts.from_settings(settings)
        self._tidied_at = time.monotonic() - TIDY_SECONDS

    def tidy(self, *, now: bool = False) -> None:
        """Sweep up, at most once a minute unless it is to be now. Raises StoreUnavailable."""
        if not now and time.monotonic() - self._tidied_at < TIDY_SECONDS:
            return
        self._tidied_at = time.monotonic()
        for project, file_id in self.store.expired_files():
            with suppress(NotFound, FileInUse):
                self.store.delete_file(project, file_id, self.artifacts.dropping)
                log.info("File %s of %s has expired", file_id, project)
        for upload_id in self.store.expire_uploads():
            shutil.rmtree(self.artifacts.upload(upload_id), ignore_errors=True)
            log.info("Upload %s has expired", upload_id)
        held = {lease.job_id for lease in self.store.chore_leases()}
        for folder in self.artifacts.chores.glob("*/"):
            with suppress(FileNotFoundError):
                old = time.time() - folder.stat().st_mtime > STALE_CHORE_SECONDS
                if old and folder.name not in held:
                    shutil.rmtree(folder, ignore_errors=True)
        self._tidy_corpora()

    def _tidy_corpora(self) -> None:
        """Rename aside first: whoever comes for it in this moment finds it whole or not at all."""
        needed = self.store.needed_corpora()
        for folder in self.artifacts.corpora.glob("[!.]*/"):
            with suppress(OSError):
                if folder.name not in needed and self._useless(folder):
                    aside = folder.with_name(f".gone-{secrets.token_hex(8)}")
                    folder.rename(aside)
                    shutil.rmtree(aside, ignore_errors=True)
                    log.info("Corpus %s is dropped", folder.name)
        for scratch in self.artifacts.corpora.glob(".*/"):
            with suppress(OSError):
                if time.time() - scratch.stat().st_mtime > CORPUS_SECONDS:
                    shutil.rmtree(scratch, ignore_errors=True)

    def _useless(self, folder: Path) -> bool:
        unused = time.time() - folder.stat().st_mtime
        if unused > CORPUS_SECONDS or unused < FRESH_CORPUS_SECONDS:
            return unused > CORPUS_SECONDS
        try:
            made_of = json.loads((folder / "corpus.json").read_text("utf-8")).get("sources", [])
        except ValueError:
            return True  # cut short by a power cut
        return not all(self.artifacts.file(sha256).exists() for sha256 in made_of)
