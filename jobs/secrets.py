"""What a project's jobs need to speak to other services: written by its keys, read by its workers, shown to nobody.

Kept as they are, like the secrets that sign webhooks: a database that holds them and the key to them in one place would
hide nothing. What a secret may be named is decided by who uses it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.errors import NotFound
from jobs.spec import new_id
from jobs.tenant_models import SecretRow
from jobs.transactions import Transactions


@dataclass(frozen=True, kw_only=True)
class SecretRecord:
    """That there is a secret of this name; its value stays where it is."""

    name: str
    updated_at: float


class Secrets(Transactions):
    """Secrets of the store."""

    def put_secret(self, project: str, name: str, value: str) -> SecretRecord:
        """Set it, in place of one that was."""
        now = time.time()
        with self.writing() as session:
            row = _find(session, project, name)
            if row is None:
                row = SecretRow(id=new_id("secret_"), project=project, name=name)
                session.add(row)
            row.value, row.updated_at = value, now
        return SecretRecord(name=name, updated_at=now)

    def list_secrets(self, project: str) -> list[SecretRecord]:
        """Their names."""
        with self.reading() as session:
            query = select(SecretRow.name, SecretRow.updated_at).where(SecretRow.project == project)
            found = session.execute(query.order_by(SecretRow.name))
            return [SecretRecord(name=name, updated_at=updated) for name, updated in found]

    def delete_secret(self, project: str, name: str) -> None:
        """Forget it. Raises NotFound."""
        with self.writing() as session:
            row = _find(session, project, name)
            if row is None:
                raise NotFound.of("secret", name)
            session.delete(row)

    def secret_values(self, project: str) -> dict[str, str]:
        """All of them, for the worker that uses them."""
        with self.reading() as session:
            rows = session.scalars(select(SecretRow).where(SecretRow.project == project))
            return {row.name: row.value for row in rows}


def _find(session: Session, project: str, name: str) -> SecretRow | None:
    return session.scalar(
        select(SecretRow).where(SecretRow.project == project, SecretRow.name == name)
    )
