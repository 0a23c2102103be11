"""Satune's own processes, started as an operator starts them, on servers of the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from jobs.settings import Settings
from tests.servers import alive, free_port

ROOT = Path(__file__).parents[1]
KEY = "sk-sat-for-tests"
T = TypeVar("T")


def environment(settings: Settings) -> dict[str, str]:
    """SATUNE_* that say what `settings` say."""
    names = (
        "lease_seconds",
        "heartbeat_seconds",
        "sweep_seconds",
        "retry_seconds",
        "grace_seconds",
        "chat_idle_seconds",
    )
    values = {f"SATUNE_{name.upper()}": str(getattr(settings, name)) for name in names}
    values |= {
        "SATUNE_DATA_DIR": str(settings.data_dir),
        "SATUNE_DATABASE_URL": settings.database_url,
    }
    values |= {"SATUNE_BROKER_URL": settings.broker_url or "", "SATUNE_API_KEY": KEY}
    values["SATUNE_MODEL_ROOTS"] = os.pathsep.join(map(str, settings.model_roots))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SATUNE_")}
    # One thread a child: two threads of a tiny model on a busy machine wait for each other more than they compute.
    return {**clean, **values, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Worker:
    """One Celery worker process."""

    def __init__(self, settings: Settings) -> None:
        command = [
            "celery",
            "-A",
            "worker.app",
            "worker",
            "--pool",
            "threads",
            "--without-gossip",
            "--without-mingle",
        ]
        with (settings.data_dir / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *command, "-n", f"w{free_port()}@test"],
                env=environment(settings), cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def children(self) -> list[psutil.Process]:
        """Training and preparing children that live."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for p in found if alive(p)]

    def kill(self) -> None:
        """As the kernel does it when memory is short."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As an operator does it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@contextmanager
def api(settings: Settings) -> Iterator[httpx.Client]:
    """The API on a free port; a client with a key."""
    port = free_port()
    command = [
        "uvicorn",
        "--factory",
        "api.app:create_app",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    with (settings.data_dir / "api.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            env=environment(settings),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30
        ) as client:
            eventually(lambda: _answers(client), seconds=30)
            yield client
    finally:
        process.terminate()
        process.wait(10)


def eventually(question: Callable[[], T], *, seconds: float) -> T:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {seconds} s: {answer!r}")
        time.sleep(0.05)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
