"""Jobs from the command line, on a real service: submit, wait, follow, pause, resume, clone; and the exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import ROOT, Up, environment, satune, until
from tests.clients.test_lost_answers import losing
from tests.sat_core.tiny import write_model, write_text

LONG = ("--set", "sat.train.max_steps=100000", "--set", "sat.checkpoints.every=100000")


@pytest.fixture(scope="module")
def work(service: Up, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job file, its data, and a model of its own."""
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "mine")
    write_text(folder / "text.jsonl")
    (folder / "job.yaml").write_text(
        "model: mine\ntraining_file: text.jsonl\nsuffix: cli\n"
        "sat:\n  mode: on\n  omission_rate: {mlp: 0.5}\n  train: {max_steps: 12, max_seq_len: 32, learning_rate: 1e-3}\n"
        "  eval: {every: 4, forgetting_sequences: 0}\n"
    )
    return folder


@pytest.fixture(scope="module")
def done(service: Up, work: Path) -> dict[str, Any]:
    """A job that has succeeded."""
    started = service.run("submit", str(work / "job.yaml"), "--no-watch")
    assert started.returncode == 0, started.stderr
    assert "60 rows of format text" in started.stderr
    waited = service.run("wait", started.stdout.strip(), "--json")
    assert waited.returncode == 0, waited.stderr
    (line,) = waited.stdout.splitlines()
    return json.loads(line)


def started(service: Up, work: Path, *options: str) -> str:
    """A job that is not waited for."""
    made = service.run("submit", str(work / "job.yaml"), "--no-watch", *options)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def running(service: Up, job_id: str) -> bool:
    return json.loads(service.run("show", job_id, "--json").stdout)["status"] == "running"


def test_what_a_job_was_told_is_a_job_file(service: Up, work: Path, done: dict[str, Any]) -> None:
    shown = service.run("show", done["id"], "--config")
    assert shown.returncode == 0, shown.stderr
    (work / "again.yaml").write_text(shown.stdout)
    made = service.run("submit", str(work / "again.yaml"), "--no-watch")
    assert made.returncode == 0, made.stderr
    first, again = (
        json.loads(service.run("show", job, "--config", "--json").stdout)
        for job in (done["id"], made.stdout.strip())
    )
    assert again["body"] == first["body"]
    assert first["resolved"]["total_steps"] == 12
    assert first["hardware"]["device"] == "cpu"
    assert [(f["filename"], len(f["sha256"])) for f in first["files"]] == [("text.jsonl", 64)]


def test_a_job_file_brings_its_data_and_its_model_along(service: Up, done: dict[str, Any]) -> None:
    assert (done["status"], done["model"]) == ("succeeded", "local/mine")
    assert done["sat"]["mode"] == "on"
    assert done["progress"]["total_steps"] == 12
    assert (service.data_dir / "models" / "mine" / "config.json").is_file()
    shown = service.run("show", done["id"])
    assert f"{done['id']} succeeded" in shown.stdout
    assert "held-out loss" in shown.stdout
    listed = json.loads(service.run("list", "--status", "succeeded", "--json").stdout)
    assert done["id"] in {job["id"] for job in listed}


def test_logs_tell_all_events_in_order_or_the_last(service: Up, done: dict[str, Any]) -> None:
    followed = service.run("logs", "-f", done["id"], "--json")
    assert followed.returncode == 0
    events = [json.loads(line) for line in followed.stdout.splitlines()]
    assert events[0]["message"] == "Job accepted"
    assert events[-1]["message"].startswith("Succeeded")
    assert len({event["id"] for event in events}) == len(events)
    assert [event["created_at"] for event in events] == sorted(e["created_at"] for e in events)
    last = service.run("logs", done["id"], "--tail", "2")
    lines = last.stdout.splitlines()
    assert len(lines) == 2
    assert "Succeeded" in lines[1]


def test_metrics_are_lines_of_json_or_of_a_table(service: Up, done: dict[str, Any]) -> None:
    found = service.run("metrics", "-f", done["id"], "--json")
    assert found.returncode == 0
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert {row["step"] for row in rows if row["eval_loss"] is not None} == {0, 4, 8, 12}
    table = service.run("metrics", done["id"], "--after", "10", "--keys", "step,loss")
    header, *lines = table.stdout.splitlines()
    assert header.split() == ["step", "loss"]
    assert [line.split()[0] for line in lines] == ["11", "12"]
    refused = service.run("metrics", done["id"], "--keys", "los")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "eval_loss" in refused.stderr


