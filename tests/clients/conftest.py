"""Every client of OpenAI's that is promised to work, and the service that they are driven against."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import app, migrated, settings
from tests.cli.running import Up, up
from tests.sat_core.tiny import write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["app", "migrated", "settings"]

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix) / "clients"
NODE_MODULES = INSTALLED / "node" / "node_modules"
PATIENCE_S = 600


@dataclass(frozen=True)
class Client:
    """One version of OpenAI's client, unmodified; `strict` is its `_strict_response_validation`."""

    name: str
    program: tuple[str, ...]
    strict: bool = False

    def run(self, do: str, base_url: str, api_key: str, **order: Any) -> list[str]:
        """What it said, line by line. It must not fail, and neither warn nor complain."""
        told = {"name": str(self), "base_url": base_url, "api_key": api_key, "strict": self.strict}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "PYTHON"))}
        done = subprocess.run(
            [*self.program, json.dumps({**told, "do": do, **order})],
            env=clean | {"NODE_PATH": str(NODE_MODULES)},
            capture_output=True,
            check=False,
            text=True,
            timeout=PATIENCE_S,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"after {done.stdout}:\n{done.stderr}"
        return done.stdout.splitlines()

    def __str__(self) -> str:
        return f"{self.name}{' strict' if self.strict else ''}"


def python(name: str, interpreter: Path) -> list[Client]:
    """Plain and strict; any warning is an error."""
    program = (str(interpreter), "-W", "error", str(HERE / "journey.py"))
    return [Client(name, program), Client(name, program, strict=True)]


CLIENTS = [
    *python("newest", Path(sys.executable)),
    *python("2.54.0", INSTALLED / "openai-2.54.0" / "bin" / "python"),
    *python("1.109.1", INSTALLED / "openai-1.109.1" / "bin" / "python"),
    Client("node", ("node", "--throw-deprecation", str(HERE / "journey.cjs"))),
]


@pytest.fixture(params=CLIENTS, ids=str)
def client(request: pytest.FixtureRequest) -> Client:
    """Each client in turn. `make test` and `make test-clients` install them; only Node's may be missing."""
    found: Client = request.param
    if found.name == "node" and not (shutil.which("node") and NODE_MODULES.is_dir()):
        pytest.skip("no Node here, or npm could not install OpenAI's client for it")
    return found


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """API, worker and broker, with one tiny model, `local/tiny`."""
    data_dir = tmp_path_factory.mktemp("clients") / "data"
    write_model(data_dir / "models" / "tiny")
    with up(data_dir) as running:
        yield running
