"""What a child is told about models and files: places on this machine in place of public names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.artifacts import Artifacts
from jobs.errors import NotFound
from jobs.names import is_checkpoint
from jobs.spec import ModelRecord
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

    def made(self, name: str) -> dict[str, Any]:
        """A model that a job made, for config.json: where it lies, its base, and its adapters if it has any. Raises NotFound."""
        model = self.store.get_model(self.project, name)
        config = self.store.get_job(self.project, model.job_id).config or {}
        return {
            "model": {"name": name, "path": str(self.artifacts.absolute(model.path))},
            "base": {
                "name": model.base,
                "path": config.get("model_path"),
                "revision": config.get("model_revision"),
            },
            "adapters": self._adapters(model),
            "lora_rank": config.get("lora_rank"),
            "lora_alpha": config.get("lora_alpha"),
        }

    def _adapters(self, model: ModelRecord) -> str | None:
        """Beside a checkpoint's model; a result is the model of its job's last step, unless that was deleted since."""
        folder = self.artifacts.absolute(model.path).parent
        if not is_checkpoint(model.id):
            last = self.store.checkpoints(self.project, model.job_id, limit=1).items
            ended_at = self.store.get_job(self.project, model.job_id).progress_step
            if not last or last[0].step != ended_at:
                return None
            folder = self.artifacts.absolute(last[0].path)
        path = folder / "adapters.safetensors"
        return str(path) if path.is_file() else None

    def _model_path(self, name: str) -> str | None:
        if name.startswith("ft:"):
            return str(self.artifacts.absolute(self.store.get_model(self.project, name).path))
        found = self.artifacts.resolve_model(name)
        if found is None and name.startswith("local/"):
            raise NotFound.of("model", name)
        return str(found) if found else None
