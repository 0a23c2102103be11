"""What can go wrong between a caller and the store.

    JobsError
    ├── NotFound (LookupError)              no such thing in this project; `.kind` names what was looked for
    ├── InvalidCursor (ValueError)          `after` names nothing in this list
    ├── InvalidModelName (ValueError)       a model name that could leave its root
    ├── FileInUse (ValueError)              jobs that have not ended need the file; `.job_ids`
    ├── ModelInUse (ValueError)             jobs that have not ended start from the model; `.job_ids`
    ├── IdempotencyMismatch (ValueError)    the key was used with another body
    ├── InProgress (RuntimeError)           an equal request is being answered
    ├── QuotaExceeded (ValueError)          the project is at a limit; `.quota`
    ├── LastAdminKey (ValueError)           without this key nobody could administer the service
    ├── NotArchivable (ValueError)          the project must stay
    ├── UploadClosed (ValueError)           an upload that takes no more parts; `.status`
    ├── PartsMismatch (ValueError)          parts that do not make the file that was announced
    ├── JobTerminal (ValueError)            the job has ended; `.status`
    ├── JobNotPausable (ValueError)         pause or resume from a state that does not allow it; `.status`
    ├── LeaseLost (RuntimeError)            another attempt owns the job: stand down, write nothing
    └── StoreUnavailable (ConnectionError)  the database does not answer: try again later, nothing was written

The tree knows no HTTP: the edge translates. Every class takes a plain message, so that it pickles.
"""

from __future__ import annotations


class JobsError(Exception):
    """Root of the tree; the message is fit for a user."""


class NotFound(JobsError, LookupError):
    """No such thing in this project; things of other projects look the same."""

    kind: str = "object"

    @classmethod
    def of(cls, kind: str, ident: str) -> NotFound:
        """`kind` names what was looked for: file, job, model, checkpoint, project, key, ...."""
        error = cls(f"No such {kind}: {ident}")
        error.kind = kind
        return error


class InvalidCursor(JobsError, ValueError):
    """`after` names nothing in this list."""


class InvalidModelName(JobsError, ValueError):
    """A model name that is not a plain folder name under its root."""


class FileInUse(JobsError, ValueError):
    """Jobs that have not ended need the file."""

    job_ids: tuple[str, ...] = ()


class ModelInUse(JobsError, ValueError):
    """Jobs that have not ended start from the model."""

    job_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, job_ids: tuple[str, ...], message: str) -> ModelInUse:
        """`job_ids` are those jobs."""
        error = cls(message)
        error.job_ids = job_ids
        return error


class IdempotencyMismatch(JobsError, ValueError):
    """The idempotency key was used with another body."""


class InProgress(JobsError, RuntimeError):
    """An equal request is being answered; ask again in a moment."""


class QuotaExceeded(JobsError, ValueError):
    """The project is at one of its limits."""

    quota: str = ""

    @classmethod
    def of(cls, quota: str, message: str) -> QuotaExceeded:
        """`quota` is queued_jobs or storage_bytes."""
        error = cls(message)
        error.quota = quota
        return error


class LastAdminKey(JobsError, ValueError):
    """Without this key nobody could administer the service."""


class NotArchivable(JobsError, ValueError):
    """The project must stay."""


class UploadClosed(JobsError, ValueError):
    """The upload is complete, cancelled or expired."""

    status: str = ""


class PartsMismatch(JobsError, ValueError):
    """The parts of an upload do not make the file that was announced."""


class JobTerminal(JobsError, ValueError):
    """The job has ended, and ended jobs never change."""

    status: str = ""


class JobNotPausable(JobsError, ValueError):
    """Pause or resume from a state that does not allow it."""

    status: str = ""


class LeaseLost(JobsError, RuntimeError):
    """A newer attempt owns the job: whoever sees this stands down and writes nothing."""


class StoreUnavailable(JobsError, ConnectionError):
    """The database does not answer, or gave up; nothing was written."""
