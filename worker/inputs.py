"""What a child is told about models and files: places on this machine in place of public names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.artifacts import Artifacts
from jobs.errors import NotFound
from jobs.store import Store

PREPARE_FORMAT = "satune.prepare/1"


@dataclass(frozen=True)
class Inputs:
    """Names of one project, found on this machine."""

    store: Store
    artifacts: Artifacts
    project: str

    def model(self, name: str) -> dict[str, Any]:
        """A model for config.json; path None is a model of the hub. Raises NotFound."""
        return {"name": name, "path": self._model_path(name), "revision": None}

    def file(self, file_id: str) -> dict[str, str]:
        """A file for config.json. Raises NotFound."""
        file = self.store.get_file(self.project, file_id)
        return {"path": str(self.artifacts.file(file.sha256)), "filename": file.filename}

    def _model_path(self, name: str) -> str | None:
        if name.startswith("ft:"):
            return str(self.artifacts.absolute(self.store.get_model(self.project, name).path))
        found = self.artifacts.resolve_model(name)
        if found is None and name.startswith("local/"):
            raise NotFound.of("model", name)
        return str(found) if found else None
