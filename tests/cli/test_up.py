"""`satune up`: one command starts all of it, and nothing of it outlives that command."""

from __future__ import annotations

import signal
import stat
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from tests.cli.running import Up, gone, satune, until, up

if TYPE_CHECKING:
    from pathlib import Path


def test_it_answers_and_the_printed_link_signs_in(service: Up):
    url, link = service.connection["url"], service.connection["dashboard_url"]
    assert httpx.get(f"{url}/healthz").status_code == 200
    with httpx.Client(follow_redirects=True) as browser:
        page = browser.get(link)
        assert page.status_code == 200
        assert "key=" not in str(page.url)
        assert browser.get(f"{url}/").status_code == 200


def test_the_key_can_be_read_by_its_owner_only(service: Up):
    for name in ("connection.json", "api-key"):
        assert stat.S_IMODE((service.data_dir / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(service.data_dir.stat().st_mode) == 0o700


def test_the_key_is_in_no_log(service: Up):
    httpx.get(service.connection["dashboard_url"])
    for log in (service.data_dir / "logs").iterdir():
        assert service.connection["api_key"] not in log.read_text()


def test_a_second_service_on_the_folder_is_refused(service: Up):
    done = satune("up", "--data-dir", str(service.data_dir), "--port", "0")
    assert done.returncode == 2
    assert "already running" in done.stderr
    assert "Stopping" not in done.stderr
    assert service.connection["pid"] == service.process.pid


def test_a_taken_port_is_refused_with_the_way_out(service: Up, tmp_path: Path):
    port = service.connection["url"].rsplit(":", 1)[1]
    done = satune("up", "--data-dir", str(tmp_path), "--port", port)
    assert done.returncode == 2
    assert port in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize("command", [("up",), ("demo", "--up")])
def test_a_port_that_cannot_be_is_a_wrong_option(tmp_path: Path, command: tuple[str, ...]):
    done = satune(*command, "--data-dir", str(tmp_path / "data"), "--port", "99999")
    assert done.returncode == 2
    assert "65535" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_killed_api_is_started_again(service: Up):
    first = service.children()["api"]
    # Younger than ten seconds it would count as one that cannot start.
    until(lambda: psutil.time.time() - first.create_time() > 11)
    first.kill()
    until(lambda: service.children().get("api", first).pid != first.pid)
    url = service.connection["url"]

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    until(answers)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(tmp_path: Path, signal_number: int):
    with up(tmp_path / "data") as service:
        started = psutil.Process(service.process.pid).children(recursive=True)
        assert {"api", "worker", "broker"} <= service.children().keys()
        service.process.send_signal(signal_number)
        assert service.process.wait(60) == 0
        assert gone(started)
        assert not (tmp_path / "data" / "connection.json").exists()


def test_nothing_is_left_where_it_is_killed(tmp_path: Path):
    with up(tmp_path / "data") as service:
        started = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        until(lambda: gone(started))


def test_the_next_start_takes_the_same_key_and_a_given_one_wins(tmp_path: Path):
    with up(tmp_path / "data") as service:
        first = service.connection["api_key"]
    with up(tmp_path / "data", SATUNE_API_KEY="sk-sat-chosen") as service:
        assert service.connection["api_key"] == "sk-sat-chosen"
        url = service.connection["url"]
        for key in (first, "sk-sat-chosen"):
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200


def test_without_redis_on_the_path_the_bundled_broker_serves(tmp_path: Path):
    with up(tmp_path / "data", PATH=str(tmp_path)) as service:
        broker = service.children()["broker"]
        assert "valkey-server" in broker.exe()
        until(
            lambda: "Connected to redis+socket" in (tmp_path / "data/logs/worker.log").read_text()
        )
