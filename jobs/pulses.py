"""What followers of jobs ask for again and again: has anything changed, and what was told since.

Every change of a job raises its `version` in the same transaction, and the events of one job are written under the lock
of its row, so their numbers grow in the order of commits: whoever asks for events after a number misses none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import bindparam, func, select

from jobs.errors import InvalidCursor, NotFound
from jobs.library import record_of
from jobs.models import EventRow, JobRow
from jobs.spec import EventRecord
from jobs.states import TERMINAL, Status
from jobs.transactions import Transactions


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """A job in a few numbers."""

    version: int
    status: str
    progress_step: int | None
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    omission_rate_mlp: float | None
    omission_rate_attention: float | None

    @property
    def ended(self) -> bool:
        """Whether nothing will be told any more."""
        return Status(self.status) in TERMINAL


_COLUMNS = tuple(getattr(JobRow, name) for name in Pulse.__dataclass_fields__)
_PULSE = select(*_COLUMNS).where(
    JobRow.project == bindparam("project"), JobRow.id == bindparam("job_id")
)


class Pulses(Transactions):
    """Pulses of the jobs of the store."""

    def pulse(self, project: str, job_id: str) -> Pulse:
        """One job, cheaply. Raises NotFound."""
        with self.looking() as connection:
            row = connection.execute(_PULSE, {"project": project, "job_id": job_id}).one_or_none()
        if row is None:
            raise NotFound.of("job", job_id)
        return Pulse(**row._mapping)

    def pulses(self, job_ids: Collection[str]) -> dict[str, Pulse]:
        """Those of the jobs that exist, in one question, whoever's they are."""
        with self.reading() as session:
            query = select(JobRow.id, *_COLUMNS).where(JobRow.id.in_(job_ids))
            found = (dict(row._mapping) for row in session.execute(query))
            return {str(values.pop("id")): Pulse(**values) for values in found}

    def last_event(self, job_id: str) -> int:
        """The number of the newest event of a job; 0 where it has none."""
        with self.reading() as session:
            query = select(func.max(EventRow.seq)).where(EventRow.job_id == job_id)
            return session.scalar(query) or 0

    def event_number(self, job_id: str, cursor: str) -> int:
        """The number that a cursor means: an event's id, or the number itself. Raises InvalidCursor."""
        if cursor.isascii() and cursor.isdigit() and len(cursor) <= 18:
            return int(cursor)
        with self.reading() as session:
            query = select(EventRow.seq).where(EventRow.job_id == job_id, EventRow.id == cursor)
            number = session.scalar(query)
        if number is None:
            raise InvalidCursor(f"after {cursor!r} names no event of {job_id}")
        return number

    def events_after(self, job_id: str, number: int, *, limit: int) -> list[EventRecord]:
        """What was told after an event, oldest first, whoever's the job is."""
        with self.reading() as session:
            query = (
                select(EventRow)
                .where(EventRow.job_id == job_id, EventRow.seq > number)
                .order_by(EventRow.seq)
                .limit(limit)
            )
            return [record_of(EventRecord, row) for row in session.scalars(query)]