def test_following_a_run_misses_nothing_that_is_told_meanwhile(service: Up, work: Path) -> None:
    job_id = started(service, work, "--set", "sat.train.max_steps=300")
    rows = [
        json.loads(line)
        for line in service.run("metrics", "-f", job_id, "--json").stdout.splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(301))
    assert {row["step"] for row in rows if row["eval_loss"] is not None} == set(range(0, 301, 4))
    told = service.run("logs", "-f", job_id, "--json").stdout
    assert told.count("held-out loss") == 76


def test_a_run_can_be_paused_resumed_waited_for_in_vain_and_cancelled(
    service: Up, work: Path
) -> None:
    job_id = started(service, work, *LONG)
    until(lambda: running(service, job_id))
    late = service.run("wait", job_id, "--timeout", "0.5")
    assert (late.returncode, late.stdout) == (124, "")
    assert job_id in late.stderr
    assert service.run("pause", job_id).returncode == 0
    until(lambda: "paused" in service.run("show", job_id).stdout)
    assert service.run("resume", job_id, "--json").returncode == 0
    until(lambda: running(service, job_id))
    cancelled = service.run("cancel", job_id)
    assert cancelled.returncode == 0
    assert cancelled.stdout.startswith(job_id)
    waited = service.run("wait", job_id)
    assert (waited.returncode, waited.stdout) == (3, f"{job_id} cancelled\n")
    assert service.run("logs", "-f", job_id).returncode == 3
    for command in ("pause", "resume"):
        refused = service.run(command, job_id)
        assert (refused.returncode, refused.stdout) == (7, "")


def test_ctrl_c_leaves_the_job_running_and_says_so(service: Up, work: Path) -> None:
    job_id = started(service, work, *LONG)
    for command in (
        ["wait", job_id, job_id], ["logs", "-f", job_id], ["watch", job_id],
        ["metrics", job_id, "-f", "--keys", "step,loss"],
    ):  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-m", "cli.main", *command],
            env=environment(SATUNE_DATA_DIR=str(service.data_dir)), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as looking:  # fmt: skip
            until(lambda: running(service, job_id))
            until(lambda pid=looking.pid: _listens(pid))
            looking.send_signal(signal.SIGINT)
            _, said = looking.communicate(timeout=60)
        assert looking.returncode == 130, said
        assert f"`satune {' '.join(command)}`" in said
    assert running(service, job_id)
    service.run("cancel", job_id)
    assert service.run("wait", job_id).returncode == 3


def _listens(pid: int) -> bool:
    """Whether a process has come so far that it holds a connection."""
    import psutil

    return bool(psutil.Process(pid).net_connections(kind="tcp"))


def test_validate_takes_the_folder_of_a_model(service: Up, work: Path) -> None:
    told = service.run("validate", str(work / "text.jsonl"), "--model", str(work / "mine"))
    assert told.returncode == 0, told.stderr
    assert "are trained on" in told.stdout


def test_a_failed_job_is_1_and_the_first_that_did_not_succeed_decides(
    service: Up, work: Path, done: dict[str, Any]
) -> None:
    failed = service.run("clone", done["id"], "--set", "sat.data.format=alpaca")
    assert failed.returncode == 1
    assert "line 1" in failed.stdout
    made = json.loads(service.run("list", "--limit", "1", "--json").stdout)[0]["id"]
    both = service.run("wait", done["id"], made)
    assert both.returncode == 1
    assert both.stdout.split() == [done["id"], "succeeded", made, "failed"]
    assert service.run("wait", made, "--json").returncode == 1
    assert f"{made} failed: text.jsonl, line 1" in service.run("show", made).stdout


