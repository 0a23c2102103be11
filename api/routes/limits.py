"""`/v1/sat/limits`: what the key's project may have at once, and has. Any key of the project may ask."""

from fastapi import APIRouter, Depends

from api.auth import Caller, require_key
from api.deps import App
from api.schemas.organization import ProjectLimits
from api.schemas.problems import answers

router = APIRouter(prefix="/v1/sat", tags=["limits"], dependencies=[Depends(require_key)])


@router.get("/limits", operation_id="retrieveLimits", responses=answers())
def retrieve_limits(app: App, key: Caller) -> ProjectLimits:
    """Limits and use of this project."""
    return ProjectLimits.of(key.project, *app.store.limits(key.project))
