"""Uploads: checked row by row while they arrive, whole or not there."""

from __future__ import annotations

import pytest

from .conftest import ROW, create, upload


def left_behind(services) -> list[str]:
    return sorted(path.name for path in services.artifacts.files.iterdir())


def test_a_good_file_is_stored_whole_with_its_verdict(client, services):
    body = upload(client, ROW * 3).json()
    assert body["object"] == "file"
    assert (body["rows"], body["format"], body["bytes"]) == (3, "messages", 3 * len(ROW))
    assert body["status"] == "processed"
    assert left_behind(services) == [body["id"]]
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
        ({"expires_after[seconds]": "3600"}, "unsupported_parameter"),
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
    assert left_behind(services) == [body["id"]]


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
