"""Projects, their keys and limits, and who changed what.

A key belongs to one project and is known by its hash alone. Its scopes say what it may do there; `admin` includes all of
them and lets it manage every project of the service, which is one organisation.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection
from typing import Any, TypeVar

from sqlalchemy import Row, Select, bindparam, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from jobs.errors import InvalidCursor, LastAdminKey, NotArchivable, NotFound
from jobs.library import record_of
from jobs.quotas import usage_of
from jobs.receipts import Receipt, keep
from jobs.spec import (
    AuditRecord,
    Key,
    KeyRecord,
    Limits,
    Page,
    ProjectRecord,
    ServiceAccountRecord,
    Usage,
    new_id,
)
from jobs.tenant_models import AuditRow, KeyRow, ProjectRow, ServiceAccountRow
from jobs.transactions import Transactions

ADMIN = "admin"
SCOPES = ("jobs:read", "jobs:write", "files", "models", "inference", ADMIN)
# What a key may do where nothing else is said: all of its project, nothing of others.
MEMBER_SCOPES = tuple(scope for scope in SCOPES if scope != ADMIN)
DEFAULT_PROJECT = "default"
# A key's use is noted at most this often, so that polling does not write.
LAST_USED_SECONDS = 60

R = TypeVar("R")


def _key_by(column: InstrumentedAttribute[str]) -> Select[Any]:
    return (
        select(KeyRow.__table__, ProjectRow.requests_per_minute)
        .join(ProjectRow, ProjectRow.id == KeyRow.project)
        .where(column == bindparam("which"), ProjectRow.archived_at.is_(None))
    )


_KEY_OF_SECRET, _KEY_OF_ID = _key_by(KeyRow.secret_sha256), _key_by(KeyRow.id)


class Tenants(Transactions):
    """Projects, service accounts, keys, limits and the audit log."""

    def ensure_key(
        self,
        secret: str,
        *,
        name: str,
        project: str = DEFAULT_PROJECT,
        scopes: tuple[str, ...] = (ADMIN,),
    ) -> None:
        """Make `secret` valid for `project`, which is made too where it is not there."""
        with self.writing() as session:
            if session.scalar(select(ProjectRow.id).where(ProjectRow.id == project)) is None:
                session.add(ProjectRow(id=project, name=project, created_at=time.time()))
            digest = _digest(secret)
            if session.scalar(select(KeyRow.id).where(KeyRow.secret_sha256 == digest)) is None:
                session.add(_key_row(secret, project, name, scopes))

    def authenticate(self, secret: str) -> Key | None:
        """The key whose secret this is, while it is neither revoked nor expired and its project is not archived."""
        key, last = self._valid_key(_KEY_OF_SECRET, _digest(secret))
        if key is not None and (last is None or time.time() - last > LAST_USED_SECONDS):
            with self.writing() as session:
                session.get_one(KeyRow, key.id).last_used_at = time.time()
        return key

    def key_of_session(self, key_id: str) -> Key | None:
        """The key that a session was begun with, while it is valid."""
        return self._valid_key(_KEY_OF_ID, key_id)[0]

    def valid_keys(self, key_ids: Collection[str]) -> set[str]:
        """Those of the keys that are valid, in one question."""
        query = select(KeyRow).join(ProjectRow, ProjectRow.id == KeyRow.project)
        query = query.where(KeyRow.id.in_(key_ids), ProjectRow.archived_at.is_(None))
        with self.reading() as session:
            return {row.id for row in session.scalars(query) if _valid(row, time.time())}

    def _valid_key(self, query: Select[Any], which: str) -> tuple[Key | None, float | None]:
        with self.looking() as connection:
            row = connection.execute(query, {"which": which}).one_or_none()
        if row is None or not _valid(row, time.time()):
            return None, None
        key = Key(
            id=row.id,
            project=row.project,
            name=row.name,
            scopes=frozenset(row.scopes),
            requests_per_minute=row.requests_per_minute,
        )
        return key, row.last_used_at

    def create_project(self, name: str, receipt: Receipt | None = None) -> ProjectRecord:
        """A new, empty project without limits."""
        with self.writing() as session:
            row = ProjectRow(id=new_id("proj_"), name=name, created_at=time.time())
            session.add(row)
            session.flush()
            record: ProjectRecord = record_of(ProjectRecord, row)
            keep(session, receipt, record)
            return record

    def get_project(self, project: str) -> ProjectRecord:
        """One project. Raises NotFound."""
        with self.reading() as session:
            return record_of(ProjectRecord, _project(session, project))  # type: ignore[no-any-return]

    def list_projects(
        self, *, after: str | None = None, limit: int = 20, archived: bool = False
    ) -> Page[ProjectRecord]:
        """Projects, oldest first. Raises InvalidCursor."""
        query = select(ProjectRow)
        if not archived:
            query = query.where(ProjectRow.archived_at.is_(None))
        return self._page(query, ProjectRow, ProjectRecord, after, limit)

    def rename_project(self, project: str, name: str) -> ProjectRecord:
        """Another name. Raises NotFound."""
        with self.writing() as session:
            row = _project(session, project)
            row.name = name
            session.flush()
            return record_of(ProjectRecord, row)  # type: ignore[no-any-return]

    def archive_project(self, project: str) -> ProjectRecord:
        """End its keys; jobs that were accepted still run, and all data stay. Raises NotFound, NotArchivable."""
        if project == DEFAULT_PROJECT:
            raise NotArchivable(
                f"Project {project} cannot be archived: the service's own key is its"
            )
        with self.writing() as session:
            row = _project(session, project)
            row.archived_at = row.archived_at or time.time()
            session.flush()
            _an_admin_is_left(session)
            return record_of(ProjectRecord, row)  # type: ignore[no-any-return]

    def limits(self, project: str) -> tuple[Limits, Usage]:
        """What a project may have, and has. Raises NotFound."""
        with self.reading() as session:
            return record_of(Limits, _project(session, project)), usage_of(session, project)

    def set_limits(self, project: str, changes: dict[str, int | None]) -> None:
        """Change the limits that are named; None ends one. What is there already stays. Raises NotFound."""
        with self.writing() as session:
            row = _project(session, project)
            for name, value in changes.items():
                setattr(row, name, value)

    def create_service_account(
        self, project: str, name: str, scopes: tuple[str, ...], expires_at: float | None = None
    ) -> tuple[ServiceAccountRecord, KeyRecord, str]:
        """An account, its first key, and that key's secret, which is never seen again. Raises NotFound."""
        with self.writing() as session:
            _project(session, project)
            account = ServiceAccountRow(
                id=new_id("svc_acct_"), project=project, name=name, created_at=time.time()
            )
            session.add(account)
            session.flush()
            key, secret = _add_key(session, account, name, scopes, expires_at)
            return record_of(ServiceAccountRecord, account), key, secret

    def list_service_accounts(
        self, project: str, *, after: str | None = None, limit: int = 20
    ) -> Page[ServiceAccountRecord]:
        """Accounts of a project, oldest first. Raises NotFound, InvalidCursor."""
        self.get_project(project)
        query = select(ServiceAccountRow).where(ServiceAccountRow.project == project)
        return self._page(query, ServiceAccountRow, ServiceAccountRecord, after, limit)

    def get_service_account(self, project: str, account: str) -> ServiceAccountRecord:
        """One account. Raises NotFound."""
        with self.reading() as session:
            return record_of(ServiceAccountRecord, _account(session, project, account))  # type: ignore[no-any-return]

    def rename_service_account(self, project: str, account: str, name: str) -> ServiceAccountRecord:
        """Another name. Raises NotFound."""
        with self.writing() as session:
            row = _account(session, project, account)
            row.name = name
            session.flush()
            return record_of(ServiceAccountRecord, row)  # type: ignore[no-any-return]

    def delete_service_account(self, project: str, account: str) -> None:
        """Remove it and end its keys. Raises NotFound, LastAdminKey."""
        with self.writing() as session:
            row = _account(session, project, account)
            for key in session.scalars(select(KeyRow).where(KeyRow.service_account == row.id)):
                key.revoked_at = key.revoked_at or time.time()
            session.delete(row)
            session.flush()
            _an_admin_is_left(session)

    def create_key(
        self,
        project: str,
        account: str,
        name: str,
        scopes: tuple[str, ...],
        expires_at: float | None = None,
    ) -> tuple[KeyRecord, str]:
        """One more key of an account, and its secret. Raises NotFound."""
        with self.writing() as session:
            row = _account(session, project, account)
            return _add_key(session, row, name, scopes, expires_at)

    def list_keys(
        self, project: str, *, after: str | None = None, limit: int = 20
    ) -> Page[KeyRecord]:
        """Keys of a project that were not revoked, oldest first. Raises NotFound, InvalidCursor."""
        with self.reading() as session:
            _project(session, project)
            query = select(KeyRow).where(KeyRow.project == project, KeyRow.revoked_at.is_(None))
            if after:
                try:
                    last = _key(session, project, after)
                except NotFound as error:
                    raise InvalidCursor(f"after {after!r} names no key of this list") from error
                query = query.where(
                    tuple_(KeyRow.created_at, KeyRow.id) > tuple_(last.created_at, last.id)
                )
            rows = session.scalars(query.order_by(KeyRow.created_at, KeyRow.id).limit(limit + 1))
            found = [record_of(KeyRecord, row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def get_key(self, project: str, key: str) -> KeyRecord:
        """One key. Raises NotFound."""
        with self.reading() as session:
            return record_of(KeyRecord, _key(session, project, key))  # type: ignore[no-any-return]

    def change_key(self, project: str, key: str, changes: dict[str, Any]) -> KeyRecord:
        """Other scopes or another end. Raises NotFound, LastAdminKey."""
        with self.writing() as session:
            row = _key(session, project, key)
            for name, value in changes.items():
                setattr(row, name, value)
            session.flush()
            _an_admin_is_left(session)
            return record_of(KeyRecord, row)  # type: ignore[no-any-return]

    def revoke_key(self, project: str, key: str) -> None:
        """End a key at once. Raises NotFound, LastAdminKey."""
        with self.writing() as session:
            _key(session, project, key).revoked_at = time.time()
            session.flush()
            _an_admin_is_left(session)

    def audit_logs(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        projects: list[str] | None = None,
        types: list[str] | None = None,
        targets: list[str] | None = None,
    ) -> Page[AuditRecord]:
        """Who changed what, newest first. Raises InvalidCursor."""
        query = select(AuditRow)
        for column, wanted in (
            (AuditRow.project, projects),
            (AuditRow.type, types),
            (AuditRow.target, targets),
        ):
            if wanted:
                query = query.where(column.in_(wanted))
        return self._page(query, AuditRow, AuditRecord, after, limit, newest_first=True)

    def _page(
        self,
        query: Select[Any],
        table: Any,
        kind: type[R],
        after: str | None,
        limit: int,
        *,
        newest_first: bool = False,
    ) -> Page[R]:
        with self.reading() as session:
            if after:
                seq = session.scalar(select(table.seq).where(table.id == after))
                if seq is None:
                    raise InvalidCursor(f"after {after!r} names nothing in this list")
                query = query.where(table.seq < seq if newest_first else table.seq > seq)
            order = table.seq.desc() if newest_first else table.seq
            rows = session.scalars(query.order_by(order).limit(limit + 1))
            found: list[R] = [record_of(kind, row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)


def _digest(secret: str) -> str:
    # 256 random bits need no slow hash.
    return hashlib.sha256(secret.encode()).hexdigest()


def _key_row(
    secret: str,
    project: str,
    name: str,
    scopes: tuple[str, ...],
    account: str | None = None,
    expires_at: float | None = None,
) -> KeyRow:
    return KeyRow(
        id=new_id("key_"),
        project=project,
        name=name,
        secret_sha256=_digest(secret),
        hint=secret[-4:],
        scopes=list(scopes),
        service_account=account,
        created_at=time.time(),
        expires_at=expires_at,
    )


def _add_key(
    session: Session,
    account: ServiceAccountRow,
    name: str,
    scopes: tuple[str, ...],
    expires_at: float | None,
) -> tuple[KeyRecord, str]:
    secret = f"sk-sat-{secrets.token_urlsafe(32)}"
    row = _key_row(secret, account.project, name, scopes, account.id, expires_at)
    session.add(row)
    session.flush()
    return record_of(KeyRecord, row), secret


def _valid(row: KeyRow | Row[Any], now: float) -> bool:
    return row.revoked_at is None and (row.expires_at is None or row.expires_at > now)


def _an_admin_is_left(session: Session) -> None:
    query = select(KeyRow).join(ProjectRow, ProjectRow.id == KeyRow.project)
    rows = session.scalars(query.where(ProjectRow.archived_at.is_(None)))
    # A key that will expire administers nothing for good.
    if not any(_valid(r, time.time()) and not r.expires_at and ADMIN in r.scopes for r in rows):
        raise LastAdminKey(
            "This would end the last lasting key with scope admin; make another first"
        )


def _project(session: Session, project: str) -> ProjectRow:
    row = session.scalar(select(ProjectRow).where(ProjectRow.id == project))
    if row is None:
        raise NotFound.of("project", project)
    return row


def _account(session: Session, project: str, account: str) -> ServiceAccountRow:
    row = session.scalar(
        select(ServiceAccountRow).where(
            ServiceAccountRow.project == project, ServiceAccountRow.id == account
        )
    )
    if row is None:
        raise NotFound.of("service_account", account)
    return row


def _key(session: Session, project: str, key: str) -> KeyRow:
    row = session.scalar(
        select(KeyRow).where(
            KeyRow.project == project, KeyRow.id == key, KeyRow.revoked_at.is_(None)
        )
    )
    if row is None:
        raise NotFound.of("api_key", key)
    return row
