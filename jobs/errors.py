"""What can go wrong between a caller and the store.

    JobsError
    ├── NotFound (LookupError)              no such thing in this project; `.kind` names what was looked for
    ├── InvalidCursor (ValueError)          `after` names nothing in this list
    ├── InvalidModelName (ValueError)       a model name that could leave its root
    ├── FileInUse (ValueError)              jobs that have not ended need the file; `.job_ids`
    ├── IdempotencyMismatch (ValueError)    the key was used with another body; `.job_id`
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
        """`kind` is one of file, job, model, checkpoint."""
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


class IdempotencyMismatch(JobsError, ValueError):
    """The idempotency key was used with another body."""

    job_id: str = ""


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
