"""Lists: OpenAI's envelope, and the query that asks for a page of one."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel

T = TypeVar("T", bound=BaseModel)

After = Annotated[str | None, Query(description="Id of the last item of the page before.")]
Order = Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")]


class ListOf(BaseModel, Generic[T]):
    """A page; the next one is the same query with `after` = `last_id` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, items: Sequence[T], *, has_more: bool) -> Self:
        """The envelope around `items`."""
        ids = [str(getattr(item, "id", "")) for item in items]
        return cls(
            data=list(items),
            has_more=has_more,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
        )


class Deleted(BaseModel):
    """What a DELETE answers: 200 with a body, since clients parse one."""

    id: str
    object: str
    deleted: Literal[True] = True
