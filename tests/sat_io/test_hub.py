"""Data sets of the hub: streamed from a small hub that this test serves, and named where there is none."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sat_core.plan.errors import DataError, ModelError
from sat_io.base_model import hub_revision
from sat_io.sources import Source, hub_parts
from tests.sat_core.tiny import read_events, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = b"".join(b'{"prompt": "a w%d", "completion": " b", "n": %d}\n' % (i, i) for i in range(50))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as streaming one file asks for."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if re.fullmatch(r"/api/datasets/org/name(/revision/\w+)?", path):
            self._json({"id": "org/name", "sha": COMMIT, "tags": [], "siblings": []})
        elif path == f"/api/datasets/org/name/tree/{COMMIT}":
            self._json([{"type": "file", "oid": COMMIT, "size": len(ROWS), "path": "train.jsonl"}])
        elif path == f"/datasets/org/name/resolve/{COMMIT}/train.jsonl":
            self._answer(200, ROWS, {"X-Repo-Commit": COMMIT, "ETag": f'"{COMMIT}"'})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def prepared(root: Path, endpoint: str, name: str) -> int:
    """Run the program in a process of its own: the library reads the hub's address once."""
    config = {
        "format": "satune.prepare/1",
        "request": {"model": "m"},
        "model": {"name": "m", "path": str(write_model(root / "model")), "revision": None},
        "training_file": {"path": None, "filename": name},
        "validation_file": None,
        "corpora_dir": str(root / "corpora"),
    }
    (root / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_HOME": str(root / "hub"), "HF_ENDPOINT": endpoint}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "sat_io", "prepare", str(root)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_a_data_set_is_streamed_at_the_commit_it_had(tmp_path: Path, hub: str) -> None:
    assert prepared(tmp_path, hub, "org/name:train") == 0, read_events(tmp_path)[-1]
    figures = json.loads((tmp_path / "train.json").read_text())["figures"]
    assert (figures["rows"], figures["format"]) == (50, "prompt_completion")
    assert (figures["files"][0]["filename"], figures["files"][0]["revision"]) == (
        "org/name:train",
        COMMIT,
    )


def test_a_hub_that_does_not_answer_is_said_so(tmp_path: Path) -> None:
    assert prepared(tmp_path, "http://127.0.0.1:1", "org/name") == 20
    event = read_events(tmp_path)[-1]
    assert event["code"] == "dataset_download_failed"
    assert "org/name cannot be read from the hub: ConnectError" in event["message"]


def test_a_model_that_the_hub_does_not_have_is_said_so(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    with pytest.raises(ModelError, match="org/none cannot be found on the hub"):
        hub_revision("org/none")


def test_a_name_has_a_subset_and_a_split_or_their_defaults() -> None:
    assert hub_parts("org/name") == ("org/name", None, "train")
    assert hub_parts("org/name:test") == ("org/name", None, "test")
    assert hub_parts("org/name/main:test") == ("org/name", "main", "test")


@pytest.mark.parametrize("name", ["name", "/etc/passwd", "../name", "a/b/c/d", "org/name/..:x", ""])
def test_what_is_no_name_of_the_hub_is_refused_before_it_is_asked(name: str) -> None:
    with pytest.raises(DataError, match="names no data set of the hub"):
        _ = Source(path=None, filename=name).fingerprint


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: there is no such file"):
        _ = Source(path=tmp_path / "gone.jsonl", filename="gone.jsonl").fingerprint
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        _ = Source(path=tmp_path / "pipe.jsonl", filename="pipe.jsonl").fingerprint
