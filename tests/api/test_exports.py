"""Exports over HTTP, made by the worker's own code and the real core; downloads that go on where they were broken off."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from api.downloads import _hashed
from jobs.spec import NewFile
from tests.sat_core.tiny import write_model
from tests.sat_io.test_export import byte_model
from worker.chores import ChoreRunner

from .finished import claim_job, finish_job, new_job

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi.testclient import TestClient

    from api.deps import Services

EXPORTS = "/v1/exports"
JOBS = "/v1/fine_tuning/jobs"


def made_model(services: Services, write=byte_model) -> str:
    """The name of a result that is a real model."""
    new_job(services)
    claim = claim_job(services, 5)
    name = finish_job(services, 5, claim=claim)
    folder = services.artifacts.result(claim.job_id, claim.attempt)
    shutil.rmtree(folder)
    write(folder)
    return name


def work(services: Services) -> None:
    """What a worker does with the chore that waits."""
    claim = services.store.claim_chore("w")
    assert claim is not None
    ChoreRunner(services.settings, services.store, claim, threading.Event()).run()


def ask(client: TestClient, **body: str):
    return client.post(EXPORTS, json=body)


def test_an_export_is_made_and_downloaded(client, services, tmp_path: Path):
    name = made_model(services)
    asked = ask(client, model=name, dtype="bfloat16")
    assert asked.status_code == 200, asked.text
    queued = asked.json()
    url = f"{EXPORTS}/{queued['id']}"
    assert asked.headers["location"] == url
    assert (queued["object"], queued["status"], queued["files"]) == ("export", "queued", [])
    assert (queued["model"], queued["format"]) == (name, "safetensors")
    early = client.get(f"{url}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "export_not_ready")

    work(services)
    export = client.get(url).json()
    assert (export["status"], export["error"]) == ("succeeded", None), export
    assert not (services.settings.data_dir / "chores" / export["id"]).exists()
    assert client.get(EXPORTS).json()["data"] == [export]
    assert client.get(f"{url}/files").json()["data"] == export["files"]
    assert ask(client, model=name, dtype="bfloat16").json() == export, "made once"

    tar = client.get(f"{url}/content").content
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(tmp_path / "home", filter="data")
    home = tmp_path / "home" / export["id"]
    for file in export["files"]:
        content = (home / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            file["bytes"],
            file["sha256"],
        )
        hashed = _hashed.cache_info()
        alone = client.get(f"{url}/content", params={"file": file["name"]})
        assert alone.content == content
        assert _hashed.cache_info() == hashed, "its hash is known"
        digest = base64.b64encode(bytes.fromhex(file["sha256"])).decode()
        assert alone.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert export["bytes"] == sum(file["bytes"] for file in export["files"])
    weights = load_file(home / "model.safetensors")
    assert {str(t.dtype) for t in weights.values()} == {"torch.bfloat16"}

    assert client.delete(f"/v1/models/{name}").status_code == 200
    assert client.get(f"{url}/content").content == tar, "an export outlives its model"
    assert client.delete(url).json() == {"id": export["id"], "object": "export", "deleted": True}
    assert client.get(url).json()["error"]["code"] == "export_not_found"
    assert not (services.settings.data_dir / "exports" / export["id"]).exists()


def test_gguf_is_made_where_it_can_be(client, services):
    name = made_model(services)
    export = ask(client, model=name, format="gguf", dtype="float16").json()
    work(services)
    export = client.get(f"{EXPORTS}/{export['id']}").json()
    assert [file["name"] for file in export["files"]] == ["model.gguf"], export["error"]
    content = client.get(f"{EXPORTS}/{export['id']}/content?file=model.gguf").content
    assert content[:4] == b"GGUF"


def test_what_cannot_be_exported_is_refused_at_once(client, services):
    name = made_model(services, write_model)
    for body, code, param in (
        ({"model": name, "format": "gguf"}, "format_not_supported", "format"),
        ({"model": name, "format": "adapter"}, "format_not_supported", "format"),
        ({"model": name, "format": "onnx"}, "invalid_value", "format"),
        ({"model": name, "dtype": "int8"}, "invalid_value", "dtype"),
        ({"model": name, "dtyp": "float32"}, "unknown_parameter", "dtyp"),
        ({"model": "local/tiny"}, "unknown_model", "model"),
        ({"model": "ft:none"}, "unknown_model", "model"),
        ({"model": 3}, "unknown_model", "model"),
        ({"format": ["gguf"], "model": name}, "invalid_value", "format"),
        ({}, "missing_required_parameter", "model"),
    ):
        answer = client.post(EXPORTS, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert "WordLevel" in ask(client, model=name, format="gguf").json()["error"]["message"]
    assert "'full'" in ask(client, model=name, format="adapter").json()["error"]["message"]
    assert client.get(EXPORTS).json()["data"] == []


def test_a_model_that_goes_while_its_export_waits_fails_it(client, services):
    name = made_model(services)
    export = ask(client, model=name).json()
    client.delete(f"/v1/models/{name}")
    work(services)
    failed = client.get(f"{EXPORTS}/{export['id']}").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model_not_found")
    assert client.get(f"{EXPORTS}/{export['id']}/content").status_code == 409


def test_an_export_that_is_deleted_while_it_is_made_leaves_nothing(client, services):
    export = ask(client, model=made_model(services)).json()
    claim = services.store.claim_chore("w")
    client.delete(f"{EXPORTS}/{export['id']}")
    ChoreRunner(services.settings, services.store, claim, threading.Event()).run()
    assert not any(services.settings.data_dir.glob("exports/*/*"))
    assert not any(services.settings.data_dir.glob("chores/*"))


def test_a_retry_makes_one_export(client, services):
    name = made_model(services)
    headers = {"Idempotency-Key": "again"}
    made = [client.post(EXPORTS, json={"model": name}, headers=headers) for _ in range(2)]
    assert made[0].content == made[1].content
    assert made[1].headers["idempotent-replayed"] == "true"
    other = client.post(EXPORTS, json={"model": name, "dtype": "float16"}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert len(client.get(EXPORTS, params={"limit": 1}).json()["data"]) == 1


def test_pages_of_exports_and_other_chores_apart(client, services):
    name = made_model(services)
    first, second = (ask(client, model=name, dtype=d).json()["id"] for d in ("float32", "float16"))
    services.store.add_file(
        "default",
        NewFile(id="file-y", filename="f", purpose="fine-tune", bytes=1, sha256="1" * 64),
    )
    chore = services.store.ask_chore("default", "preview", "file-y", {"rows": 1})
    assert client.get(f"{EXPORTS}/{chore.id}").status_code == 404
    assert client.delete(f"{EXPORTS}/{chore.id}").status_code == 404
    page = client.get(EXPORTS, params={"limit": 1}).json()
    assert ([e["id"] for e in page["data"]], page["has_more"]) == ([second], True)
    page = client.get(EXPORTS, params={"limit": 1, "after": second}).json()
    assert ([e["id"] for e in page["data"]], page["has_more"]) == ([first], False)
    error = client.get(EXPORTS, params={"after": chore.id}).json()["error"]
    assert error["code"] == "invalid_cursor"


@pytest.mark.parametrize("file", [None, "config.json"])
def test_a_broken_download_goes_on_where_it_was(client, services, file):
    job = new_job(services)
    finish_job(services, steps=5)
    url, params = f"{JOBS}/{job}/result", {"file": file} if file else {}
    whole = client.get(url, params=params)
    assert whole.headers["accept-ranges"] == "bytes"
    size, etag = len(whole.content), whole.headers["etag"]
    assert whole.headers["content-length"] == str(size)
    for wanted, first, end in (
        ("bytes=0-0", 0, 1),
        (f"bytes={size // 2}-", size // 2, size),
        (f"bytes=5-{size + 99}", 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size + 5}", 0, size),
        (f"bytes={size - 1}-{size - 1}", size - 1, size),
    ):
        part = client.get(url, params=params, headers={"Range": wanted, "If-Range": etag})
        assert (part.status_code, part.content) == (206, whole.content[first:end]), wanted
        assert part.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
        assert part.headers["etag"] == etag
    if file is None:
        joined = b"".join(
            client.get(url, headers={"Range": f"bytes={at}-{at + 99}"}).content
            for at in range(0, size, 100)
        )
        assert joined == whole.content
    for ignored in ("bytes=9-3", "bytes=-", "rows=1-2", "bytes=0-1,3-4", "nonsense"):
        answer = client.get(url, params=params, headers={"Range": ignored})
        assert (answer.status_code, answer.content) == (200, whole.content), ignored
    changed = client.get(url, params=params, headers={"Range": "bytes=1-", "If-Range": '"old"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    beyond = client.get(url, params=params, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert beyond.json()["error"]["code"] == "range_not_satisfiable"
    head = client.head(url, params=params, headers={"Range": "bytes=2-4"})
    assert (head.status_code, head.headers["content-length"], head.content) == (206, "3", b"")


def test_the_files_of_a_result_are_listed_with_their_hashes(client, services):
    job = new_job(services)
    url = f"{JOBS}/{job}/result"
    assert client.get(f"{url}/files").json()["error"]["code"] == "result_not_ready"
    finish_job(services, steps=5)
    files = {entry["name"]: entry for entry in client.get(f"{url}/files").json()["data"]}
    assert files.keys() == {"config.json", "model.safetensors"}
    content = client.get(url, params={"file": "config.json"}).content
    assert json.loads(content) == {"kind": "result"}
    assert files["config.json"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert files["model.safetensors"]["bytes"] == 700
    for name in ("none.json", "../2/config.json", "/etc/passwd", ""):
        answer = client.get(url, params={"file": name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")
