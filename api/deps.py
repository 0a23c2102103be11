"""What routes need of the process, made once in `create_app` and handed in; no globals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from api.chats import Chats
from api.followers import Followers
from api.limiter import Limiter
from api.queueing import Queueing
from api.together import Together
from jobs.artifacts import Artifacts
from jobs.errors import NotFound
from jobs.queue import Bell
from jobs.settings import Settings
from jobs.spec import CheckpointRecord
from jobs.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Services:
    """The parts of the house that the API stands on."""

    settings: Settings
    store: Store
    artifacts: Artifacts
    bell: Bell
    session_secret: str
    limiter: Limiter
    followers: Followers
    queueing: Queueing
    together: Together
    chats: Chats

    def model_path(self, project: str, name: str) -> Path | None:
        """Folder of the result `name`, or None where it was deleted."""
        try:
            return self.artifacts.absolute(self.store.get_model(project, name).path)
        except NotFound:
            return None

    def pinned(self, project: str, found: CheckpointRecord) -> CheckpointRecord:
        """The checkpoint, out of reach of its run's tidying. Raises NotFound where that was faster."""
        if found.pinned_from is not None:
            return found
        try:
            path = self.artifacts.link_checkpoint(found.path, found.job_id, found.id)
        except FileNotFoundError as error:
            raise NotFound.of("checkpoint", found.id) from error
        try:
            return self.store.pin_checkpoint(project, found, path)
        except NotFound:
            self.artifacts.delete(path)
            raise


def services(request: Request) -> Services:
    """The services of the app that answers this request."""
    found = request.app.state.services
    assert isinstance(found, Services)  # noqa: S101 - set by the lifespan before any request
    return found


async def _services(request: Request) -> Services:
    # Async, because FastAPI sends a plain function to a thread, for nothing, at every request.
    return services(request)


App = Annotated[Services, Depends(_services)]
