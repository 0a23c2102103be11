"""`satune` as a person starts it: as a process, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.servers import alive, command_of

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120


def satune(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=environment(**settings),
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def environment(**settings: str) -> dict[str, str]:
    """The environment without whatever SATUNE_* the person who runs the tests has set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SATUNE_")}
    return {**clean, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **settings}


@dataclass
class Up:
    """A running `satune up`."""

    data_dir: Path
    process: subprocess.Popen[str]

    @property
    def connection(self) -> dict[str, Any]:
        return json.loads((self.data_dir / "connection.json").read_text())

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command that speaks to this service."""
        return satune(*arguments, SATUNE_DATA_DIR=str(self.data_dir))

    def children(self) -> dict[str, psutil.Process]:
        """The direct children by what they are."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            line = " ".join(command_of(child))
            for name, mark in (("api", "uvicorn"), ("worker", "celery"), ("broker", "broker")):
                if mark in line:
                    found[name] = child
        return found


@contextlib.contextmanager
def up(data_dir: Path, *options: str, **settings: str) -> Iterator[Up]:
    """`satune up` on `data_dir`, once it has said where it is; killed at the end if it still runs."""
    # A shell that runs the tests in the background has them, and all they start, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cli.main",
            "up",
            "--data-dir",
            str(data_dir),
            "--port",
            "0",
            *options,
        ],
        env=environment(**settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        service = Up(data_dir, process)
        until(lambda: (data_dir / "connection.json").exists() or process.poll() is not None)
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def until(happened: Callable[[], object]) -> None:
    """Wait for it; fails after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen in {PATIENCE_S} s"
        time.sleep(0.1)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs."""
    return not any(map(alive, processes))
