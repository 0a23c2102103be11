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

from sqlalchemy import inspect
from sqlalchemy.orm import Session

from jobs.models import FileRow, JobRow, ModelRow
from jobs.spec import new_id
from jobs.tenant_models import (
    AuditRow,
    KeyRow,
    ProjectRow,
    SecretRow,
    ServiceAccountRow,
    WebhookRow,
)

# What is audited, and the first half of an entry's type: `api_key.created`.
NOUNS: dict[type[Any], str] = {
    FileRow: "file",
    JobRow: "fine_tuning.job",
    KeyRow: "api_key",
    ModelRow: "model",
    ProjectRow: "project",
    SecretRow: "secret",
    ServiceAccountRow: "service_account",
    WebhookRow: "webhook_endpoint",
}


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
    found = [(row, "created", []) for row in session.new if type(row) in NOUNS]
    found += [(row, "updated", _changed(row)) for row in session.dirty if type(row) in NOUNS]
    found += [(row, "deleted", []) for row in session.deleted if type(row) in NOUNS]
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
                project=row.id if isinstance(row, ProjectRow) else row.project,
                created_at=time.time(),
                type=f"{NOUNS[type(row)]}.{verb}",
                target=row.id,
                # Names only: values may be secrets.
                changed=columns if verb == "updated" else [],
                actor=actor.kind,
                key_id=actor.key_id,
                operation=actor.operation,
                request_id=actor.request_id,
            )
        )


def _changed(row: Any) -> list[str]:
    return sorted(a.key for a in inspect(row).attrs if a.history.has_changes())
