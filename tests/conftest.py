"""Databases and brokers that are real: each test that asks for them runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest

# Tiny models gain nothing from a second thread, and several processes of them lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jobs.db import make_engine
from jobs.settings import Settings
from jobs.store import Store
from tests.servers import postgresql, redis_server

# An example that meets a busy moment of the machine is not a slow one.
hypothesis.settings.register_profile("satune", deadline=None)
hypothesis.settings.load_profile("satune")
ROOT = Path(__file__).parents[1]
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of this test run; not below pytest's folder, which every other run closes to other users."""
    with tempfile.TemporaryDirectory(prefix="satune-") as folder, postgresql(Path(folder)) as url:
        yield url


@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis (or Valkey) of this test run."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty, migrated database; empty for SQLite in the data folder."""
    return migrated(request.param, request, tmp_path)


def migrated(kind: str, request: pytest.FixtureRequest, data_dir: Path) -> str:
    """A fresh database of `kind`, its schema made by the migrations."""
    url = ""
    if kind == "postgresql":
        server = request.getfixturevalue("postgres_url")
        name = f"t{os.getpid()}_{next(_numbers)}"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        url = f"{server}/{name}"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "alembic",
            "-c",
            str(ROOT / "migrations/alembic.ini"),
            "upgrade",
            "head",
        ],
        check=True,
        cwd=ROOT,
        env={
            **os.environ,
            "SATUNE_DATA_DIR": str(data_dir),
            "SATUNE_DATABASE_URL": url,
            "PYTHONPATH": str(ROOT),
        },
    )
    return url


@pytest.fixture
def quick(database: str, tmp_path: Path) -> Settings:
    """Settings whose waits are short."""
    return Settings(
        data_dir=tmp_path,
        database_url=database,
        lease_seconds=1.5,
        heartbeat_seconds=0.3,
        sweep_seconds=0.3,
        retry_seconds=0.1,
        grace_seconds=10,
    )


@pytest.fixture
def store(quick: Settings) -> Iterator[Store]:
    """The store on a fresh database."""
    engine = make_engine(quick)
    yield Store(engine)
    engine.dispose()
