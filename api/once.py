"""The one way to create: sending a request again creates nothing, and is answered with the bytes of the first time.

A route that creates takes a `Once` and calls `run` with the fingerprint of what was sent, a function that creates in the
store (handing it the receipt), and one that makes the answer. `jobs.receipts` says what counts as the same request. A
duplicate waits here while the first is being answered; only after that it is told to come back, since OpenAI's clients
retry a 409 but twice.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.background import BackgroundTask

from api.auth import Caller
from api.deps import App
from api.errors import ERRORS, ApiError, translate
from jobs.errors import InProgress, StoreUnavailable
from jobs.receipts import Attempt, Receipt

log = logging.getLogger(__name__)
R = TypeVar("R")

HOLD_SECONDS = 30.0
ASK_SECONDS = 0.2
# What a route that creates may answer besides its own codes.
CODES = ("idempotency_key_reused", "idempotency_in_progress")


def fingerprint(body: Any) -> str:
    """Of a JSON body, however its keys are ordered."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Once:
    """What one request says of being sent again; a dependency, by which `api.auth` knows routes that create."""

    creates = True

    def __init__(
        self,
        request: Request,
        app: App,
        key: Caller,
        idempotency_key: Annotated[
            str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")
        ] = None,
        x_stainless_retry_count: Annotated[int, Header(ge=0, include_in_schema=False)] = 0,
    ) -> None:
        self._store, self._caller = app.store, key
        self._refused: ApiError | None = getattr(request.state, "refused", None)
        self._scope = f"{request.method} {request.url.path}"
        self._key, self._retry = idempotency_key, x_stainless_retry_count

    async def run(
        self,
        print_of_body: str,
        make: Callable[[Receipt], R],
        render: Callable[[R], BaseModel],
        *,
        location: str,
        then: Callable[[], None] | None = None,
    ) -> Response:
        """Create, or answer as before. `location` is the list's path: the new object lies below it.

        `then` is called once the answer is on its way.
        """
        response = await self._run(print_of_body, make, render, location)
        if then is not None:
            response.background = BackgroundTask(then)
        return response

    async def _run(
        self,
        print_of_body: str,
        make: Callable[[Receipt], R],
        render: Callable[[R], BaseModel],
        location: str,
    ) -> Response:
        said: list[str] = []

        def text(record: Any) -> str:
            # Rendered once: what is kept for a repetition is what is answered now.
            if not said:
                said.append(render(record).model_dump_json())
            return said[0]

        attempt = Attempt(
            project=self._caller.project,
            key_id=self._caller.id,
            scope=self._scope,
            fingerprint=print_of_body,
            key=self._key,
            retry=self._retry,
        )
        token, body = await self._open(attempt)
        if token is None:
            self._may_go_on()
        if body is not None:
            how = "true" if self._key else "inferred"
            return _answer(body, location, {"Idempotent-Replayed": how})
        assert token is not None  # noqa: S101 - one of both is there
        try:
            self._may_go_on()
            record = await run_in_threadpool(make, Receipt(token=token, render=text))
        except Exception as error:
            status = ERRORS[translate(error).code].status
            try:
                await run_in_threadpool(self._store.close_receipt, token, status)
            except StoreUnavailable as away:
                log.warning("The attempt is not closed, it ends by itself: %s", away)
            raise
        return _answer(text(record), location)

    def _may_go_on(self) -> None:
        if self._refused is not None:
            raise self._refused

    async def _open(self, attempt: Attempt) -> tuple[str | None, str | None]:
        until = time.monotonic() + HOLD_SECONDS
        while True:
            opened = await run_in_threadpool(self._store.open_receipt, attempt)
            if opened.token is not None or opened.body is not None:
                return opened.token, opened.body
            if time.monotonic() > until:
                raise InProgress("The same request is still being answered")
            await asyncio.sleep(ASK_SECONDS)


def _answer(body: str, location: str, headers: dict[str, str] | None = None) -> Response:
    where = {"Location": f"{location}/{json.loads(body)['id']}"}
    return Response(body, media_type="application/json", headers=where | (headers or {}))


Creating = Annotated[Once, Depends()]
