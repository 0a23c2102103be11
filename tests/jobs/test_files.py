"""Files, their bytes, and uploads in parts, on both databases."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from jobs import uploads
from jobs.artifacts import Artifacts
from jobs.errors import NotFound, PartsMismatch, UploadClosed
from jobs.settings import Settings
from jobs.spec import NewFile, NewUpload, new_id
from jobs.store import Store

SHA256 = "a" * 64
UPLOAD = NewUpload(bytes=10, filename="d.jsonl", purpose="fine-tune", settings={})


@pytest.fixture
def artifacts(quick: Settings) -> Artifacts:
    return Artifacts.from_settings(quick)


def new(sha256: str = SHA256, **changes: object) -> NewFile:
    values = {"filename": "d.jsonl", "purpose": "fine-tune", "bytes": 3, "sha256": sha256}
    return NewFile(**{"id": new_id("file-"), **values, **changes})  # type: ignore[arg-type]


def placed(store: Store, artifacts: Artifacts, file: NewFile) -> str:
    """A registered file with its bytes, as an upload leaves it."""
    scratch: Path = artifacts.files / f".part-{new_id('')}"
    scratch.write_bytes(b"abc")
    place = lambda: artifacts.keep(scratch, file.sha256)  # noqa: E731
    return store.add_file("default", file, place=place).id


def test_bytes_go_with_the_last_file_that_has_them(store: Store, artifacts: Artifacts) -> None:
    first, second = (placed(store, artifacts, new()) for _ in range(2))
    assert [p.name for p in artifacts.files.iterdir()] == [SHA256]
    store.delete_file("default", first, artifacts.dropping)
    assert artifacts.file(SHA256).read_bytes() == b"abc"
    store.delete_file("default", second, artifacts.dropping)
    assert list(artifacts.files.iterdir()) == []


def test_bytes_survive_a_deletion_that_meets_an_upload_of_the_same(
    store: Store, artifacts: Artifacts
) -> None:
    kept: list[str] = []
    for _ in range(15):
        doomed = placed(store, artifacts, new())
        threads = [
            threading.Thread(
                target=store.delete_file, args=("default", doomed, artifacts.dropping)
            ),
            threading.Thread(target=lambda: kept.append(placed(store, artifacts, new()))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert artifacts.file(SHA256).read_bytes() == b"abc"
        store.delete_file("default", kept.pop(), artifacts.dropping)
        assert list(artifacts.files.iterdir()) == []


def test_what_was_found_out_about_a_file_goes_with_it(store: Store) -> None:
    file = store.add_file("default", new())
    chore = store.ask_chore("default", "validation", file.id)
    store.delete_file("default", file.id)
    with pytest.raises(NotFound):
        store.get_chore("default", chore.id)


def test_a_file_is_settled_once(store: Store) -> None:
    file = store.add_file("default", new(status="uploaded"))
    report = {"status": "invalid", "errors": []}
    settled = store.settle_file("default", file.id, status="error", rows=2, report=report)
    assert (settled.status, settled.rows, settled.report) == ("error", 2, report)
    again = store.settle_file("default", file.id, status="processed", rows=9, report={})
    assert (again.status, again.rows) == ("error", 2)


def test_files_expire_when_their_time_is_over(store: Store) -> None:
    store.add_file("default", new())
    store.add_file("default", new(expires_at=time.time() + 60))
    over = store.add_file("default", new(expires_at=time.time() - 1))
    assert store.expired_files() == [("default", over.id)]


def test_an_upload_becomes_one_file(store: Store) -> None:
    upload = store.create_upload("default", UPLOAD)
    for name, size in (("part_1", 4), ("part_2", 6)):
        store.add_part("default", upload.id, name, size)
    found = store.chosen_parts("default", upload.id, ["part_2", "part_1"])
    assert [p.id for p in found] == ["part_2", "part_1"]
    with pytest.raises(PartsMismatch):
        store.chosen_parts("default", upload.id, ["part_1"])
    done = store.complete_upload("default", upload.id, new(), lambda: None)
    assert (done.status, done.file and done.file.sha256) == ("completed", SHA256)
    with pytest.raises(UploadClosed):
        store.complete_upload("default", upload.id, new(), lambda: None)
    assert len(store.list_files("default").items) == 1
    with pytest.raises(NotFound):
        store.get_upload("other", upload.id)


def test_an_upload_whose_bytes_cannot_be_placed_stays_open(store: Store) -> None:
    upload = store.create_upload("default", UPLOAD)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.complete_upload("default", upload.id, new(), full)
    assert store.get_upload("default", upload.id).status == "pending"
    assert store.list_files("default").items == ()


def test_uploads_expire_and_cancelled_ones_stay_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = store.create_upload("default", UPLOAD)
    store.cancel_upload("default", cancelled.id)
    monkeypatch.setattr(uploads, "UPLOAD_SECONDS", -1)
    late = store.create_upload("default", UPLOAD)
    assert store.get_upload("default", late.id).status == "expired"
    with pytest.raises(UploadClosed):
        store.add_part("default", late.id, "part_1", 1)
    assert store.expire_uploads() == [late.id]
    assert store.expire_uploads() == []
    assert store.get_upload("default", cancelled.id).status == "cancelled"
