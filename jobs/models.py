"""The tables. Rows never leave `jobs`: what is handed out are the frozen records of `jobs.spec`.

Times are Unix seconds as floats, the form in which the API speaks them, so no zone is ever converted. `seq` columns
order lists and are the cursors' meaning; public ids are opaque. Work state (owner, heartbeat) lives on the job's row,
because one conditional UPDATE must see all of it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from jobs.base import Base, Document, Serial, one_of
from jobs.states import ChoreStatus, Desired, IntegrationStatus, Stage, Status, UploadStatus


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
        CheckConstraint(one_of("status", UploadStatus), name="status"),
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
        CheckConstraint(one_of("status", Status), name="status"),
        CheckConstraint(one_of("desired", Desired), name="desired"),
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

    # What the queue goes by, from `request`: the higher the sooner, and what a worker must have to train it.
    priority: Mapped[int] = mapped_column(default=0)
    needs_device: Mapped[str | None] = mapped_column(String(8))
    needs_memory: Mapped[int | None]

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
    integrations: Mapped[list[Any] | None]
    # What was said before its first step of what it would take; large, and only reports and later quotes ask for it.
    quote: Mapped[dict[str, Any] | None] = mapped_column(Document, deferred=True)


class AttemptRow(Base):
    """One claim of a job: who, when, how it ended, and how far its events were read."""

    __tablename__ = "attempts"
    __table_args__ = (CheckConstraint(one_of("stage", Stage), name="stage"),)
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
    # What its GPUs spent, by their own meter; null where there is none.
    energy_joules: Mapped[float | None]


class IntegrationRow(Base):
    """A tracker of experiments that a job's metrics are sent to; its settings are entry `number` of the job's own list.

    Whoever holds `owner` sends, and says so again before `next_at`. `step` is the last one that has arrived.
    """

    __tablename__ = "integrations"
    __table_args__ = (
        CheckConstraint(one_of("status", IntegrationStatus), name="status"),
        Index(None, "status", "next_at"),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(8))
    step: Mapped[int] = mapped_column(default=-1)
    # Its run there, by URL where there is one.
    run: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    failures: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None] = mapped_column(String(40))
    next_at: Mapped[float]


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
        CheckConstraint(one_of("status", ChoreStatus), name="status"),
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
    # What it trains on: `device`, `name`, `memory_bytes` of one of its kind.
    hardware: Mapped[dict[str, Any] | None] = mapped_column(Document)
    # Types of integrations whose library it has.
    integrations: Mapped[list[Any] | None]
    started_at: Mapped[float]
    beat_at: Mapped[float]
    beat_seq: Mapped[int] = mapped_column(default=0)