def test_a_clone_changes_what_is_said_and_keeps_the_rest(
    service: Up, work: Path, done: dict[str, Any]
) -> None:
    held = work / "held.jsonl"
    write_text(held, documents=10)
    made = service.run(
        "clone", done["id"], "--set", "sat.train.max_steps=2", "--set", "sat.eval=null", "--mlp", "0.25",
        "--suffix", "again", "--validation", str(held), "--no-watch", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    clone = json.loads(made.stdout)
    assert clone["training_file"] == done["training_file"]
    assert clone["validation_file"] is not None
    assert clone["user_provided_suffix"] == "again"
    assert clone["sat"]["omission_rate"]["mlp"] == 0.25
    assert clone["sat"]["train"]["max_steps"] == 2
    assert clone["sat"]["train"]["learning_rate"] == done["sat"]["train"]["learning_rate"]
    assert clone["sat"]["eval"]["every"] is None
    assert service.run("wait", clone["id"]).returncode == 0


def test_mixed_files_weigh_as_their_rows_do(service: Up, work: Path) -> None:
    write_text(work / "more.jsonl", documents=30)
    text = (work / "job.yaml").read_text() + "  data: {mix: [{file: more.jsonl, weight: auto}]}\n"
    (work / "mixed.yaml").write_text(text)
    made = service.run("submit", str(work / "mixed.yaml"), "--no-watch", "--json")
    assert made.returncode == 0, made.stderr
    job = json.loads(made.stdout)
    assert [entry["weight"] for entry in job["sat"]["data"]["mix"]] == [0.5]
    assert service.run("wait", job["id"]).returncode == 0


def test_a_refused_job_leaves_no_file_behind(service: Up, work: Path) -> None:
    before = sorted((service.data_dir / "files").iterdir())
    write_text(work / "other.jsonl", documents=7)
    refused = service.run(
        "submit", str(work / "job.yaml"), "-d", str(work / "other.jsonl"), "--mlp", "1.5"
    )
    assert refused.returncode == 2
    assert "sat.omission_rate.mlp" in refused.stderr
    assert sorted((service.data_dir / "files").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training_file": "none.jsonl"}, "none.jsonl"),
        ({"training_file": "org/dataset"}, "downloaded first"),
        ({"model": "./nothing"}, "config.json"),
        ({"model": None}, "--model"),
        ({"training_file": None}, "--dataset"),
        ({"sat": {"data": {"mix": [{"file": "file-1", "weight": "auto"}]}}}, "weight"),
    ],
)
def test_what_a_job_file_lacks_is_named(
    service: Up, work: Path, change: dict[str, Any], named: str
) -> None:
    body = {"model": "mine", "training_file": "text.jsonl", **change}
    (work / "lacking.json").write_text(json.dumps(body))
    refused = service.run("submit", str(work / "lacking.json"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert named in refused.stderr


def test_another_model_of_the_same_name_is_not_overwritten(
    service: Up, work: Path, done: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path / "mine")
    (tmp_path / "mine" / "more.txt").write_text("more")
    refused = service.run("submit", str(work / "job.yaml"), "-m", str(tmp_path / "mine"))
    assert refused.returncode == 2
    assert "another model" in refused.stderr
    elsewhere = satune(
        "submit", str(work / "job.yaml"),
        SATUNE_URL=service.connection["url"], SATUNE_API_KEY=service.connection["api_key"],
    )  # fmt: skip
    assert elsewhere.returncode == 2
    assert "SATUNE_MODEL_ROOTS" in elsewhere.stderr


def test_a_lost_answer_makes_one_job(service: Up, work: Path, done: dict[str, Any]) -> None:
    def ids() -> set[str]:
        return {job["id"] for job in json.loads(service.run("list", "--json").stdout)}

    before = ids()
    connection = service.connection
    with losing(connection["url"], b"/v1/fine_tuning/jobs", 2) as (proxied, lost):
        made = satune(
            "submit", str(work / "job.yaml"), "-m", "local/mine", "--no-watch",
            SATUNE_URL=proxied, SATUNE_API_KEY=connection["api_key"],
        )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert len(lost) == 2
    assert ids() - before == {made.stdout.strip()}
    assert service.run("wait", made.stdout.strip()).returncode == 0


def test_a_shell_completes_jobs_and_commands(service: Up, done: dict[str, Any]) -> None:
    def completed(words: str) -> list[str]:
        settings = {
            "_SATUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "SATUNE_DATA_DIR": str(service.data_dir),
        }
        program = Path(sys.executable).with_name("satune")
        found = subprocess.run(
            [program],
            env=environment(**settings),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.split()

    assert completed("satune me") == ["metrics"]
    assert done["id"] in completed("satune logs ftjob-")
