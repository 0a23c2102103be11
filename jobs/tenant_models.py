"""The tables of who may ask and who is told: projects, keys, audit, receipts of creates, webhooks.

The rules of `jobs.models` hold here too: rows never leave `jobs`, times are Unix seconds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from jobs.base import Base, Document, Serial


class ProjectRow(Base):
    """A tenant: what belongs to one project is invisible to all others. A limit of None is no limit."""

    __tablename__ = "projects"
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]
    archived_at: Mapped[float | None]
    queued_jobs: Mapped[int | None]
    running_jobs: Mapped[int | None]
    storage_bytes: Mapped[int | None]
    requests_per_minute: Mapped[int | None]


class ServiceAccountRow(Base):
    """A name that keys of one project are made for; removing it ends its keys."""

    __tablename__ = "service_accounts"
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]


class KeyRow(Base):
    """An API key; only the hash of its secret is kept, and rows stay when keys end, since audit rows name them."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    secret_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    scopes: Mapped[list[Any]] = mapped_column(Document, default=list)
    # The end of the secret, by which a person tells keys apart.
    hint: Mapped[str] = mapped_column(String(8), default="")
    service_account: Mapped[str | None] = mapped_column(String(40))
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class AuditRow(Base):
    """Who changed what; written in the transaction of the change itself."""

    __tablename__ = "audit_logs"
    __table_args__ = (Index(None, "project", "seq"),)
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    type: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(700))
    changed: Mapped[list[Any]] = mapped_column(Document)
    actor: Mapped[str] = mapped_column(String(16))
    key_id: Mapped[str | None] = mapped_column(String(40))
    operation: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(40))


class ReceiptRow(Base):
    """One attempt to create something, and the answer that it was given.

    `key` is the client's Idempotency-Key; without one, the row is an entry in the log of attempts by which a retry of
    OpenAI's clients is known. `body` is written in the transaction of what it created, by whoever holds `token`.
    """

    __tablename__ = "receipts"
    __table_args__ = (
        UniqueConstraint("project", "scope", "key"),
        Index(None, "key_id", "fingerprint"),
    )
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    token: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(String(200))
    key: Mapped[str | None] = mapped_column(String(255))
    key_id: Mapped[str] = mapped_column(String(40))
    fingerprint: Mapped[str] = mapped_column(String(64))
    retry: Mapped[int]
    created_at: Mapped[float] = mapped_column(index=True)
    status: Mapped[int | None]
    body: Mapped[str | None] = mapped_column(Text)


class SecretRow(Base):
    """What a project's jobs need to speak to other services; readable here alone, and told to nobody again."""

    __tablename__ = "secrets"
    __table_args__ = (UniqueConstraint("project", "name"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    value: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[float]


class WebhookRow(Base):
    """An address of a project that is told of events. The secret must be readable: signing needs it."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index(None, "project", "seq"),)
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    url: Mapped[str] = mapped_column(String(2048))
    event_types: Mapped[list[Any]] = mapped_column(Document)
    secret: Mapped[str] = mapped_column(String(64))
    old_secret: Mapped[str | None] = mapped_column(String(64))
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    disabled_at: Mapped[float | None]


class DeliveryRow(Base):
    """An event on its way to one address; written in the transaction of the event, so that none is lost or made up."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index(None, "status", "next_at"), Index(None, "endpoint_id", "seq"))
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(String(40))
    event_type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float]
    status: Mapped[str] = mapped_column(String(12))
    tries: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float]
    tried_at: Mapped[float | None]
    response_status: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(Text)
