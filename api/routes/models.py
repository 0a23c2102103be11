"""`/v1/models`: local base models and the results of jobs."""

from fastapi import APIRouter, Depends

from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas.lists import Deleted, ListOf
from api.schemas.models import Model
from api.schemas.problems import answers
from jobs.names import is_checkpoint

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_key)])


@router.get("", operation_id="listModels", responses=answers())
def list_models(app: App, key: Caller) -> ListOf[Model]:
    """Every model that a job of this project can start from here; OpenAI's list has no pages."""
    local = [_local(app, name) for name in app.artifacts.local_models()]
    results = [Model.of(record) for record in app.store.list_models(key.project)]
    return ListOf[Model].of([*local, *results], has_more=False)


@router.get("/{model:path}", operation_id="retrieveModel", responses=answers("model_not_found"))
def retrieve_model(model: str, app: App, key: Caller) -> Model:
    """One model."""
    if model in app.artifacts.local_models():
        return _local(app, model)
    return Model.of(app.store.get_model(key.project, model))


@router.delete(
    "/{model:path}",
    operation_id="deleteModel",
    responses=answers("model_not_found", "model_not_deletable", "model_in_use"),
)
def delete_model(model: str, app: App, key: Caller) -> Deleted:
    """Delete a result, or a checkpoint of a job that has ended, and its files."""
    if model in app.artifacts.local_models():
        raise ApiError(
            "model_not_deletable",
            f"{model} is a folder of this machine; remove the folder itself.",
            "model",
        )
    if is_checkpoint(model):
        gone = app.store.delete_checkpoint(key.project, model)
        paths = [gone.path, *([gone.pinned_from] if gone.pinned_from else [])]
    else:
        paths = [app.store.get_model(key.project, model).path]
        app.store.delete_model(key.project, model)
    for path in paths:
        app.artifacts.delete(path)
    return Deleted(id=model, object="model")


def _local(app: Services, name: str) -> Model:
    path = app.artifacts.resolve_model(name)
    created = int((path / "config.json").stat().st_mtime) if path else 0
    return Model(id=name, created=created, owned_by="local")
