"""The queue on the wire."""

from typing import Literal, Self

from pydantic import BaseModel

from api.queueing import Place


class QueueLine(BaseModel):
    """One stage, all projects together; `slots` are those of living workers."""

    waiting: int
    running: int
    slots: int
    slots_free: int


class QueuedJob(BaseModel):
    """A waiting job of the asking project."""

    id: str
    stage: str
    position: int
    reason: str
    message: str
    starts_after: float | None
    starts_before: float | None

    @classmethod
    def of(cls, job_id: str, place: Place) -> Self:
        """The place of a job."""
        after, before = place.starts or (None, None)
        return cls(
            id=job_id,
            stage=place.stage.value,
            position=place.position,
            reason=place.reason,
            message=place.message,
            starts_after=after,
            starts_before=before,
        )


class Queue(BaseModel):
    """What waits, what runs, what is free."""

    object: Literal["sat.queue"] = "sat.queue"
    workers: int
    stages: dict[str, QueueLine]
    jobs: list[QueuedJob]
    has_more: bool
