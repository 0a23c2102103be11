"""What may be asked without a key: is it alive, is it ready, what is it."""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from api.deps import App
from api.errors import ApiError
from api.schemas.problems import OPEN, answers
from jobs.errors import StoreUnavailable

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"])


class Health(BaseModel):
    """A short word on the service."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Which release answers."""

    name: Literal["satune"] = "satune"
    version: str


@router.get("/healthz", operation_id="health", responses=answers(always=OPEN))
def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", operation_id="ready", responses=answers("not_ready", always=OPEN))
def readyz(app: App) -> Health:
    """The database answers too."""
    try:
        app.store.ping()
    except StoreUnavailable as error:
        log.warning("Not ready: %s", error)
        raise ApiError("not_ready", "The database does not answer.") from error
    return Health()


@router.get("/version", operation_id="version", responses=answers(always=OPEN))
def version_of() -> Version:
    """The release."""
    return Version(version=release())


def release() -> str:
    """The installed version, or "source" in a tree that was not installed."""
    try:
        return version("satune")
    except PackageNotFoundError:
        return "source"
