"""Set up .venv: `python3 scripts/install.py local|dev|api|worker`.

Torch first and by itself - the CPU build where there is no NVIDIA driver, the CUDA build where there is one -, then
everything else from a lock with hashes, then this project. One file for all would not do: the CPU build lies on an
index of its own, and a hash for torch in the lock would force PyPI's CUDA build and gigabytes on everybody.

A stamp keyed by what was installed makes the second run a matter of milliseconds. Standard library only, and written so
that an old Python can read it far enough to say that it is too old.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
REQUIREMENTS = ROOT / "requirements"
EXTRAS = ("local", "dev", "api", "worker")
# An extra whose packages all stand in a larger one, at the same versions, is served by it.
CONTAINED_IN = {"local": "dev", "api": "dev", "worker": "dev"}
WITHOUT_TORCH = ("api",)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(argv: list[str]) -> int:
    """Install what is missing; the exit status says whether it worked."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python runs this line, and must be told
        return _refuse(
            f"Python 3.11 or newer is needed; this is {platform.python_version()} at {sys.executable}.\n"
            "Name another one: make demo PYTHON=python3.12"
        )
    extra = argv[0] if argv else "local"
    if extra not in EXTRAS:
        return _refuse(f"unknown set {extra!r}; allowed: {', '.join(EXTRAS)}")
    os.chdir(ROOT)
    if any(
        _stamp(e).is_file() and _stamp(e).read_text() == _key(e)
        for e in (extra, CONTAINED_IN.get(extra, extra))
    ):
        return 0
    started = time.monotonic()
    try:
        _install(extra)
    except subprocess.CalledProcessError as error:
        return _refuse(
            f"this command failed with status {error.returncode}:\n  {' '.join(map(str, error.cmd))}"
        )
    _stamp(extra).write_text(_key(extra))
    _say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


def _install(extra: str) -> None:
    uv = shutil.which("uv")
    _say(f"setting up {VENV.name} for {extra!r} with {'uv' if uv else 'pip'}; later runs skip this")
    _make_venv(uv)
    pip = (
        [uv, "pip", "install", "--python", str(PYTHON)]
        if uv
        else [str(PYTHON), "-m", "pip", "install"]
    )
    pip += ["--quiet"] if uv else ["--quiet", "--disable-pip-version-check", "--no-input"]
    if uv and os.environ.get("PIP_FIND_LINKS"):
        for place in os.environ["PIP_FIND_LINKS"].split():  # uv does not read pip's settings
            pip += ["--find-links", place]
    if extra not in WITHOUT_TORCH:
        _install_torch(pip, uv=bool(uv))
    _say(f"2/3 everything else, from requirements/{extra}.lock")
    _run([*pip, "--require-hashes", "--no-deps", "-r", str(REQUIREMENTS / f"{extra}.lock")])
    _say("3/3 this project")
    # The locks of `local` and `dev` hold the build backend, so nothing is fetched unhashed to build with.
    isolation = ["--no-build-isolation"] if extra in ("local", "dev") else []
    _run([*pip, "--no-deps", *isolation, "-e", "."])


def _make_venv(uv: str | None) -> None:
    if not PYTHON.exists():
        command = (
            [uv, "venv", "--quiet", "--python", sys.executable]
            if uv
            else [sys.executable, "-m", "venv"]
        )
        try:
            _run([*command, str(VENV)])
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            _say(
                "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"
            )
            raise
    elif not uv and not _works([str(PYTHON), "-m", "pip", "--version"]):
        _run([str(PYTHON), "-m", "ensurepip", "--upgrade"])  # a venv that uv made has no pip


def _install_torch(pip: list[str], *, uv: bool) -> None:
    pin = _torch_pin()
    if sys.platform == "darwin":
        _say(f"1/3 {pin}")
        _run([*pip, "--no-deps", pin])
    elif _has_nvidia():
        _say(f"1/3 {pin} with CUDA (an NVIDIA driver was found); a few gigabytes")
        _run([*pip, "--require-hashes", "--no-deps", "-r", str(REQUIREMENTS / "torch-cuda.lock")])
    else:
        _say(f"1/3 {pin}, CPU build (no NVIDIA driver was found); about 200 MB")
        _run_cpu_torch(pip, f"{pin}+cpu", uv=uv)


def _run_cpu_torch(pip: list[str], pin: str, *, uv: bool) -> None:
    if not uv:
        # Retries would cost over a minute where that index cannot be reached and a wheel lies at hand.
        _run([*pip, "--retries", "0", "--no-deps", "--extra-index-url", CPU_INDEX, pin])
        return
    # uv gives up when one index of several cannot be reached, so a wheel at hand is tried alone first.
    if "--find-links" in pip and _works([*pip, "--no-deps", "--no-index", pin]):
        return
    _run([*pip, "--no-deps", "--index", CPU_INDEX, pin])


def _has_nvidia() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def _torch_pin() -> str:
    lines = (REQUIREMENTS / "constraints.txt").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith("torch=="))


def _stamp(extra: str) -> Path:
    return VENV / f".satune-{extra}"


def _key(extra: str) -> str:
    names = (
        f"requirements/{extra}.lock",
        "requirements/constraints.txt",
        "pyproject.toml",
        "scripts/install.py",
    )
    state = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names))
    state.update(f"{ROOT} {_has_nvidia()}".encode())
    return state.hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _say(text: str) -> None:
    print(f"[setup] {text}", file=sys.stderr, flush=True)


def _refuse(text: str) -> int:
    _say(text)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
