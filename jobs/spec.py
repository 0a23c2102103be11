"""The records that leave the store: frozen, complete, without a session behind them.

The road not taken is handing out ORM rows: a row that reads lazily after its transaction has ended shows a state that
never was, or fails.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jobs.states import Stage

T = TypeVar("T")


def new_id(prefix: str) -> str:
    """An opaque id with 96 random bits, such as `ftjob-…` for prefix "ftjob-"."""
    return prefix + secrets.token_hex(12)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A valid API key, and what its project may ask for in a minute."""

    id: str
    project: str
    name: str
    scopes: frozenset[str]
    requests_per_minute: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a project may have at once; None is no limit."""

    queued_jobs: int | None = None
    running_jobs: int | None = None
    storage_bytes: int | None = None
    requests_per_minute: int | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a project has now."""

    queued_jobs: int
    running_jobs: int
    storage_bytes: int


@dataclass(frozen=True, kw_only=True)
class ProjectRecord:
    """A tenant."""

    id: str
    name: str
    created_at: float
    archived_at: float | None


@dataclass(frozen=True, kw_only=True)
class ServiceAccountRecord:
    """A name that keys are made for."""

    id: str
    project: str
    name: str
    created_at: float


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """An API key as its administrators see it; the secret is known to its owner alone."""

    id: str
    project: str
    name: str
    hint: str
    scopes: list[str]
    service_account: str | None
    created_at: float
    last_used_at: float | None
    expires_at: float | None


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """Who changed what."""

    id: str
    project: str
    created_at: float
    type: str
    target: str
    changed: list[str]
    actor: str
    key_id: str | None
    operation: str
    request_id: str


@dataclass(frozen=True, kw_only=True)
class WebhookRecord:
    """An address that is told of events."""

    id: str
    project: str
    name: str
    url: str
    event_types: list[str]
    secret: str = field(repr=False)
    created_at: float
    updated_at: float
    disabled_at: float | None


@dataclass(frozen=True, kw_only=True)
class DeliveryRecord:
    """An event on its way to one address; `status` is pending, delivered or failed."""

    id: str
    endpoint_id: str
    event_id: str
    event_type: str
    body: str
    created_at: float
    status: str
    tries: int
    next_at: float
    tried_at: float | None
    response_status: int | None
    error: str | None


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file whose bytes lie, whole, in the data folder under their hash; `status` is uploaded, processed or error."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    format: str | None = None
    rows: int | None = None
    report: dict[str, Any] = field(default_factory=dict)
    status: str = "processed"
    created_at: float = field(default_factory=time.time)
    expires_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class FileRecord(NewFile):
    """A registered file; `report` is what the row-by-row check found."""

    seq: int
    project: str


@dataclass(frozen=True, kw_only=True)
class NewUpload:
    """A file that will come in parts; `settings` are what its check will need."""

    bytes: int
    filename: str
    purpose: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class UploadRecord(NewUpload):
    """A file that comes in parts; `file` once it is complete, and as long as that exists."""

    id: str
    project: str
    created_at: float
    expires_at: float
    status: str
    file_id: str | None
    file: FileRecord | None = None


@dataclass(frozen=True, kw_only=True)
class UploadPart:
    """One part, whole on disk."""

    id: str
    upload_id: str
    bytes: int
    created_at: float


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as asked for, already checked; `request` is the canonical run request."""

    request: dict[str, Any]
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    integrations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as it stood at one moment. Times are Unix seconds."""

    seq: int
    id: str
    project: str
    created_at: float
    status: str
    desired: str
    detail_state: str
    detail_message: str
    detail_since: float
    version: int
    attempt: int
    failures: int
    owner: str | None
    model: str
    request: dict[str, Any]
    config: dict[str, Any] | None
    hyperparameters: dict[str, Any] | None
    figures: dict[str, Any] | None
    warnings: tuple[str, ...]
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: dict[str, str]
    integrations: list[dict[str, Any]] | None
    error: dict[str, Any] | None
    fine_tuned_model: str | None
    trained_tokens: int | None
    started_at: float | None
    finished_at: float | None
    progress_step: int | None
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    omission_rate_mlp: float | None
    omission_rate_attention: float | None
    eta_seconds: float | None
    summary: dict[str, Any] | None
    result_file: str | None


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """`type` and `level` are OpenAI's; `kind` is finer: state, message, metrics, evaluation, checkpoint, sample."""

    seq: int
    id: str
    job_id: str
    created_at: float
    level: str
    type: str
    kind: str
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """`path` is relative to the data folder; `artifacts.absolute` finds it."""

    seq: int
    id: str
    job_id: str
    attempt: int
    step: int
    path: str
    size_bytes: int
    metrics: dict[str, Any]
    created_at: float
    pinned_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A result; `id` is its public name `ft:…`, `path` is relative to the data folder."""

    seq: int
    id: str
    project: str
    job_id: str
    base: str
    path: str
    created_at: float


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A worker; alive where `beat_seq` moves."""

    id: str
    hostname: str
    pid: int
    slots: dict[str, Any]
    hardware: dict[str, Any] | None
    integrations: list[str] | None
    started_at: float
    beat_at: float
    beat_seq: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to work on a job, good until a newer attempt exists.

    `seconds` were spent on earlier attempts at the same stage, of which `memory_lacks` ended for lack of memory. `read` says,
    by the number of each of them, how many bytes of its events were recorded.
    """

    job: JobRecord
    attempt: int
    stage: Stage
    worker_id: str
    read: Mapping[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    memory_lacks: int = 0

    @property
    def job_id(self) -> str:
        """The claimed job's id."""
        return self.job.id


@dataclass(frozen=True, kw_only=True)
class ChoreRecord:
    """A small piece of work without a job; as `claim_chore` returns it, also the right to work on it."""

    seq: int
    id: str
    project: str
    kind: str
    subject: str
    params: dict[str, Any]
    status: str
    attempt: int
    failures: int
    owner: str | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One observation of a held job, or of a held chore."""

    job_id: str
    attempt: int
    heartbeat_seq: int
    owner: str


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """Part of a list; ask again with `after` = the last item's id while `has_more`."""

    items: tuple[T, ...]
    has_more: bool
