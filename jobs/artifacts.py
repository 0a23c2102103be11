"""Where bytes lie: one data folder, and every path in it made here.

    files/<sha256>           uploaded files     runs/<job>/<attempt>/    run folders, one per attempt
    corpora/                 tokenised data     results/<job>/<attempt>/ models that jobs made
    pinned/<job>/<id>/       checkpoints that people keep
    uploads/<upload>/<part>  files in parts     chores/<chore>/          folders of small work
    exports/<chore>/<attempt>/ models on their way home
    models/<name>/           local base models  satune.db                SQLite, where that is the database

A run folder belongs to one attempt, so a process that has lost its lease can never write into its successor's. Results
keep the attempt in their path for the same reason: the fenced row says which one is the result. The road not taken is
`results/<job>/`, where a late process could replace the model under a finished job.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import InvalidModelName
from jobs.settings import Settings

LOCAL = "local/"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Artifacts:
    """The data folder and the roots of local models."""

    data_dir: Path
    model_roots: tuple[Path, ...] = ()

    @classmethod
    def from_settings(cls, settings: Settings) -> Artifacts:
        """The data folder's own `models/` is always a root, and the first one."""
        return cls(settings.data_dir, (settings.data_dir / "models", *settings.model_roots))

    @property
    def files(self) -> Path:
        """Folder of the bytes of files; a temporary name in it begins with a dot."""
        return self._folder("files")

    @property
    def corpora(self) -> Path:
        """Folder of tokenised corpora, shared by attempts and jobs."""
        return self._folder("corpora")

    def file(self, sha256: str) -> Path:
        """Where the bytes of a file lie, named by their hash: equal files are stored once."""
        return self.files / sha256

    def keep(self, scratch: Path, sha256: str) -> None:
        """Give the bytes of a file their lasting name."""
        self.put(scratch, self.file(sha256))

    def put(self, source: Path, target: Path) -> None:
        """Move what is written and synced to its place, so that a power cut leaves all of it or nothing."""
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        for folder in (target.parent, target.parent.parent):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextmanager
    def dropping(self, sha256: str) -> Iterator[None]:
        """Delete a file's bytes where the block ends well; they are out of the way in it, and back where it fails."""
        path, aside = self.file(sha256), self.files / f".gone-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            os.rename(path, aside)
        try:
            yield
        except BaseException:
            with suppress(FileNotFoundError):
                os.rename(aside, path)
            raise
        aside.unlink(missing_ok=True)

    def upload(self, upload_id: str) -> Path:
        """Folder of the parts of an upload."""
        return self.data_dir / "uploads" / upload_id

    def runs(self, job_id: str) -> Path:
        """Folder of all attempts of a job."""
        return self.data_dir / "runs" / job_id

    def run(self, job_id: str, attempt: int) -> Path:
        """Run folder of one attempt."""
        return self.runs(job_id) / str(attempt)

    @property
    def chores(self) -> Path:
        """Folder of the folders of chores."""
        return self.data_dir / "chores"

    def chore(self, chore_id: str, attempt: int) -> Path:
        """Folder of one attempt at a chore, gone when it has ended."""
        return self.chores / chore_id / str(attempt)

    def drop_chore(self, chore_id: str, attempt: int) -> None:
        """Remove the folder of an attempt that is over; another, begun after it was taken for lost, may be at work beside it."""
        folder = self.chore(chore_id, attempt)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()

    def exports(self, chore_id: str) -> Path:
        """Folder of all attempts at an export."""
        return self.data_dir / "exports" / chore_id

    def export(self, chore_id: str, attempt: int) -> Path:
        """Where what an attempt exported lies, once it is the result."""
        return self.exports(chore_id) / str(attempt)

    def result(self, job_id: str, attempt: int) -> Path:
        """Where the model of an attempt lies, once it is the result."""
        return self.data_dir / "results" / job_id / str(attempt)

    def link_checkpoint(self, relative: str, job_id: str, checkpoint_id: str) -> str:
        """A second name for a checkpoint's bytes, out of reach of its run; the path that a row keeps of it.

        Raises:
            FileNotFoundError: the run has deleted the checkpoint.
        """
        source = self.absolute(relative)
        target = self.data_dir / "pinned" / job_id / checkpoint_id / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as aside:
            copy = Path(aside) / source.name
            try:
                shutil.copytree(source, copy, copy_function=os.link)
                names = json.loads((copy / "MANIFEST.json").read_text("utf-8"))
                if not all((copy / name).is_file() for name in names):
                    raise FileNotFoundError(f"{relative} was deleted while it was linked")
            except shutil.Error as error:
                raise FileNotFoundError(f"{relative} was deleted while it was linked") from error
            try:
                os.rename(copy, target)
            except OSError:
                # Somebody else pinned it in the same moment: the same bytes.
                if not target.is_dir():
                    raise
        return self.relative(target)

    def relative(self, path: Path) -> str:
        """The form in which rows keep a path, so that a data folder may move."""
        return path.relative_to(self.data_dir).as_posix()

    def absolute(self, path: str) -> Path:
        """The place of a path that a row keeps."""
        return self.data_dir / path

    def resolve_model(self, name: str) -> Path | None:
        """Folder of `local/NAME`, or None where there is none or the name is a hub's `org/name`.

        Raises InvalidModelName for a name that is neither: dots that climb, absolute paths, odd characters.
        """
        if not name.startswith(LOCAL):
            if not _HUB_NAME.fullmatch(name) or ".." in name:
                raise InvalidModelName(
                    f"{name!r} is no model name: expected local/NAME, or ORG/NAME of the model hub"
                )
            return None
        plain = name.removeprefix(LOCAL)
        if not _NAME.fullmatch(plain) or ".." in plain:
            raise InvalidModelName(
                f"{name!r} is no local model: expected {LOCAL}NAME with letters, digits, dot, dash, underscore"
            )
        return next((found for root in self.model_roots if (found := _inside(root, plain))), None)

    def local_models(self) -> tuple[str, ...]:
        """Names `local/NAME` of every model folder in the roots, sorted."""
        names = {
            LOCAL + entry.name
            for root in self.model_roots
            if root.is_dir()
            for entry in root.iterdir()
            if _NAME.fullmatch(entry.name) and _inside(root, entry.name)
        }
        return tuple(sorted(names))

    def delete(self, relative: str) -> None:
        """Delete a file or tree by the path its row kept; nothing there is fine."""
        path = self.absolute(relative)
        if not path.resolve().is_relative_to(self.data_dir.resolve()):
            raise ValueError(f"{relative!r} is not inside the data folder")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _folder(self, name: str) -> Path:
        path = self.data_dir / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def _inside(root: Path, name: str) -> Path | None:
    """The model folder `root/name`, where it is one and no link leads out of the root."""
    path = root / name
    if not (path / "config.json").is_file() or not path.resolve().is_relative_to(root.resolve()):
        return None
    return path.resolve()
