"""Files through the whole service: every one gets its verdict, and none harms the service.

API, worker and broker are processes as in the field, and so is PostgreSQL. The larger collection of bad inputs comes from a
generator that is not part of the project; where it is absent its test says so and skips. The most telling of its
cases, and some of our own, are made here.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.settings import Settings
from tests.conftest import migrated
from tests.sat_core.tiny import write_model
from tests.service import Worker, api, eventually

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GENERATOR = SHARED / "bad_inputs" / "make_bad_inputs.py"
MODEL = "local/tiny"
ROW = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]}
LONG = {
    "messages": [
        {"role": "user", "content": "a " * 200},
        {"role": "assistant", "content": "c"},
    ]
}


def lines(*rows: Any) -> bytes:
    return b"".join((json.dumps(row) + "\n").encode() for row in rows)


def parquet(**columns: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


GOOD = lines(ROW, ROW)
# Name, bytes, and the code of the first thing that is wrong; None is a file that is right.
CASES: dict[str, tuple[bytes, str | None]] = {
    "good.jsonl": (GOOD, None),
    "no-end.jsonl": (GOOD[:-1], None),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD, None),
    "packed.jsonl.gz": (gzip.compress(GOOD), None),
    "nul-escaped.jsonl": (GOOD.replace(b"a b", b"a\\u0000b"), None),
    "empty.jsonl": (b"", "empty_file"),
    "bom-alone.jsonl": (b"\xef\xbb\xbf", "empty_file"),
    "half-a-row.jsonl": (GOOD[:-9], "bad_json"),
    "latin1.jsonl": (GOOD.replace(b"a b", b"\xe9"), "not_utf8"),
    "utf-16.jsonl": (GOOD.decode().encode("utf-16"), "unknown_format"),
    "nul.jsonl": (GOOD + b"\0" * 4096, "bad_json"),
    "deep.jsonl": (b"[" * 100_000 + b"]" * 100_000, "bad_json"),
    "integer.jsonl": (b'{"text": ' + b"9" * 6000 + b"}\n", "bad_json"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "not_utf8"),
    "role.jsonl": (GOOD.replace(b"assistant", b"bot"), "bad_role"),
    "no-answer.jsonl": (lines({"messages": [ROW["messages"][0]]}), "no_assistant"),
    "preferences.jsonl": (lines({"prompt": "a", "chosen": "b", "rejected": "c"}), "unknown_format"),
    "turning.jsonl": (GOOD + lines({"text": "x"}), "mixed_formats"),
    "half.jsonl.gz": (gzip.compress(GOOD)[:-9], "bad_gzip"),
    "bomb.jsonl.gz": (gzip.compress(b"0" * 2**27), "too_long"),
    "zip.jsonl": (b"PK\x03\x04" + b"x" * 600, "unknown_format"),
    "page.jsonl": (b"<!DOCTYPE html><html></html>", "unknown_format"),
    "pickle.jsonl": (b"\x80\x04\x95" + b"." * 80, "not_utf8"),
    "ragged.csv": (b"prompt,completion\na\nb,c,d\n", "bad_csv"),
    "quote.csv": (b'prompt,completion\na,"b\n' + b"c,d\n" * 9, "bad_csv"),
    "words.parquet": (GOOD, "bad_parquet"),
    "frame.parquet": (b"PAR1" + b"\0" * 60 + b"\x08\0\0\0PAR1", "bad_parquet"),
    "row.parquet": (parquet(prompt=["a", "b"], completion=["c", ""]), "empty_content"),
    "good.parquet": (parquet(prompt=["a", "b"], completion=["c", "d"]), None),
}


class Service:
    """The running service, and what a test asks of it."""

    def __init__(self, client: httpx.Client, worker: Worker, settings: Settings) -> None:
        self.client, self.worker, self.settings = client, worker, settings

    def upload(self, content: bytes, name: str, **fields: str) -> httpx.Response:
        return self.client.post(
            "/v1/files",
            data={"purpose": "fine-tune", "sat[keep_invalid]": "true", **fields},
            files={"file": (name, content)},
        )

    def ask(self, file_id: str, what: str = "validation", **params: Any) -> dict[str, Any]:
        """The answer once it is no longer pending."""

        def answered() -> dict[str, Any] | None:
            response = self.client.get(f"/v1/files/{file_id}/{what}", params={"wait": 20, **params})
            assert response.status_code == 200, response.text
            body = dict(response.json())
            return body if body["status"] != "pending" else None

        return eventually(answered, seconds=600) or {}


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broker_url: str
) -> Iterator[Service]:
    """API and worker, with a tiny model."""
    data_dir = tmp_path_factory.mktemp("service")
    write_model(data_dir / "models" / "tiny")
    url = migrated("postgresql", request, data_dir)
    settings = Settings(
        data_dir=data_dir, database_url=url, broker_url=broker_url, sweep_seconds=0.3
    )
    worker = Worker(settings)
    try:
        with api(settings) as client:
            yield Service(client, worker, settings)
    finally:
        worker.stop()


def test_a_report_says_what_would_be_trained_on(service: Service) -> None:
    file = service.upload(lines(ROW, ROW, LONG), "data.jsonl").json()
    other = service.upload(lines(ROW), "other.jsonl").json()
    plain = service.ask(file["id"])
    assert (plain["status"], plain["rows"], plain["duplicates"]) == ("valid_with_warnings", 3, 1)
    assert (plain["tokens"], plain["format"], plain["encoding"]) == (None, "messages", "utf-8")
    report = service.ask(file["id"], model=MODEL, against=other["id"])
    assert report["status"] == "valid_with_warnings"
    assert report["overlap_with"] == {"file_id": other["id"], "rows": 2}
    assert (report["truncated_rows"], report["empty_targets"], report["seq_len"]) == (1, 1, 64)
    assert report["tokens"]["per_row"]["max"] == 205
    assert 0 < report["tokens"]["trained"] < report["tokens"]["total"]
    longer = service.client.get(
        f"/v1/files/{file['id']}/validation", params={"model": MODEL, "max_seq_len": 999}
    )
    assert longer.json()["error"]["param"] == "sat.train.max_seq_len"


def test_a_preview_shows_rows_as_the_model_sees_them(service: Service) -> None:
    file = service.upload(lines(ROW, LONG), "data.jsonl").json()
    preview = service.ask(file["id"], "preview", model=MODEL, rows=2)
    first, second = preview["rows"]
    assert (preview["status"], first["row"], first["format"]) == ("ready", 1, "messages")
    assert [(s["kind"], s["text"]) for s in first["spans"]][-1] == ("trained", "c d <eos>")
    assert second["spans"][-1]["kind"] == "truncated"
    assert len(first["ids"]) == first["spans"][-1]["end"] == len(first["tokens"])
    # A row with a NUL in it is legal, and no database keeps one.
    nul = service.upload(lines(ROW).replace(b"a b", b"a\\u0000b"), "nul.jsonl").json()
    assert service.ask(nul["id"], "preview", model=MODEL)["status"] == "ready"


def test_a_file_without_a_trained_token_is_refused_for_a_job(service: Service) -> None:
    file = service.upload(lines(LONG, LONG), "long.jsonl").json()
    body = {"model": MODEL, "training_file": file["id"]}
    report = service.ask(file["id"], model=MODEL)
    assert report["status"] == "invalid"
    assert [e["code"] for e in report["errors"]] == ["no_trained_tokens"]
    refused = service.client.post("/v1/fine_tuning/jobs", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (
        400,
        "dataset_invalid",
        "training_file",
    )
    assert error["problems"][0]["code"] == "no_trained_tokens"
    # With other settings it is another question.
    body["sat"] = {"train": {"train_on": "all"}}
    assert service.client.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_a_hostile_template_costs_its_own_report_and_nothing_else(service: Service) -> None:
    models = service.settings.data_dir / "models"
    for name, template in (
        ("attack", "{{ ''.__class__.__mro__ }}"),
        ("flood", "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"),
        ("broken", "{{ unclosed "),
        ("grow", "{% set x = 'y' * (10 ** 11) %}{{ x }}"),
    ):
        shutil.copytree(models / "tiny", models / name)
        (models / name / "chat_template.jinja").write_text(template)
    file = service.upload(GOOD, "data.jsonl").json()
    for name in ("attack", "flood", "broken", "grow"):
        report = service.ask(file["id"], model=f"local/{name}")
        assert report["status"] in ("invalid", "failed"), report
        told = report["errors"][0]["message"] if report["errors"] else report["error"]["message"]
        assert "Traceback" not in told
        assert len(told) < 3000
        assert service.ask(file["id"], "preview", model=f"local/{name}")["status"] == "failed"
    assert service.ask(file["id"], model=MODEL)["status"].startswith("valid")


def test_every_bad_input_of_ours_gets_its_verdict(service: Service) -> None:
    verdicts = {}
    for name, (content, _) in CASES.items():
        response = service.upload(content, name)
        assert response.status_code == 200, (name, response.text)
        report = service.ask(response.json()["id"])
        verdicts[name] = report["errors"][0]["code"] if report["errors"] else None
        assert (report["status"] == "invalid") == bool(report["errors"]), (name, report)
        status = service.client.get(f"/v1/files/{response.json()['id']}").json()["status"]
        assert status == ("error" if report["errors"] else "processed"), name
    assert verdicts == {name: code for name, (_, code) in CASES.items()}
    for name, (content, code) in CASES.items():
        response = service.upload(content, name, **{"sat[keep_invalid]": "false"})
        # Parquet is judged by a worker, so its row is refused by then and not at the door.
        if code is None or name == "row.parquet" or name == "frame.parquet":
            continue
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "dataset_invalid"), name
        assert error["problems"][0]["code"] == code


@pytest.mark.slow
@pytest.mark.skipif(not GENERATOR.exists(), reason="the shared bad inputs are not here")
@pytest.mark.skipif(
    not os.environ.get("SATUNE_ALL_BAD_INPUTS"),
    reason="takes minutes; SATUNE_ALL_BAD_INPUTS=1 runs it",
)
def test_every_shared_bad_input_gets_its_verdict(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    subprocess.run([sys.executable, GENERATOR, folder, "--big"], check=True, capture_output=True)
    shutil.copytree(
        SHARED / "models" / "stories260k-llama", service.settings.data_dir / "models" / "stories"
    )
    wrong = []
    before = psutil.Process(service.worker.process.pid).memory_info().rss
    for case in json.loads((folder / "EXPECTED.json").read_text("utf-8")):
        path = folder / case["file"]
        response = service.upload(path.read_bytes(), path.name)
        if response.status_code != 200:
            if response.status_code >= 500 or case["expect"] == "accept":
                wrong.append(f"{case['file']}: {response.status_code} {response.text[:300]}")
            continue
        if case["file"].startswith("names/"):
            # Only their names are odd, and those have arrived.
            assert response.json()["rows"] == case["rows"] or path.suffix == ".txt", case["file"]
            continue
        report = service.ask(response.json()["id"], model="local/stories")
        told = " ".join(e["message"] for e in report["errors"][:3])
        if case["expect"] == "accept" and (
            report["status"] not in ("valid", "valid_with_warnings")
            or report["rows"] != case["rows"]
        ):
            wrong.append(f"{case['file']}: {report['status']}, {report['rows']} rows: {told}")
        if case["expect"] == "reject" and report["status"] != "invalid":
            wrong.append(f"{case['file']} ({case['why']}): {report['status']}")
        if report["status"] == "failed":
            wrong.append(f"{case['file']}: {report['error']}")
        if report["status"] == "invalid" and not told:
            wrong.append(f"{case['file']}: refused without a word")
    assert not wrong, "\n".join(wrong)
    # Nothing is left but the files, and the worker has not grown with what it read.
    assert list((service.settings.data_dir / "chores").iterdir()) == []
    assert psutil.Process(service.worker.process.pid).memory_info().rss - before < 200 * 2**20
