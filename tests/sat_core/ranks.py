"""Ranks of one run, as processes: under torchrun, or forked from a server that has imported torch already.

A rank that torchrun starts imports torch and transformers anew, which takes longer than what most tests have it do.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.forkserver import set_forkserver_preload
from typing import TYPE_CHECKING

import psutil
import torch

from sat_core.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 120
set_forkserver_preload(["sat_core.trainer", "transformers.models.llama.modeling_llama"])


class Torchrun:
    """The program under torchrun, on CPUs."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        command = (
            f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m sat_core train"
        )
        self.ranks = ranks
        self._process = subprocess.Popen(
            [sys.executable, *command.split(), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self._process.pid).children()]

    def codes(self) -> list[int]:
        """How each rank ended; the launcher's words are shown where the test fails."""
        _, words = self._process.communicate(timeout=PATIENCE_S)
        sys.stderr.write(words)
        if self._process.returncode == 0:
            return [0] * self.ranks
        return [int(line.split()[2]) for line in words.splitlines() if "exitcode  :" in line]


class Forked:
    """The same program in processes that are forked."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        context = multiprocessing.get_context("forkserver")
        self._processes = [
            context.Process(target=_train, args=(str(folder), rank, ranks)) for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def codes(self) -> list[int | None]:
        """How each rank ended."""
        for process in self._processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in self._processes]


def join(folder: Path | str, rank: int, ranks: int) -> None:
    """Make this process a rank of a group that meets in `folder`, as one that torchrun started."""
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )


def _train(folder: str, rank: int, ranks: int) -> None:
    join(folder, rank, ranks)
    os._exit(main(["train", folder]))  # as the program itself ends under torchrun
