"""Who changed what: an audit row beside every change that a request makes, in the same transaction.

The rows are written by the session itself just before it flushes, so no method of the store can forget its own, and a
change that is rolled back leaves no trace. Who acts is said once per request (`acting`), by a context variable, because
it belongs to the request and to no argument of the store. Workers act for nobody: what they do is told by events. The
road not taken is a line of audit in every route: it lies whenever a transaction fails after it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from jobs.models import CheckpointRow, ChoreRow, FileRow, JobRow, ModelRow, UploadRow
from jobs.spec import new_id
from jobs.tenant_models import (
    AuditRow,
    DeliveryRow,
    KeyRow,
    ProjectRow,
    SecretRow,
    ServiceAccountRow,
    WebhookRow,
)

# What is audited, and the first half of an entry's type: `api_key.created`.
NOUNS: dict[type[Any], str] = {
    CheckpointRow: "fine_tuning.job.checkpoint",
    DeliveryRow: "webhook_delivery",
    FileRow: "file",
    JobRow: "fine_tuning.job",
    KeyRow: "api_key",
    ModelRow: "model",
    ProjectRow: "project",
    SecretRow: "secret",
    ServiceAccountRow: "service_account",
    UploadRow: "upload",
    WebhookRow: "webhook_endpoint",
}
# Of chores those that leave something behind; the others find out what may be asked again.
CHORE_NOUNS = {"export": "export"}


@dataclass(kw_only=True)
class Actor:
    """Whose request it is; filled in as it becomes known."""

    request_id: str
    operation: str = ""
    kind: str = ""
    key_id: str | None = None


acting: ContextVar[Actor | None] = ContextVar("acting", default=None)


def write_audit(session: Session, *_: Any) -> None:
    """Before a flush: an entry for each audited row that it will write."""
    actor = acting.get()
    if actor is None or not actor.kind:
        return
    found: list[tuple[Any, str, list[str]]]
    found = [(row, "created", []) for row in session.new if _noun(row)]
    found += [(row, "updated", _changed(row)) for row in session.dirty if _noun(row)]
    found += [(row, "deleted", []) for row in session.deleted if _noun(row)]
    for row, verb, columns in found:
        if verb == "updated" and not columns:
            continue
        if getattr(row, "revoked_at", None) and "revoked_at" in columns:
            verb = "deleted"
        elif getattr(row, "archived_at", None) and "archived_at" in columns:
            verb = "archived"
        session.add(
            AuditRow(
                id=new_id("audit_log-"),
                project=_project(session, row),
                created_at=time.time(),
                type=f"{_noun(row)}.{verb}",
                target=row.id,
                # Names only: values may be secrets.
                changed=columns if verb == "updated" else [],
                actor=actor.kind,
                key_id=actor.key_id,
                operation=actor.operation,
                request_id=actor.request_id,
            )
        )


def _noun(row: Any) -> str | None:
    return CHORE_NOUNS.get(row.kind) if isinstance(row, ChoreRow) else NOUNS.get(type(row))


def _project(session: Session, row: Any) -> str:
    if isinstance(row, ProjectRow):
        return row.id
    if isinstance(row, CheckpointRow):
        return session.scalars(select(JobRow.project).where(JobRow.id == row.job_id)).one()
    if isinstance(row, DeliveryRow):
        query = select(WebhookRow.project).where(WebhookRow.id == row.endpoint_id)
        return session.scalars(query).one()
    return str(row.project)


def _changed(row: Any) -> list[str]:
    """Names of changed columns; a version that follows other changes is none."""
    changed = {a.key for a in inspect(row).attrs if a.history.has_changes()}
    return sorted(changed - {"version"})
