"""OpenAI's admin objects: project, service account, API key, audit log; and our limits."""

import time
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from api.errors import ApiError
from api.schemas.bodies import Body
from jobs.spec import (
    AuditRecord,
    KeyRecord,
    Limits,
    ProjectRecord,
    ServiceAccountRecord,
    Usage,
)
from jobs.tenants import MEMBER_SCOPES, SCOPES

Name = Annotated[str, Field(min_length=1, max_length=128)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Scope = Annotated[str, Field(json_schema_extra={"enum": list(SCOPES)})]
Seconds = Annotated[int, Field(ge=1, le=10 * 366 * 24 * 3600)]


class NameBody(Body):
    """A name."""

    name: Name


class NewServiceAccount(Body):
    """An account and its first key; `scopes` is ours."""

    name: Name
    scopes: list[Scope] | None = None
    expires_in_seconds: Seconds | None = None


class NewKey(Body):
    """One more key of an account."""

    name: Name = "API key"
    scopes: list[Scope] | None = None
    expires_in_seconds: Seconds | None = None


class KeyChanges(Body):
    """What may change on a key; no scopes mean all but admin."""

    scopes: list[Scope] | None = None
    expires_in_seconds: Seconds | None = None


class LimitsBody(Body):
    """Limits to change; null ends one."""

    queued_jobs: Count | None = None
    running_jobs: Count | None = None
    storage_bytes: Count | None = None
    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


def scopes_of(given: list[str] | None) -> tuple[str, ...]:
    """The scopes asked for; none asked for are all but admin, as at OpenAI."""
    for scope in given or ():
        if scope not in SCOPES:
            raise ApiError(
                "invalid_value", f"{scope!r} is no scope; allowed: {', '.join(SCOPES)}.", "scopes"
            )
    return tuple(given or MEMBER_SCOPES)


def end_of(seconds: int | None) -> float | None:
    """When a key ends that is to live so long."""
    return None if seconds is None else time.time() + seconds


class Project(BaseModel):
    """A tenant."""

    id: str
    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]

    @classmethod
    def of(cls, record: ProjectRecord) -> Self:
        """The project as a client sees it."""
        archived = record.archived_at
        return cls(
            id=record.id,
            name=record.name,
            created_at=int(record.created_at),
            archived_at=None if archived is None else int(archived),
            status="active" if archived is None else "archived",
        )


class NewSecret(BaseModel):
    """A key with its secret: shown once."""

    id: str
    object: Literal["organization.project.service_account.api_key"] = (
        "organization.project.service_account.api_key"
    )
    name: str
    created_at: int
    expires_at: int | None
    scopes: list[str]
    value: str

    @classmethod
    def of(cls, key: KeyRecord, secret: str) -> Self:
        """The key as its owner sees it."""
        return cls(
            id=key.id,
            name=key.name,
            created_at=int(key.created_at),
            expires_at=_whole(key.expires_at),
            scopes=key.scopes,
            value=secret,
        )


class ServiceAccount(BaseModel):
    """A name that keys are made for; `api_key` only where it was just created."""

    id: str
    object: Literal["organization.project.service_account"] = "organization.project.service_account"
    name: str
    role: Literal["member"] = "member"
    created_at: int

    @classmethod
    def of(cls, record: ServiceAccountRecord) -> Self:
        """The account as a client sees it."""
        return cls(id=record.id, name=record.name, created_at=int(record.created_at))


class CreatedServiceAccount(ServiceAccount):
    """An account just made, with its first key."""

    api_key: NewSecret


class ApiKey(BaseModel):
    """A key as administrators see it; `scopes` is ours."""

    id: str
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    owner: dict[str, Any]
    owner_project_access: Literal["active", "inactive"] = "active"
    scopes: list[str]

    @classmethod
    def of(cls, key: KeyRecord, account: ServiceAccountRecord | None) -> Self:
        """The key, and the account it was made for; keys of the service itself have none."""
        owner: dict[str, Any] = {"type": "user", "user": None, "service_account": None}
        if account is not None:
            owner["type"] = "service_account"
            owner["service_account"] = {
                "id": account.id,
                "name": account.name,
                "created_at": int(account.created_at),
                "role": "member",
            }
        return cls(
            id=key.id,
            name=key.name,
            redacted_value=f"sk-sat-...{key.hint}",
            created_at=int(key.created_at),
            last_used_at=_whole(key.last_used_at),
            expires_at=_whole(key.expires_at),
            owner=owner,
            scopes=key.scopes,
        )


class ProjectLimits(BaseModel):
    """What a project may have at once, null where there is no limit, and what it has."""

    object: Literal["project.limits"] = "project.limits"
    project: str
    limits: dict[str, int | None]
    usage: dict[str, int]

    @classmethod
    def of(cls, project: str, limits: Limits, usage: Usage) -> Self:
        """The limits as a client sees them."""
        return cls(project=project, limits=vars(limits), usage=vars(usage))


class AuditLog(BaseModel):
    """Who changed what; `changed` names fields and never holds their values."""

    id: str
    object: Literal["organization.audit_log"] = "organization.audit_log"
    type: str
    effective_at: int
    project: dict[str, str]
    actor: dict[str, Any]
    target: str
    changed: list[str]
    operation: str
    request_id: str

    @classmethod
    def of(cls, record: AuditRecord) -> Self:
        """The entry as a client sees it."""
        key = {"id": record.key_id}
        return cls(
            id=record.id,
            type=record.type,
            effective_at=int(record.created_at),
            project={"id": record.project},
            actor={"type": record.actor, record.actor: key},
            target=record.target,
            changed=record.changed,
            operation=record.operation,
            request_id=record.request_id,
        )


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
