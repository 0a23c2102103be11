"""`/v1/organization`: projects, service accounts, keys, limits and the audit log, for keys with scope admin.

The shapes are those of OpenAI's admin API, so that its client's `admin.organization` works. A secret is in exactly one
answer; that is why making a key is not replayed from an Idempotency-Key: the stored answer would hold it.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool

from api import once
from api.auth import require_key
from api.deps import App, Services
from api.schemas.bodies import described, read
from api.schemas.lists import After, Deleted, ListOf
from api.schemas.organization import (
    ApiKey,
    AuditLog,
    CreatedServiceAccount,
    KeyChanges,
    LimitsBody,
    NameBody,
    NewKey,
    NewSecret,
    NewServiceAccount,
    Project,
    ProjectLimits,
    ServiceAccount,
    end_of,
    scopes_of,
)
from api.schemas.problems import answers
from jobs.errors import NotFound
from jobs.spec import KeyRecord

router = APIRouter(
    prefix="/v1/organization", tags=["organization"], dependencies=[Depends(require_key)]
)

PROJECTS = "/projects"
PROJECT = PROJECTS + "/{project_id}"
ACCOUNT = PROJECT + "/service_accounts/{service_account_id}"
KEY = PROJECT + "/api_keys/{api_key_id}"
BODY = ("invalid_value", "missing_required_parameter", "unknown_parameter", "request_too_large")
PAGE = ("invalid_value", "invalid_cursor")
Limit = Annotated[int, Query(ge=1, le=100)]


@router.get(PROJECTS, operation_id="list-projects", responses=answers(*PAGE))
def list_projects(
    app: App, after: After = None, limit: Limit = 20, include_archived: bool = False
) -> ListOf[Project]:
    """Projects, oldest first."""
    page = app.store.list_projects(after=after, limit=limit, archived=include_archived)
    return ListOf[Project].of([Project.of(p) for p in page.items], has_more=page.has_more)


@router.post(
    PROJECTS,
    operation_id="create-project",
    openapi_extra=described(NameBody),
    response_model=Project,
    responses=answers(*BODY, *once.CODES),
)
async def create_project(request: Request, app: App, creating: once.Creating) -> Any:
    """A new, empty project without limits."""
    body, raw = await read(request, NameBody)
    return await creating.run(
        once.fingerprint(raw),
        lambda receipt: app.store.create_project(body.name, receipt),
        Project.of,
        location=router.prefix + PROJECTS,
    )


@router.get(PROJECT, operation_id="retrieve-project", responses=answers("project_not_found"))
def retrieve_project(project_id: str, app: App) -> Project:
    """One project."""
    return Project.of(app.store.get_project(project_id))


@router.post(
    PROJECT,
    operation_id="modify-project",
    openapi_extra=described(NameBody),
    responses=answers("project_not_found", *BODY),
)
async def modify_project(project_id: str, request: Request, app: App) -> Project:
    """Another name."""
    body, _ = await read(request, NameBody)
    return Project.of(await run_in_threadpool(app.store.rename_project, project_id, body.name))


@router.post(
    PROJECT + "/archive",
    operation_id="archive-project",
    responses=answers("project_not_found", "project_not_archivable", "last_admin_key"),
)
def archive_project(project_id: str, app: App) -> Project:
    """End its keys. Accepted jobs still run, all data stay."""
    return Project.of(app.store.archive_project(project_id))


@router.get(
    PROJECT + "/limits",
    operation_id="retrieveProjectLimits",
    responses=answers("project_not_found"),
)
def retrieve_project_limits(project_id: str, app: App) -> ProjectLimits:
    """What a project may have at once, and has."""
    return ProjectLimits.of(project_id, *app.store.limits(project_id))


@router.post(
    PROJECT + "/limits",
    operation_id="modifyProjectLimits",
    openapi_extra=described(LimitsBody, required=False),
    responses=answers("project_not_found", *BODY),
)
async def modify_project_limits(project_id: str, request: Request, app: App) -> ProjectLimits:
    """Change the limits that are named; what is there already stays."""
    body, _ = await read(request, LimitsBody)
    changes = body.model_dump(exclude_unset=True)
    await run_in_threadpool(app.store.set_limits, project_id, changes)
    found = await run_in_threadpool(app.store.limits, project_id)
    return ProjectLimits.of(project_id, *found)


@router.get(
    PROJECT + "/service_accounts",
    operation_id="list-project-service-accounts",
    responses=answers("project_not_found", *PAGE),
)
def list_service_accounts(
    project_id: str, app: App, after: After = None, limit: Limit = 20
) -> ListOf[ServiceAccount]:
    """Accounts of a project, oldest first."""
    page = app.store.list_service_accounts(project_id, after=after, limit=limit)
    items = [ServiceAccount.of(account) for account in page.items]
    return ListOf[ServiceAccount].of(items, has_more=page.has_more)


@router.post(
    PROJECT + "/service_accounts",
    operation_id="create-project-service-account",
    openapi_extra=described(NewServiceAccount),
    responses=answers("project_not_found", *BODY),
)
async def create_service_account(
    project_id: str, request: Request, app: App
) -> CreatedServiceAccount:
    """An account and its first key, whose value is shown this once."""
    body, _ = await read(request, NewServiceAccount)
    scopes, end = scopes_of(body.scopes), end_of(body.expires_in_seconds)
    account, key, secret = await run_in_threadpool(
        app.store.create_service_account, project_id, body.name, scopes, end
    )
    return CreatedServiceAccount(
        id=account.id,
        name=account.name,
        created_at=int(account.created_at),
        api_key=NewSecret.of(key, secret),
    )


@router.get(
    ACCOUNT,
    operation_id="retrieve-project-service-account",
    responses=answers("service_account_not_found"),
)
def retrieve_service_account(project_id: str, service_account_id: str, app: App) -> ServiceAccount:
    """One account."""
    return ServiceAccount.of(app.store.get_service_account(project_id, service_account_id))


@router.post(
    ACCOUNT,
    operation_id="update-project-service-account",
    openapi_extra=described(NameBody),
    responses=answers("service_account_not_found", *BODY),
)
async def update_service_account(
    project_id: str, service_account_id: str, request: Request, app: App
) -> ServiceAccount:
    """Another name."""
    body, _ = await read(request, NameBody)
    rename = app.store.rename_service_account
    return ServiceAccount.of(
        await run_in_threadpool(rename, project_id, service_account_id, body.name)
    )


@router.delete(
    ACCOUNT,
    operation_id="delete-project-service-account",
    responses=answers("service_account_not_found", "last_admin_key"),
)
def delete_service_account(project_id: str, service_account_id: str, app: App) -> Deleted:
    """Remove an account and end its keys."""
    app.store.delete_service_account(project_id, service_account_id)
    kind = "organization.project.service_account.deleted"
    return Deleted(id=service_account_id, object=kind)


@router.post(
    ACCOUNT + "/api_keys",
    operation_id="create-project-service-account-api-key",
    openapi_extra=described(NewKey, required=False),
    responses=answers("service_account_not_found", *BODY),
)
async def create_api_key(
    project_id: str, service_account_id: str, request: Request, app: App
) -> NewSecret:
    """One more key of an account; its value is shown this once."""
    body, _ = await read(request, NewKey)
    key, secret = await run_in_threadpool(
        app.store.create_key,
        project_id,
        service_account_id,
        body.name,
        scopes_of(body.scopes),
        end_of(body.expires_in_seconds),
    )
    return NewSecret.of(key, secret)


@router.get(
    PROJECT + "/api_keys",
    operation_id="list-project-api-keys",
    responses=answers("project_not_found", *PAGE),
)
def list_api_keys(
    project_id: str, app: App, after: After = None, limit: Limit = 20
) -> ListOf[ApiKey]:
    """Keys of a project that were not revoked, oldest first."""
    page = app.store.list_keys(project_id, after=after, limit=limit)
    return ListOf[ApiKey].of([_shown(app, key) for key in page.items], has_more=page.has_more)


@router.get(KEY, operation_id="retrieve-project-api-key", responses=answers("api_key_not_found"))
def retrieve_api_key(project_id: str, api_key_id: str, app: App) -> ApiKey:
    """One key."""
    return _shown(app, app.store.get_key(project_id, api_key_id))


@router.post(
    KEY,
    operation_id="update-project-api-key",
    openapi_extra=described(KeyChanges, required=False),
    responses=answers("api_key_not_found", "last_admin_key", *BODY),
)
async def update_api_key(project_id: str, api_key_id: str, request: Request, app: App) -> ApiKey:
    """Other scopes, or another end."""
    body, _ = await read(request, KeyChanges)
    changes: dict[str, Any] = {}
    if body.scopes is not None:
        changes["scopes"] = list(scopes_of(body.scopes))
    if body.expires_in_seconds is not None:
        changes["expires_at"] = end_of(body.expires_in_seconds)
    key = await run_in_threadpool(app.store.change_key, project_id, api_key_id, changes)
    return await run_in_threadpool(_shown, app, key)


@router.delete(
    KEY,
    operation_id="delete-project-api-key",
    responses=answers("api_key_not_found", "last_admin_key"),
)
def delete_api_key(project_id: str, api_key_id: str, app: App) -> Deleted:
    """End a key at once."""
    app.store.revoke_key(project_id, api_key_id)
    return Deleted(id=api_key_id, object="organization.project.api_key.deleted")


@router.get("/audit_logs", operation_id="list-audit-logs", responses=answers(*PAGE))
def list_audit_logs(
    app: App,
    after: After = None,
    limit: Limit = 20,
    project_ids: Annotated[list[str] | None, Query(alias="project_ids[]")] = None,
    event_types: Annotated[list[str] | None, Query(alias="event_types[]")] = None,
    resource_ids: Annotated[list[str] | None, Query(alias="resource_ids[]")] = None,
) -> ListOf[AuditLog]:
    """Who changed what, newest first."""
    page = app.store.audit_logs(
        after=after, limit=limit, projects=project_ids, types=event_types, targets=resource_ids
    )
    return ListOf[AuditLog].of([AuditLog.of(a) for a in page.items], has_more=page.has_more)


def _shown(app: Services, key: KeyRecord) -> ApiKey:
    account = None
    if key.service_account is not None:
        try:
            account = app.store.get_service_account(key.project, key.service_account)
        except NotFound:
            account = None  # just deleted, and its keys with it
    return ApiKey.of(key, account)
