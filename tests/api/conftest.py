"""A real app on a fresh SQLite data folder; the schema comes from the migrations, as in the field."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fastapi import FastAPI

    from api.deps import Services

KEY = "sk-sat-test"
ROW = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.fixture
def early_in_a_minute() -> None:
    """Requests are counted by the minute, and one more is let through where two minutes meet."""
    if (past := time.time() % 60) > 50:
        time.sleep(60 - past)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database file, made once and copied for each test."""
    folder = tmp_path_factory.mktemp("migrated")
    ini = str(files("migrations") / "alembic.ini")
    subprocess.run(
        [sys.executable, "-m", "alembic", "-c", ini, "upgrade", "head"],
        check=True,
        env={"SATUNE_DATA_DIR": str(folder), "PATH": "", "PYTHONPATH": "."},
    )
    return folder / "satune.db"


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    """Settings of a fresh data folder with one local model, `local/tiny`."""
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "satune.db").write_bytes(migrated.read_bytes())
    return Settings(data_dir=tmp_path, api_key=KEY, max_file_bytes=1 << 20)


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    """The app, not yet started."""
    return create_app(settings)


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    """A client without a key; its base address is a host that is allowed."""
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(anonymous: TestClient) -> TestClient:
    """A client with a valid key."""
    anonymous.headers["authorization"] = f"Bearer {KEY}"
    return anonymous


@pytest.fixture
def services(client: TestClient, app: FastAPI) -> Services:
    """The parts behind the started app."""
    found: Services = app.state.services
    return found


@pytest.fixture
def file_id(client: TestClient) -> str:
    """A good file."""
    return upload(client, ROW * 3).json()["id"]


def upload(client: TestClient, content: bytes, filename: str = "data.jsonl", **fields: str):
    """Upload `content` as a client does."""
    return client.post(
        "/v1/files", data={"purpose": "fine-tune"} | fields, files={"file": (filename, content)}
    )


def create(client: TestClient, file_id: str, **more):
    """Create a job on the local model."""
    return client.post(
        "/v1/fine_tuning/jobs", json={"model": "local/tiny", "training_file": file_id} | more
    )
