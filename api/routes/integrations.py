"""`/v1/fine_tuning/jobs/{id}/integrations` and `/v1/sat/secrets`: where else metrics go, and what workers sign in with."""

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from api.auth import Caller, require_key
from api.deps import App
from api.schemas.bodies import Body, described, read
from api.schemas.integrations import JobIntegration
from api.schemas.lists import Deleted, ListOf
from api.schemas.problems import answers

router = APIRouter(prefix="/v1", tags=["integrations"], dependencies=[Depends(require_key)])

SecretName = Literal[
    "mlflow_tracking_password", "mlflow_tracking_token", "mlflow_tracking_username", "wandb_api_key"
]
Name = Annotated[SecretName, Path(description="What it is for: the variable that its library reads, in small letters.")]  # fmt: skip


class SecretBody(Body):
    """A secret's value, which no answer holds."""

    value: str = Field(min_length=8, max_length=4096, pattern=r"^[\x21-\x7e]+$")


class Secret(BaseModel):
    """That the project has a secret of this name."""

    object: Literal["secret"] = "secret"
    id: str
    updated_at: int


@router.get(
    "/fine_tuning/jobs/{job_id}/integrations",
    operation_id="listFineTuningJobIntegrations",
    responses=answers("job_not_found"),
)
def list_integrations(job_id: str, app: App, key: Caller) -> ListOf[JobIntegration]:
    """The trackers that the job's metrics go to as well, and how far they were told."""
    found = app.store.list_integrations(key.project, job_id)
    return ListOf[JobIntegration].of([JobIntegration.of(i) for i in found], has_more=False)


@router.get("/sat/secrets", operation_id="listSecrets", responses=answers())
def list_secrets(app: App, key: Caller) -> ListOf[Secret]:
    """Which secrets this project has; no value is ever shown."""
    found = app.store.list_secrets(key.project)
    shown = [Secret(id=s.name, updated_at=int(s.updated_at)) for s in found]
    return ListOf[Secret].of(shown, has_more=False)


@router.put(
    "/sat/secrets/{name}",
    operation_id="putSecret",
    openapi_extra=described(SecretBody),
    responses=answers(
        "invalid_value", "missing_required_parameter", "unknown_parameter", "request_too_large"
    ),
)
async def put_secret(name: Name, request: Request, app: App, key: Caller) -> Secret:
    """Set a secret of this project; its jobs' workers use it in place of their own."""
    body, _ = await read(request, SecretBody)
    await run_in_threadpool(app.store.put_secret, key.project, name, body.value)
    return Secret(id=name, updated_at=int(time.time()))


@router.delete(
    "/sat/secrets/{name}",
    operation_id="deleteSecret",
    responses=answers("secret_not_found", "invalid_value"),
)
def delete_secret(name: Name, app: App, key: Caller) -> Deleted:
    """Forget a secret of this project."""
    app.store.delete_secret(key.project, name)
    return Deleted(id=name, object="secret")
