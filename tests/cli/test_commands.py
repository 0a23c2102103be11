"""What the commands print where, and with which status they end."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client, Connection
from jobs.settings import Settings
from tests.cli.running import ROOT, Up, environment, satune
from tests.conftest import migrated
from tests.service import KEY, api

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    (tmp_path / "data.jsonl").write_text(ROW * 4)
    return str(tmp_path / "data.jsonl")


def test_without_a_server_the_status_is_6_and_the_way_out_is_named(tmp_path: Path):
    done = satune("list", "--data-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (6, "")
    assert "satune up" in done.stderr
    done = satune("list", SATUNE_URL="http://127.0.0.1:9", SATUNE_API_KEY="x")
    assert (done.returncode, done.stdout) == (6, "")


def test_a_server_without_a_key_is_2_and_no_other_server_is_asked(service: Up):
    done = satune("list", SATUNE_URL="http://127.0.0.1:9", SATUNE_DATA_DIR=str(service.data_dir))
    assert (done.returncode, done.stdout) == (2, "")
    assert "SATUNE_API_KEY" in done.stderr
    examined = satune("doctor", "--json", SATUNE_URL="http://127.0.0.1:9")
    (server,) = (check for check in json.loads(examined.stdout) if check["name"] == "server")
    assert (server["ok"], "SATUNE_API_KEY" in server["found"]) == (False, True)


def test_a_status_that_no_job_has_is_named(service: Up):
    assert "No job is paused." in service.run("list", "--status", "paused").stderr


def test_a_wrong_key_is_5(service: Up):
    done = satune("list", SATUNE_URL=service.connection["url"], SATUNE_API_KEY="sk-sat-wrong")
    assert (done.returncode, done.stdout) == (5, "")
    # Alone it goes before the one that `satune up` has left.
    done = satune("list", SATUNE_DATA_DIR=str(service.data_dir), SATUNE_API_KEY="sk-sat-wrong")
    assert (done.returncode, done.stdout) == (5, "")


def test_an_unknown_job_is_4(service: Up):
    for command in ("watch", "cancel"):
        assert service.run(command, "ftjob-000000000000000000000000").returncode == 4


def test_a_wrong_option_and_a_setting_without_a_value_are_2(service: Up, dataset: str):
    assert satune("submit", "--no-such-option").returncode == 2
    done = service.run("submit", "-m", "local/x", "-d", dataset, "--set", "sat.train.max_steps")
    assert done.returncode == 2
    assert "--set" in done.stderr


def test_a_broken_row_is_2_and_named_by_its_line(service: Up, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text(ROW + "{broken\n" + ROW)
    done = service.run("submit", "-m", "local/x", "-d", str(tmp_path / "bad.jsonl"))
    assert done.returncode == 2
    assert "line 2" in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--mlp", "1.0"], "sat.omission_rate.mlp"),
        (["--mlp", "-1"], "sat.omission_rate.mlp"),
        (["--set", "sat.importance.metric=magic"], "maxip"),
        (["--set", "sat.train.max_step=3"], "max_steps"),
    ],
)
def test_a_refused_setting_is_2_and_the_message_names_it(
    service: Up, dataset: str, options: list[str], named: str
):
    before = json.loads(service.run("list", "--json").stdout)
    done = service.run("submit", "-m", "org/model", "-d", dataset, *options)
    assert done.returncode == 2
    assert named in done.stderr
    assert json.loads(service.run("list", "--json").stdout) == before


def test_a_file_that_is_not_here_is_2_and_a_model_that_is_not_there_is_4(service: Up, dataset: str):
    assert service.run("submit", "-m", "local/x", "-d", "/no/such/file").returncode == 2
    for asked in (
        ("submit", "-m", "local/nothing", "-d", dataset),
        ("validate", dataset, "-m", "local/nothing"),
        ("chat", "local/nothing", "hi"),
    ):
        done = service.run(*asked)
        assert (done.returncode, "local/nothing" in done.stderr) == (4, True)


def test_doctor_speaks_json_on_standard_output(service: Up):
    done = service.run("doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["server"]["ok"]
    assert found["torch"]["ok"]


def test_brackets_in_a_message_are_shown_and_not_taken_for_style(tmp_path: Path):
    done = satune("list", "--data-dir", str(tmp_path / "[red]odd[/nothing]"))
    assert done.returncode == 6
    assert "[red]odd[/nothing]" in done.stderr


def test_an_estimate_makes_no_job_and_says_what_one_would_fail_of(service: Up, tmp_path: Path):
    from tests.sat_core.tiny import write_model, write_text

    write_model(Path(service.connection["data_dir"]) / "models" / "guess")
    data = write_text(tmp_path / "text.jsonl")
    asked = ("estimate", "-m", "local/guess", "-d", str(data), "--mlp", "0.5")
    before = service.run("list", "--json").stdout
    done = service.run(*asked, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "ready"
    assert "of" in service.run(*asked).stdout
    refused = service.run(*asked, "--set", "sat.train.max_seq_len=4096")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "max_seq_len" in refused.stderr
    failing = service.run(*asked, "--set", "sat.data.format=alpaca")
    assert (failing.returncode, failing.stdout) == (1, "")
    assert "line 1" in failing.stderr
    assert service.run("list", "--json").stdout == before


def test_validate_prints_the_verdict_and_leaves_no_file(service: Up, tmp_path: Path, dataset: str):
    before = set((service.data_dir / "files").iterdir())
    good = service.run("validate", dataset, "--against", dataset)
    assert good.returncode == 0, good.stderr
    assert "4 of format messages" in good.stdout
    assert "4 of 4 rows stand in the other file too" in good.stdout
    bad = tmp_path / "bad.jsonl"
    bad.write_text(ROW + "{broken\n" + ROW)
    told = service.run("validate", str(bad))
    assert told.returncode == 2
    assert f"{bad}:2: bad_json" in told.stdout
    report = json.loads(service.run("validate", str(bad), "--json").stdout)
    assert (report["status"], report["errors"][0]["line"]) == ("invalid", 2)
    assert service.run("validate", str(tmp_path / "none.jsonl")).returncode == 2
    assert service.run("validate", dataset, "--model", "local/none").returncode == 4
    assert set((service.data_dir / "files").iterdir()) == before


def test_where_no_worker_lives_nothing_waits_for_one(
    tmp_path: Path, dataset: str, request: pytest.FixtureRequest
):
    url = migrated("sqlite", request, tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text('{"model_type": "llama"}')
    roots = (tmp_path / "models",)
    with api(Settings(data_dir=tmp_path, database_url=url, model_roots=roots)) as client:
        at = {"SATUNE_URL": str(client.base_url), "SATUNE_API_KEY": KEY}
        for asked in (("validate", dataset), ("estimate", "-m", "local/m", "-d", dataset)):
            done = satune(*asked, **at)
            assert (done.returncode, done.stdout) == (7, ""), done.stderr
            assert "No worker" in done.stderr
        assert client.get("/v1/files").json()["data"] == []


def test_a_server_that_does_not_hold_an_answer_back_is_asked_now_and_then():
    asked: list[float] = []

    class Hasty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said: dict[str, Any] = {"workers": {"slots": {"prepare": 1}}}
            if "validation" in self.path:
                asked.append(time.monotonic())
                said = {"status": "pending" if len(asked) < 3 else "valid"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hasty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(Connection(url=f"http://127.0.0.1:{server.server_port}", api_key="x"))
        assert client.validation("file-1")["status"] == "valid"
        server.shutdown()
    assert min(later - first for first, later in itertools.pairwise(asked)) > 0.4


def test_an_option_that_the_server_refuses_is_2_with_one_line(service: Up):
    done = service.run("list", "--status", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'nonsense'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_1_with_one_line(service: Up):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "doctor", "--json"],
            env=environment(SATUNE_DATA_DIR=str(service.data_dir)), cwd=ROOT,
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error [Errno 28]")
