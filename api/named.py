"""What a request names by id: files and models of its project, refused where they are not there."""

from api.deps import Services
from api.drafts import PURPOSE
from api.errors import ApiError
from jobs.spec import FileRecord


def data_file(app: Services, project: str, file_id: str, param: str) -> FileRecord:
    """A data set of the project. Raises ApiError, naming `param`."""
    try:
        record = app.store.get_file(project, file_id)
    except LookupError as error:
        raise ApiError(
            "file_not_found",
            f"{param} {file_id!r} does not exist; upload it to /v1/files first.",
            param,
        ) from error
    if record.purpose != PURPOSE:
        raise ApiError(
            "invalid_value",
            f"{param} {file_id!r} has purpose {record.purpose!r}; allowed is {PURPOSE!r}.",
            param,
        )
    return record


def model_exists(app: Services, project: str, name: str) -> None:
    """Refuse what cannot be a model. Whether a hub has ORG/NAME is known only when the worker asks it."""
    if name.startswith("ft:"):
        if app.model_path(project, name) is not None:
            return
    elif "/" in name and (app.artifacts.resolve_model(name) or not name.startswith("local/")):
        return
    known = app.artifacts.local_models()
    listed = (
        ", ".join(known[:20]) or "none yet; put model folders below a folder in SATUNE_MODEL_ROOTS"
    )
    raise ApiError(
        "unknown_model",
        f"model {name!r} does not exist. Local models: {listed}. A model of the hub is named ORG/NAME.",
        "model",
    )
