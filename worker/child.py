"""One child process and its end. It runs at nice 10 in a session of its own, and lives no longer than this worker.

Three things keep it from being an orphan: its standard input is a pipe whose other end only we hold (it exits on EOF), it
asks the kernel to die with its parent, and whatever it still wrote would be refused by the fence.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

CORE = (sys.executable, "-P", "-m", "sat_core")
NICENESS = 10


class Child:
    """`python -P -m sat_core COMMAND FOLDER`."""

    def __init__(
        self, command: str, folder: Path, *, devices: str, program: tuple[str, ...] = CORE
    ) -> None:
        """Start it.

        Args:
            command: prepare or train.
            folder: its run folder, also its working directory.
            devices: CUDA_VISIBLE_DEVICES.
            program: what understands `command FOLDER --lifeline`.
        """
        self.log = folder / "log.txt"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*program, command, str(folder), "--lifeline"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": devices,
                    "TOKENIZERS_PARALLELISM": "false",
                    # Waiting threads sleep. By default they spin, and at nice 10 on a busy machine they then spend
                    # most of their turns waiting for each other: measured 8 times slower.
                    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                },
                start_new_session=True,
            )
        os.setpriority(os.PRIO_PROCESS, self.process.pid, NICENESS)

    def ended(self, wait_seconds: float) -> bool:
        """Whether it has ended, after waiting for it so long at the most."""
        try:
            self.process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_stop(self) -> None:
        """SIGTERM: finish the step, write a checkpoint, leave."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and whatever it started, now."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Let go of the lifeline of a child that has ended."""
        if self.process.stdin:
            self.process.stdin.close()

    def log_end(self, lines: int = 12) -> str:
        """The last lines it wrote, for a report."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return
