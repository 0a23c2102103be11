"""OpenAI's Model: local base models and the results of jobs."""

from typing import Literal, Self

from pydantic import BaseModel

from jobs.names import checkpoint_step
from jobs.spec import ModelRecord


class Model(BaseModel):
    """A model that can be trained further; `base` and `job` say where it comes from, `checkpoint` after which step."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    base: str | None = None
    job: str | None = None
    checkpoint: int | None = None

    @classmethod
    def of(cls, record: ModelRecord) -> Self:
        """A result as a client sees it."""
        return cls(
            id=record.id,
            created=int(record.created_at),
            owned_by=record.project,
            base=record.base,
            job=record.job_id,
            checkpoint=checkpoint_step(record.id),
        )
