"""What a run's GPUs spend, by the meter that they have in them.

A slot's GPUs are one run's alone, so the meter's difference is the run's. The road not taken is power draw times time, or a
data sheet's watts where there is no meter: a CPU, a GPU older than Volta and a virtual GPU have none, and then there is no
figure.
"""

from __future__ import annotations

import logging

import pynvml

log = logging.getLogger(__name__)


class Meter:
    """Counts from now on."""

    def __init__(self, devices: str) -> None:
        """`devices` are GPU numbers, separated by commas, empty for none."""
        self._devices = [int(number) for number in devices.split(",") if number]
        self._begin = self._read()

    def joules(self) -> float | None:
        """What was spent so far; None where a GPU has no meter, or there is no GPU."""
        now = self._read()
        return None if now is None or self._begin is None else now - self._begin

    def _read(self) -> float | None:
        if not self._devices:
            return None
        try:
            pynvml.nvmlInit()
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, self._devices)
            return float(sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles))) / 1000
        except pynvml.NVMLError as error:
            log.info("Energy is not measured: %s", error)
            return None
