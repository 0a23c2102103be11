"""The tables. Rows never leave `jobs`: what is handed out are the frozen records of `jobs.spec`.

Times are Unix seconds as floats, the form in which the API speaks them, so no zone is ever converted. `seq` columns
order lists and are the cursors' meaning; public ids are opaque. Work state (owner, heartbeat) lives on the job's row,
because one conditional UPDATE must see all of it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from jobs.states import ChoreStatus, Desired, Stage, Status, UploadStatus

Serial = BigInteger().with_variant(Integer, "sqlite")
Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _one_of(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


class Base(DeclarativeBase):
    """Every constraint has a name, so that migrations can speak of it on both databases."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own way to say it
        int: BigInteger,
        float: Double,
        dict[str, Any]: Document,
        list[Any]: Document,
    }


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


class FileRow(Base):
    """An uploaded file; its bytes lie in the data folder under their hash, once for all rows that have it."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "project", "seq"), Index(None, "sha256"))
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    format: Mapped[str | None] = mapped_column(String(32))
    rows: Mapped[int | None]
    report: Mapped[dict[str, Any]]
    expires_at: Mapped[float | None] = mapped_column(index=True)


class UploadRow(Base):
    """A file that comes in parts; `file_id` once it is complete."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint(_one_of("status", UploadStatus), name="status"),
        Index(None, "status", "expires_at"),
        Index(None, "project", "status"),
    )
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float]
    bytes: Mapped[int]
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    settings: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(String(12))
    file_id: Mapped[str | None] = mapped_column(String(40))


class UploadPartRow(Base):
    """One part of an upload, whole on disk."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int]
    created_at: Mapped[float]


class JobRow(Base):
    """A job: what was asked, what was resolved, where it stands, and who works on it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("status", Status), name="status"),
        CheckConstraint(_one_of("desired", Desired), name="desired"),
        Index(None, "project", "seq"),
        Index(None, "status", "seq"),
    )
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    model: Mapped[str] = mapped_column(String(512))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int | None]
    training_file: Mapped[str] = mapped_column(String(40))
    validation_file: Mapped[str | None] = mapped_column(String(40))
    tags: Mapped[dict[str, Any]] = mapped_column("metadata", Document)
    request: Mapped[dict[str, Any]]

    status: Mapped[str] = mapped_column(String(20))
    desired: Mapped[str] = mapped_column(String(8), default=Desired.RUN)
    detail_state: Mapped[str] = mapped_column(String(64))
    detail_message: Mapped[str] = mapped_column(Text, default="")
    detail_since: Mapped[float]
    version: Mapped[int] = mapped_column(default=1)
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(Document)

    # Fencing and lease: `attempt` rises at every claim and is named by every later write.
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None] = mapped_column(String(64))
    heartbeat_seq: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[float] = mapped_column(default=0.0)

    config: Mapped[dict[str, Any] | None] = mapped_column(Document)
    hyperparameters: Mapped[dict[str, Any] | None] = mapped_column(Document)
    figures: Mapped[dict[str, Any] | None] = mapped_column(Document)
    warnings: Mapped[list[Any]] = mapped_column(Document, default=list)
    total_steps: Mapped[int | None]
    progress_step: Mapped[int | None]
    loss: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    omission_rate_mlp: Mapped[float | None]
    omission_rate_attention: Mapped[float | None]
    eta_seconds: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(String(700))
    summary: Mapped[dict[str, Any] | None] = mapped_column(Document)
    # The file of its metrics.
    result_file: Mapped[str | None] = mapped_column(String(40))


class AttemptRow(Base):
    """One claim of a job: who, when, how it ended, and how far its events were read."""

    __tablename__ = "attempts"
    __table_args__ = (CheckConstraint(_one_of("stage", Stage), name="stage"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[str] = mapped_column(String(8))
    worker_id: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(32))
    # Byte offset in events.jsonl, and the number of the last event before it.
    read_position: Mapped[int] = mapped_column(default=0)
    read_seq: Mapped[int] = mapped_column(default=0)


class EventRow(Base):
    """What is told of a job, in order."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "seq"),)
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(8))
    kind: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(Document)


class MetricRow(Base):
    """One row for each step; step 0 holds the evaluation before training."""

    __tablename__ = "metrics"
    __table_args__ = (
        # Evaluations are few among millions of steps, and every chart asks for them all.
        Index(
            "ix_metrics_evaluations",
            "job_id",
            "step",
            sqlite_where=text("eval_loss IS NOT NULL"),
            postgresql_where=text("eval_loss IS NOT NULL"),
        ),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    time: Mapped[float]
    tokens: Mapped[int | None]
    loss: Mapped[float | None]
    token_accuracy: Mapped[float | None]
    eval_loss: Mapped[float | None]
    eval_token_accuracy: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    omission_rate_mlp: Mapped[float | None]
    omission_rate_attention: Mapped[float | None]
    awake_share: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    step_seconds: Mapped[float | None]
    flops: Mapped[float | None]
    memory_bytes: Mapped[int | None]


class MetricSpanRow(Base):
    """Where the loss is lowest and highest in a span of steps; `jobs.spans` says why."""

    __tablename__ = "metric_spans"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    span: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    low_step: Mapped[int]
    low_loss: Mapped[float]
    high_step: Mapped[int]
    high_loss: Mapped[float]
    # Whether an omission rate changes in it, or on the way into it.
    changes: Mapped[bool]


class CheckpointRow(Base):
    """A checkpoint counts from the moment its row stands here, written under the fence."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    step: Mapped[int]
    path: Mapped[str] = mapped_column(String(512))
    size_bytes: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    # Where a pinned checkpoint lay in its run folder; null where it is not pinned.
    pinned_from: Mapped[str | None] = mapped_column(String(512))


class ModelRow(Base):
    """A result: a plain Hugging Face folder under the data folder."""

    __tablename__ = "models"
    __table_args__ = (Index(None, "project", "seq"),)
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(700), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    base: Mapped[str] = mapped_column(String(512))
    path: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[float]


class ChoreRow(Base):
    """A small piece of work without a job; the fingerprint is that of (project, kind, subject, params)."""

    __tablename__ = "chores"
    __table_args__ = (
        CheckConstraint(_one_of("status", ChoreStatus), name="status"),
        Index(None, "status", "seq"),
        Index(None, "project", "subject"),
    )
    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    project: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(700))
    params: Mapped[dict[str, Any]]
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    status: Mapped[str] = mapped_column(String(12))
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None] = mapped_column(String(64))
    heartbeat_seq: Mapped[int] = mapped_column(default=0)
    result: Mapped[dict[str, Any] | None] = mapped_column(Document)
    error: Mapped[dict[str, Any] | None] = mapped_column(Document)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class WorkerRow(Base):
    """A worker process that has told of itself."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    hostname: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    slots: Mapped[dict[str, Any]]
    started_at: Mapped[float]
    beat_at: Mapped[float]
    beat_seq: Mapped[int] = mapped_column(default=0)


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
