"""Files in parts, by OpenAI's unmodified client and by hand."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from sqlalchemy import select

from api.multipart import FEED_BYTES
from jobs import uploads
from jobs.models import UploadRow
from tests.service import eventually
from worker.janitor import Janitor

from .conftest import KEY, ROW
from .serving import served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from api.deps import Services
    from jobs.settings import Settings

CONTENT = ROW * 10


@pytest.fixture
def sdk(app: FastAPI) -> Iterator[openai.OpenAI]:
    with (
        served(app) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def begin(client: TestClient | httpx.Client, **changes: Any) -> Any:
    body = {
        "bytes": len(CONTENT),
        "filename": "data.jsonl",
        "mime_type": "application/jsonl",
        "purpose": "fine-tune",
    }
    return client.post("/v1/uploads", json=body | changes)


def part(client: TestClient | httpx.Client, upload: str, content: bytes) -> Any:
    return client.post(f"/v1/uploads/{upload}/parts", files={"data": ("blob", content)})


def complete(client: TestClient, upload: str, *part_ids: str, **more: str) -> Any:
    return client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": list(part_ids)} | more)


def test_the_official_client_uploads_in_parts(sdk: openai.OpenAI) -> None:
    upload = sdk.uploads.create(
        bytes=len(CONTENT),
        filename="data.jsonl",
        mime_type="application/jsonl",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert upload.status == "pending"
    assert upload.expires_at - upload.created_at == 3600
    # Sent in the wrong order, and one twice: the ids at the end decide.
    second = sdk.uploads.parts.create(upload.id, data=CONTENT[100:])
    sdk.uploads.parts.create(upload.id, data=CONTENT[:100])
    first = sdk.uploads.parts.create(upload.id, data=CONTENT[:100])
    assert first.upload_id == upload.id
    done = sdk.uploads.complete(
        upload.id,
        part_ids=[first.id, second.id],
        md5=hashlib.md5(CONTENT, usedforsecurity=False).hexdigest(),
    )
    assert (done.status, done.file.status, done.file.bytes) == (
        "completed",
        "processed",
        len(CONTENT),
    )
    assert done.file.expires_at == done.file.created_at + 3600
    assert sdk.files.content(done.file.id).read() == CONTENT
    again = sdk.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert again.file.id == done.file.id
    assert len(list(sdk.files.list())) == 1


def test_a_file_lives_from_when_it_is_whole(client: TestClient, services: Services) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    upload = begin(client, expires_after=expiry).json()["id"]
    piece = part(client, upload, CONTENT).json()["id"]
    with services.store.writing() as session:
        row = session.scalars(select(UploadRow).where(UploadRow.id == upload)).one()
        row.created_at -= 1000
    file = complete(client, upload, piece).json()["file"]
    assert file["expires_at"] - file["created_at"] == 3600


def test_the_official_client_cuts_a_file_by_itself(sdk: openai.OpenAI, settings: Any) -> None:
    done = sdk.uploads.upload_file_chunked(
        file=CONTENT,
        filename="data.jsonl",
        bytes=len(CONTENT),
        mime_type="application/jsonl",
        purpose="fine-tune",
        part_size=300,
    )
    assert sdk.files.content(done.file.id).read() == CONTENT
    folder = settings.data_dir / "uploads"
    assert list(folder.iterdir()) == []


def test_bad_data_in_parts_is_refused_as_a_whole_file_is(client: TestClient) -> None:
    bad = ROW + b"{broken\n"
    upload = begin(client, bytes=len(bad)).json()["id"]
    ids = [part(client, upload, bad[:50]).json()["id"], part(client, upload, bad[50:]).json()["id"]]
    error = complete(client, upload, *ids).json()["error"]
    assert (error["code"], error["problems"][0]["line"]) == ("dataset_invalid", 2)
    assert client.get("/v1/files").json()["data"] == []


def test_bad_data_may_be_kept_for_its_report(client: TestClient) -> None:
    bad = ROW + b"{broken\n"
    upload = begin(client, bytes=len(bad), sat={"keep_invalid": True}).json()["id"]
    done = complete(client, upload, part(client, upload, bad).json()["id"]).json()
    assert (done["status"], done["file"]["status"]) == ("completed", "error")


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"bytes": 0}, 400, "invalid_value", "bytes"),
        ({"bytes": 1 << 40}, 413, "file_too_large", "bytes"),
        ({"bytes": "9"}, 400, "invalid_value", "bytes"),
        ({"purpose": "assistants"}, 400, "unsupported_purpose", "purpose"),
        ({"filename": ""}, 400, "invalid_value", "filename"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"sat": {"formt": "text"}}, 400, "unknown_parameter", "sat.formt"),
        ({"sat": {"format": "csv"}}, 400, "invalid_value", "sat[format]"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "invalid_value", None),
    ],
)
def test_an_announcement_that_is_not_understood_is_refused(
    client: TestClient, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = begin(client, **changes)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert param is None or error["param"] == param


def test_parts_that_do_not_make_the_file_are_named(client: TestClient) -> None:
    upload = begin(client).json()["id"]
    first = part(client, upload, CONTENT[:100]).json()["id"]
    second = part(client, upload, CONTENT[100:]).json()["id"]
    for ids, words in (
        ([first], "100 bytes"),
        ([first, second, second], "twice"),
        ([first, "part_none"], "part_ids.1 'part_none'"),
    ):
        error = complete(client, upload, *ids).json()["error"]
        assert error["code"] == "parts_mismatch"
        assert words in error["message"]
    wrong = complete(client, upload, first, second, md5="0" * 32)
    assert wrong.json()["error"]["code"] == "checksum_mismatch"
    assert complete(client, upload, first, second).status_code == 200


def test_a_part_above_64_mib_is_413_and_leaves_nothing(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.uploads.MAX_PART_BYTES", 1000)
    upload = begin(client).json()["id"]
    response = part(client, upload, b"x" * 1001)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "file_too_large")
    assert list(services.artifacts.upload(upload).iterdir()) == []


def test_parts_without_end_are_refused(client: TestClient) -> None:
    upload = begin(client).json()["id"]
    codes = [part(client, upload, CONTENT).status_code for _ in range(4)]
    assert codes == [200, 200, 200, 400]


def test_uploads_store_no_more_than_the_project_may(client: TestClient, services: Services) -> None:
    services.store.set_limits("default", {"storage_bytes": len(CONTENT)})
    upload = begin(client, bytes=1).json()["id"]
    large = part(client, upload, b"x" * 2**20)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "file_too_large")
    assert list(services.artifacts.upload(upload).iterdir()) == []
    full = begin(client)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "storage_quota_exceeded")
    client.post(f"/v1/uploads/{upload}/cancel")
    upload = begin(client).json()["id"]
    beside = client.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", ROW)}
    )
    assert beside.json()["error"]["code"] == "storage_quota_exceeded"
    assert complete(client, upload, part(client, upload, CONTENT).json()["id"]).status_code == 200
    assert services.store.limits("default")[1].storage_bytes == len(CONTENT)


def test_a_cancelled_upload_takes_nothing_more(client: TestClient, services: Services) -> None:
    upload = begin(client).json()["id"]
    sent = part(client, upload, CONTENT).json()["id"]
    for _ in range(2):
        assert client.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    assert not services.artifacts.upload(upload).exists()
    for late in (part(client, upload, b"x"), complete(client, upload, sent)):
        assert (late.status_code, late.json()["error"]["code"]) == (409, "upload_closed")
        assert late.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("end", ["cancel", "complete"])
def test_a_part_that_is_on_its_way_while_the_upload_ends_is_refused(
    app: FastAPI, settings: Settings, end: str
) -> None:
    whole = b" " * (FEED_BYTES - len(ROW)) + ROW
    auth = {"authorization": f"Bearer {KEY}"}
    with served(app) as address, httpx.Client(base_url=address, headers=auth) as client:
        upload = begin(client, bytes=len(whole)).json()["id"]
        sent = part(client, upload, whole).json()["id"]
        folder = settings.data_dir / "uploads" / upload

        def body() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="data"; filename="blob"\r\n\r\n'
            yield whole
            eventually(lambda: len(list(folder.iterdir())) == 2, seconds=10)
            asked = {"part_ids": [sent]} if end == "complete" else None
            ended = httpx.post(f"{address}/v1/uploads/{upload}/{end}", json=asked, headers=auth)
            assert ended.status_code == 200
            yield b"\r\n--b--\r\n"

        form = {"content-type": "multipart/form-data; boundary=b"}
        late = client.post(f"/v1/uploads/{upload}/parts", content=body(), headers=form)
        assert (late.status_code, late.json()["error"]["code"]) == (409, "upload_closed")
        assert not folder.exists()


def test_an_upload_ends_after_an_hour(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_SECONDS", -1)
    upload = begin(client).json()["id"]
    services.artifacts.upload(upload).mkdir(parents=True)
    late = part(client, upload, b"x").json()["error"]
    assert (late["code"], "expired" in late["message"]) == ("upload_closed", True)
    Janitor(services.settings, services.store).tidy()
    assert services.store.get_upload("default", upload).status == "expired"
    assert not services.artifacts.upload(upload).exists()


def test_two_who_complete_at_once_get_one_file(client: TestClient) -> None:
    upload = begin(client).json()["id"]
    sent = part(client, upload, CONTENT).json()["id"]
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(complete(client, upload, sent)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200] * 4
    assert len({a.json()["file"]["id"] for a in answers}) == 1
    assert len(client.get("/v1/files").json()["data"]) == 1


def test_another_project_sees_no_upload(client: TestClient, services: Services) -> None:
    upload = begin(client).json()["id"]
    services.store.ensure_key("sk-sat-other", name="other", project="other")
    client.headers["authorization"] = "Bearer sk-sat-other"
    for response in (
        part(client, upload, b"x"),
        complete(client, upload, "part_x"),
        client.post(f"/v1/uploads/{upload}/cancel"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "upload_not_found")
