"""The life of a job, in one table.

`status` is what OpenAI's clients know; `detail_state` says more and moves freely while a status lasts. A prepare claim
leaves the status at `validating_files`, because to a client the data are still being looked at. The road not taken is
a status per stage: unmodified clients fail on a status they do not know.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """OpenAI's six, and `paused`, which OpenAI itself also returns."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stage(StrEnum):
    """What a claim is for, and with that the kind of slot it needs."""

    PREPARE = "prepare"
    TRAIN = "train"


class Desired(StrEnum):
    """What people want of a job; its owner reads it at each heartbeat."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class ChoreStatus(StrEnum):
    """The life of a chore, a small piece of work without a job."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class IntegrationStatus(StrEnum):
    """Whether an integration is still sent to: until it has all, or was tried in vain too often."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


class UploadStatus(StrEnum):
    """OpenAI's four states of a file that comes in parts."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})
ACTIVE = frozenset(Status) - TERMINAL

TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.VALIDATING_FILES: frozenset(
        {Status.QUEUED, Status.FAILED, Status.PAUSED, Status.CANCELLED}
    ),
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.CANCELLED}),
    # Back to queued: its worker died, crashed, or was told to shut down.
    Status.RUNNING: frozenset(
        {Status.SUCCEEDED, Status.FAILED, Status.PAUSED, Status.CANCELLED, Status.QUEUED}
    ),
    # Back to where it was paused: before its data were ready, or after.
    Status.PAUSED: frozenset({Status.VALIDATING_FILES, Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}

# Which status a job must have for a stage to claim it, and which one it has while claimed.
WAITING: dict[Stage, Status] = {Stage.PREPARE: Status.VALIDATING_FILES, Stage.TRAIN: Status.QUEUED}
HELD: dict[Stage, Status] = {Stage.PREPARE: Status.VALIDATING_FILES, Stage.TRAIN: Status.RUNNING}


def allowed(source: Status, target: Status) -> bool:
    """Whether a job may go from `source` to `target`; staying is no transition and always allowed while it lives."""
    return target in TRANSITIONS[source] or (source is target and source in ACTIVE)
