"""What this host can run at the same time: CPU slots for `prepare`, GPU slots for `train`.

On a machine without a GPU one slot stands for it. A claim is made only with a slot in hand, so that a claimed job runs.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import pynvml

from jobs.states import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """A right to run one child; `devices` is its CUDA_VISIBLE_DEVICES, empty for none."""

    stage: Stage
    devices: str


class Slots:
    """The free slots of the host; safe for threads."""

    def __init__(self, *, cpu_slots: int, gpus: int) -> None:
        training = [Slot(Stage.TRAIN, str(i)) for i in range(gpus)] or [Slot(Stage.TRAIN, "")]
        self._free = [Slot(Stage.PREPARE, "") for _ in range(cpu_slots)] + training
        self._lock = threading.Lock()
        self.total = {Stage.PREPARE.value: cpu_slots, Stage.TRAIN.value: len(training)}

    def take(self, stage: Stage) -> Slot | None:
        """A free slot of a stage, now yours; None where there is none."""
        with self._lock:
            found = next((s for s in self._free if s.stage is stage), None)
            if found:
                self._free.remove(found)
            return found

    def free(self, stage: Stage) -> bool:
        """Whether a slot of the stage is free."""
        with self._lock:
            return any(slot.stage is stage for slot in self._free)

    def give(self, slot: Slot) -> None:
        """Put a slot back."""
        with self._lock:
            self._free.append(slot)


def hardware() -> dict[str, Any]:
    """What a run here computes on: `device`, `name`, `memory_bytes` of one of its kind, and the `host`."""
    host = socket.gethostname()
    try:
        pynvml.nvmlInit()
        if pynvml.nvmlDeviceGetCount():
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            name = str(pynvml.nvmlDeviceGetName(handle))
            return {"device": "gpu", "name": name, "memory_bytes": memory, "host": host}
    except pynvml.NVMLError as error:
        log.info("No GPU is used: %s", error)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": "cpu", "name": "cpu", "memory_bytes": memory, "host": host}


def count_gpus() -> int:
    """NVIDIA GPUs of this host, without loading CUDA."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
