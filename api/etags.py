"""Answers that a client may have already: `ETag` and `If-None-Match`, with 304 left to the route."""

from typing import Annotated

from fastapi import Header

IfNoneMatch = Annotated[str | None, Header()]


def tagged(version: str, if_none_match: str | None) -> tuple[dict[str, str], bool]:
    """Headers of an answer with this version, weakly compared, and whether the client has it."""
    tag = f'"{version}"'
    headers = {"etag": f"W/{tag}", "cache-control": "private, no-cache"}
    return headers, bool(if_none_match and tag in if_none_match)
