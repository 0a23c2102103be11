"""One child process and its end. It runs at nice 10 in a session of its own, and lives no longer than this worker.

Three things keep it from being an orphan: its standard input is a pipe whose other end only we hold (it exits on EOF), it
asks the kernel to die with its parent, and whatever it still wrote would be refused by the fence.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.states import Stage

NICENESS = 10
# A step's tensors come back at the next one. By default the C library gives those below 32 MiB back to the kernel in
# between, which costs a step of few threads 1 to 5 %. The peak is the same, but memory stays at it. Of glibc; others do
# not look at it.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a child that reads a stranger's data may use.

    Attributes:
        memory_bytes: of its own writable memory. Mapped libraries do not count, so the bound holds for a CUDA build
            of torch too, which maps many gigabytes and touches few of them.
        file_bytes: of each file that it writes, its log included.
    """

    memory_bytes: int
    file_bytes: int


class Child:
    """`python -P -m sat_core train FOLDER`, or `sat_io` with another command."""

    def __init__(
        self,
        command: str,
        folder: Path,
        *,
        devices: str,
        program: tuple[str, ...] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """Start it.

        Args:
            command: prepare, train, or that of a chore.
            folder: its run folder, also its working directory.
            devices: CUDA_VISIBLE_DEVICES.
            program: what understands `command FOLDER --lifeline`, where it is neither of the two.
            bounds: kept by the kernel, on Linux.
        """
        self.log = folder / "log.txt"
        self.killed = False  # by us, while it ran
        module = "sat_core" if command == Stage.TRAIN else "sat_io"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(program or (sys.executable, "-P", "-m", module)),
                    command,
                    str(folder),
                    "--lifeline",
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={
                    **(KEEP_FREED if command == Stage.TRAIN else {}),
                    **os.environ,
                    # Numbered as NVML numbers them, whose meter is read for the same slot.
                    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                    "CUDA_VISIBLE_DEVICES": devices,
                    "TOKENIZERS_PARALLELISM": "false",
                    # Waiting threads sleep. By default they spin, and at nice 10 on a busy machine they then spend
                    # most of their turns waiting for each other: measured 8 times slower.
                    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                },
                start_new_session=True,
            )
        os.setpriority(os.PRIO_PROCESS, self.process.pid, NICENESS)
        if bounds is not None and sys.platform == "linux":
            # From outside, as it starts: between fork and exec of a process with threads nothing else is safe.
            for what, most in (
                (resource.RLIMIT_DATA, bounds.memory_bytes),
                (resource.RLIMIT_FSIZE, bounds.file_bytes),
                (resource.RLIMIT_CORE, 0),
            ):
                resource.prlimit(self.process.pid, what, (most, most))

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
        self.killed |= self.process.poll() is None
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
