"""Set up .venv: `python3 scripts/install.py local|dev|api|worker|clients`.

Torch first and by itself - the CPU build where there is no NVIDIA driver, the CUDA build where there is one -, then
everything else from a lock with hashes, then this project. One file for all would not do: the CPU build lies on an
index of its own, and a hash for torch in the lock would force PyPI's CUDA build and gigabytes on everybody.

`clients` are the versions of OpenAI's client that the tests drive, each in an environment of its own below .venv; the one
for Node is left out where there is no npm or it fails, and its tests then say so.

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
CLIENTS = VENV / "clients"
REQUIREMENTS = ROOT / "requirements"
CLIENT_LOCKS = sorted((REQUIREMENTS / "clients").glob("*.lock"))
NODE_CLIENT = [ROOT / "tests" / "clients" / f"package{part}.json" for part in ("", "-lock")]
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
    allowed = (*EXTRAS, "clients")
    wanted = argv or ["local"]
    for name in wanted:
        if name not in allowed:
            return _refuse(f"unknown set {name!r}; allowed: {', '.join(allowed)}")
    os.chdir(ROOT)
    return int(any(_set_up(name) for name in wanted))  # stops at the first that fails


def _set_up(name: str) -> int:
    if any(
        _stamp(e).is_file() and _stamp(e).read_text() == _key(e)
        for e in (name, CONTAINED_IN.get(name, name))
    ):
        return 0
    started = time.monotonic()
    uv = shutil.which("uv")
    _say(f"setting up {VENV.name} for {name!r} with {'uv' if uv else 'pip'}; later runs skip this")
    try:
        if name == "clients":
            _install_clients(uv)
        else:
            _install(name, uv)
    except subprocess.CalledProcessError as error:
        return _refuse(
            f"this command failed with status {error.returncode}:\n  {' '.join(map(str, error.cmd))}"
        )
    _stamp(name).write_text(_key(name))
    _say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


def _install(extra: str, uv: str | None) -> None:
    pip = _make_venv(VENV, uv)
    if extra not in WITHOUT_TORCH:
        _install_torch(pip, uv=bool(uv))
    _say(f"2/3 everything else, from requirements/{extra}.lock")
    _run([*pip, "--require-hashes", "--no-deps", "-r", str(REQUIREMENTS / f"{extra}.lock")])
    _say("3/3 this project")
    # The locks of `local` and `dev` hold the build backend, so nothing is fetched unhashed to build with.
    isolation = ["--no-build-isolation"] if extra in ("local", "dev") else []
    _run([*pip, "--no-deps", *isolation, "-e", "."])


def _install_clients(uv: str | None) -> None:
    for lock in CLIENT_LOCKS:
        _say(lock.stem)
        pip = _make_venv(CLIENTS / lock.stem, uv)
        _run([*pip, "--require-hashes", "--no-deps", "-r", str(lock)])
    npm = shutil.which("npm")
    if npm is None:
        _say("no npm here: OpenAI's client for Node is left out")
        return
    folder = CLIENTS / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for file in NODE_CLIENT:
        shutil.copy(file, folder)
    _say("openai for Node")
    if not _works(
        [npm, "ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    ):
        _say("npm could not install OpenAI's client for Node; it is left out")


def _make_venv(venv: Path, uv: str | None) -> list[str]:
    """Make the environment where there is none; the command that installs into it."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        command = (
            [uv, "venv", "--quiet", "--python", sys.executable]
            if uv
            else [sys.executable, "-m", "venv"]
        )
        try:
            _run([*command, str(venv)])
        except subprocess.CalledProcessError:
            shutil.rmtree(venv, ignore_errors=True)
            _say(
                "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"
            )
            raise
    elif not uv and not _works([str(python), "-m", "pip", "--version"]):
        _run([str(python), "-m", "ensurepip", "--upgrade"])  # a venv that uv made has no pip
    if not uv:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        return [*pip, "--quiet"]
    pip = [uv, "pip", "install", "--python", str(python), "--quiet"]
    for place in os.environ.get("PIP_FIND_LINKS", "").split():  # uv does not read pip's settings
        pip += ["--find-links", place]
    return pip


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


def _stamp(name: str) -> Path:
    return VENV / f".satune-{name}"


def _key(name: str) -> str:
    if name == "clients":
        files, machine = [*CLIENT_LOCKS, *NODE_CLIENT], shutil.which("npm")
    else:
        locks = [REQUIREMENTS / f"{name}.lock", REQUIREMENTS / "constraints.txt"]
        files, machine = [*locks, ROOT / "pyproject.toml"], _has_nvidia()
    state = hashlib.sha256(b"".join(file.read_bytes() for file in [*files, Path(__file__)]))
    state.update(f"{ROOT} {machine}".encode())
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
