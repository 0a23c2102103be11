"""Uploads: checked row by row while they arrive, whole or not there."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import threading
import time
from pathlib import Path

import openai
import pytest
from sqlalchemy import Connection, Engine, event, select

from api.datasets import MOST_TRIES
from api.drafts import PIECE_BYTES
from jobs import chores
from jobs.errors import StoreUnavailable
from jobs.models import FileRow
from worker.chores import ChoreRunner
from worker.janitor import Janitor
from worker.kinds import KINDS

from .conftest import KEY, ROW, create, upload
from .finished import claim_job, new_job
from .serving import served


def left_behind(services) -> list[str]:
    return sorted(path.name for path in services.artifacts.files.iterdir())


def work(services, **changes) -> None:
    """What a worker does with the chore that waits."""
    kinds = {"validation": dataclasses.replace(KINDS["validation"], **changes)}
    claim = services.store.claim_chore("w")
    ChoreRunner(services.settings, services.store, claim, threading.Event(), kinds=kinds).run()


def test_a_good_file_is_stored_whole_with_its_verdict(client, services):
    body = upload(client, ROW * 3).json()
    assert body["object"] == "file"
    assert (body["rows"], body["format"], body["bytes"]) == (3, "messages", 3 * len(ROW))
    assert body["status"] == "processed"
    assert left_behind(services) == [body["sha256"]]
    assert client.get(f"/v1/files/{body['id']}/content").content == ROW * 3


def test_a_range_of_the_content_is_served(client, file_id):
    response = client.get(f"/v1/files/{file_id}/content", headers={"range": "bytes=2-9"})
    assert (response.status_code, response.content) == (206, ROW[2:10])
    beyond = client.get(f"/v1/files/{file_id}/content", headers={"range": "bytes=9999-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        (ROW + b"{broken\n" + ROW, 2, "bad_json"),
        (ROW + b'{"messages": [{"role": "bot", "content": "x"}]}\n', 2, "bad_role"),
        (b'{"mesages": []}\n', 1, "unknown_format"),
        (ROW + b"\xff\xfe\n", 2, "not_utf8"),
        (b"", 1, "empty_file"),
        (b"\n\n", 1, "empty_file"),
    ],
)
def test_a_bad_file_is_named_by_its_place_and_leaves_nothing(client, services, content, line, code):
    response = upload(client, content)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "dataset_invalid", "file")
    problem = error["problems"][0]
    assert (problem["code"], problem["line"]) == (code, line)
    assert "byte_offset" in problem
    assert problem["message"] in error["message"]
    assert left_behind(services) == []
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"purpose": "assistants"}, "unsupported_purpose"),
        ({"purpos": "fine-tune"}, "unknown_parameter"),
        ({"sat[format]": "csv"}, "invalid_value"),
        ({"expires_after[seconds]": "3600"}, "invalid_value"),
        ({"expires_after[anchor]": "created_at"}, "invalid_value"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "invalid_value"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "9"}, "invalid_value"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "x"}, "invalid_value"),
        ({"sat[keep_invalid]": "yes"}, "invalid_value"),
    ],
)
def test_a_field_that_is_not_understood_is_refused(client, services, fields, code):
    assert upload(client, ROW, **fields).json()["error"]["code"] == code
    assert left_behind(services) == []


def test_a_form_without_file_or_purpose_is_refused(client):
    no_file = client.post("/v1/files", files={"purpose": (None, "fine-tune")})
    assert no_file.json()["error"]["param"] == "file"
    no_purpose = client.post("/v1/files", files={"file": ("a.jsonl", ROW)})
    assert no_purpose.json()["error"]["param"] == "purpose"


def test_a_body_that_ends_early_leaves_nothing(client, services):
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    response = client.post(
        "/v1/files", content=head + ROW, headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert response.status_code == 400
    assert left_behind(services) == []


def test_a_file_above_the_limit_is_413_whether_its_length_is_told_or_not(client, services):
    big = ROW * (1 + (1 << 20) // len(ROW))
    assert upload(client, big).json()["error"]["code"] == "file_too_large"
    assert upload(client, big * 3).json()["error"]["code"] == "file_too_large"
    assert left_behind(services) == []


def test_a_name_that_climbs_is_only_a_name(client, services):
    body = upload(client, ROW, filename="../../etc/x.jsonl").json()
    assert body["filename"] == "x.jsonl"
    assert left_behind(services) == [body["sha256"]]


def test_pages_follow_each_other_without_gap_or_repeat(client):
    ids = [upload(client, ROW * n).json()["id"] for n in range(1, 6)]
    seen, after = [], None
    while True:
        page = client.get(
            "/v1/files", params={"limit": 2} | ({"after": after} if after else {})
        ).json()
        seen += [item["id"] for item in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == ids[::-1]
    assert client.get("/v1/files?order=asc").json()["first_id"] == ids[0]


def test_an_unknown_cursor_is_refused(client, file_id):
    assert client.get("/v1/files?after=file-none").json()["error"]["code"] == "invalid_cursor"


def test_a_deleted_file_is_gone_from_list_and_disk(client, services, file_id):
    assert client.delete(f"/v1/files/{file_id}").json() == {
        "id": file_id,
        "object": "file",
        "deleted": True,
    }
    assert client.get(f"/v1/files/{file_id}").status_code == 404
    assert left_behind(services) == []


def test_a_file_that_a_job_needs_stays(client, file_id):
    create(client, file_id)
    response = client.delete(f"/v1/files/{file_id}")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "file_in_use")
    assert client.get(f"/v1/files/{file_id}/content").content == ROW * 3


def test_a_file_that_a_job_mixes_in_is_kept_until_the_job_ends(client, file_id):
    replay = upload(client, ROW * 2).json()["id"]
    mix = {"sat": {"data": {"mix": [{"file": replay, "weight": 0.5}]}}}
    job = create(client, file_id, **mix).json()["id"]
    response = client.delete(f"/v1/files/{replay}")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "file_in_use")
    client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert client.delete(f"/v1/files/{replay}").status_code == 200


def test_a_mixed_file_that_is_not_there_is_named(client, file_id):
    mix = {"sat": {"data": {"mix": [{"file": "file-none"}]}}}
    response = create(client, file_id, **mix)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "sat.data.mix.0.file"


def test_equal_bytes_are_stored_once_and_stay_while_one_file_has_them(client, services):
    first, second = (upload(client, ROW, filename=name).json() for name in ("a.jsonl", "b.jsonl"))
    assert first["id"] != second["id"]
    assert left_behind(services) == [first["sha256"]]
    client.delete(f"/v1/files/{first['id']}")
    assert client.get(f"/v1/files/{second['id']}/content").content == ROW
    client.delete(f"/v1/files/{second['id']}")
    assert left_behind(services) == []


def test_a_deletion_that_is_not_committed_leaves_the_bytes(client, services, file_id):
    sha256 = services.store.get_file("default", file_id).sha256

    def lose(_: Connection) -> None:
        assert left_behind(services) != [sha256]
        raise StoreUnavailable("the connection is gone")

    event.listen(Engine, "commit", lose)
    try:
        with pytest.raises(StoreUnavailable):
            services.store.delete_file("default", file_id, services.artifacts.dropping)
    finally:
        event.remove(Engine, "commit", lose)
    assert left_behind(services) == [sha256]
    assert client.get(f"/v1/files/{file_id}/content").content == ROW * 3


def test_a_file_expires_when_it_was_asked_to_and_no_job_needs_it(client, services, monkeypatch):
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    body = upload(client, ROW, **fields).json()
    assert body["expires_at"] - body["created_at"] == 3600
    needed = upload(client, ROW * 2, **fields).json()["id"]
    lasting = upload(client, ROW * 3).json()
    assert lasting["expires_at"] is None
    create(client, needed)
    janitor = Janitor(services.settings, services.store)
    janitor.tidy(now=True)
    assert len(client.get("/v1/files").json()["data"]) == 3
    now = time.time()
    monkeypatch.setattr("jobs.library.time.time", lambda: now + 4000)
    janitor.tidy(now=True)
    kept = {item["id"] for item in client.get("/v1/files").json()["data"]}
    assert kept == {needed, lasting["id"]}


def test_a_corpus_goes_with_its_files_and_with_time_but_never_from_a_job(client, services):
    def made(name: str, *sha256: str, hours: float) -> Path:
        folder = services.artifacts.corpora / name
        folder.mkdir()
        (folder / "corpus.json").write_text(json.dumps({"sources": sha256}))
        then = time.time() - hours * 3600
        os.utime(folder, (then, then))
        return folder

    file = upload(client, ROW).json()["id"]
    here = services.store.get_file("default", file).sha256
    gone = "0" * 64
    lasting = [
        made("used", here, hours=100),
        made("of-the-hub", hours=100),
        made("fresh", gone, hours=0.5),
        made("x", gone, hours=1000),
    ]
    going = [made("old", here, hours=200), made("deleted", here, gone, hours=2)]
    (made("cut", here, hours=2) / "corpus.json").write_bytes(b"")
    new_job(services)
    claim_job(services, 40)  # its corpus is `x`
    Janitor(services.settings, services.store).tidy(now=True)
    assert [folder.exists() for folder in lasting] == [True] * 4
    assert [folder.exists() for folder in going] == [False] * 2
    assert len(list(services.artifacts.corpora.iterdir())) == 4


def test_a_bad_file_may_be_kept_for_its_report_and_no_job_takes_it(client, file_id):
    bad = ROW + b"{broken \x00\n" + ROW + b'{"messages": []}\n'
    body = upload(client, bad, **{"sat[keep_invalid]": "true"}).json()
    assert (body["status"], body["rows"]) == ("error", 2)
    assert "line 2" in body["status_details"]
    assert "errors" not in body["validation"]
    report = client.get(f"/v1/files/{body['id']}/validation").json()
    assert (report["status"], report["error_count"], report["has_more"]) == ("invalid", 2, False)
    assert [(e["line"], e["code"]) for e in report["errors"]] == [(2, "bad_json"), (4, "bad_type")]
    assert report["errors"][0]["byte_offset"] == len(ROW)
    for fields in ({}, {"validation_file": body["id"]}):
        response = create(client, *([body["id"]] if not fields else [file_id]), **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "dataset_invalid")
        assert error["param"] == ("validation_file" if fields else "training_file")
        assert error["problems"][0]["line"] == 2


def test_a_report_that_nobody_works_on_is_pending(client, file_id):
    report = client.get(f"/v1/files/{file_id}/validation")
    assert report.headers["retry-after"] == "1"
    body = report.json()
    assert (body["status"], body["rows"], body["error_count"]) == ("pending", 3, 0)
    preview = client.get(f"/v1/files/{file_id}/preview", params={"model": "local/tiny"}).json()
    assert (preview["status"], preview["rows"]) == ("pending", [])


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("validation?model=local/none", 400, "unknown_model"),
        ("validation?against=file-none", 404, "file_not_found"),
        ("validation?max_seq_len=1", 400, "invalid_value"),
        ("validation?train_on=some", 400, "invalid_value"),
        ("preview", 400, "missing_required_parameter"),
        ("preview?model=local/tiny&rows=101", 400, "invalid_value"),
        ("preview?model=local/../x", 400, "unknown_model"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(client, file_id, path, status, code):
    response = client.get(f"/v1/files/{file_id}/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_refusal_long_before_all_has_arrived_is_read_by_the_official_client(app):
    with (
        served(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as sdk,
        pytest.raises(openai.APIStatusError, match="limit of this service") as large,
    ):
        sdk.files.create(file=("data.jsonl", ROW * 100_000), purpose="fine-tune")
    assert (large.value.status_code, large.value.code) == (413, "file_too_large")


@pytest.mark.parametrize(("row", "status"), [(ROW.strip(), "processed"), (b"[]", "error")])
def test_a_large_array_is_judged_by_a_worker(client, services, row, status):
    small = upload(client, b"[" + ROW.strip() + b"]", filename="small.json").json()
    assert (small["status"], small["rows"]) == ("processed", 1)
    large = b"[" + (row + b",") * (PIECE_BYTES // (len(row) + 1)) + row + b"]"
    body = upload(client, gzip.compress(large), filename="large.json.gz").json()
    assert (body["status"], body["rows"]) == ("uploaded", 0)
    path = f"/v1/files/{body['id']}"
    assert client.get(path).json()["status"] == "uploaded"
    work(services)
    settled = client.get(path).json()
    assert (row == b"[]") == ("unusable" in settled["validation"]["summary"])
    assert settled["status"] == status
    assert settled["validation"]["error_count"] == (
        0 if status == "processed" else large.count(row)
    )


@pytest.fixture
def unread(client):
    """A good file that a worker is to judge."""
    large = b"[" + (ROW.strip() + b",") * (PIECE_BYTES // len(ROW)) + ROW.strip() + b"]"
    body = upload(client, gzip.compress(large), filename="large.json.gz").json()
    return f"/v1/files/{body['id']}"


def test_what_befell_its_worker_is_no_verdict_on_a_file(client, services, unread, monkeypatch):
    client.get(unread)
    services.store.claim_chore("w")
    (lease,) = services.store.chore_leases()
    assert services.store.expire_chore(lease, max_failures=1)
    assert client.get(unread).json()["status"] == "uploaded"
    monkeypatch.setattr(chores, "RETRY_FAILED_SECONDS", -1)
    assert client.get(unread).json()["status"] == "uploaded"
    work(services, seconds=0)
    assert client.get(unread).json()["status"] == "uploaded"
    work(services)
    assert client.get(unread).json()["status"] == "processed"


def test_a_file_that_no_try_gets_through_is_an_error(client, services, unread, monkeypatch):
    monkeypatch.setattr(chores, "RETRY_FAILED_SECONDS", -1)
    client.get(unread)
    for _ in range(MOST_TRIES):
        assert client.get(unread).json()["status"] == "uploaded"
        work(services, seconds=0)
    settled = client.get(unread).json()
    assert (settled["status"], "limit" in settled["status_details"]) == ("error", True)


def test_a_verdict_of_long_ago_still_stands(client, services, unread, monkeypatch):
    monkeypatch.setattr(chores, "RETRY_FAILED_SECONDS", -1)
    client.get(unread)
    claim = services.store.claim_chore("w")
    error = {"code": "out_of_memory", "message": "MemoryError", "param": None}
    services.store.fail_chore(claim, error)
    assert client.get(unread).json()["status"] == "error"
    report = client.get(f"{unread}/validation")
    assert (report.json()["status"], report.json()["error"]) == ("failed", error)
    assert "retry-after" not in report.headers
    # As an earlier release kept it, without the error itself.
    with services.store.writing() as session:
        row = session.scalars(select(FileRow)).one()
        row.report = {"status": "failed", "summary": "MemoryError"}
    older = client.get(f"{unread}/validation").json()
    assert (older["status"], older["error"]["message"]) == ("failed", "MemoryError")
