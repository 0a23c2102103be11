"""`/v1/chat/completions`: to try a model, not to serve one. `docs/serving.md` says what is for that."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import chats
from api.auth import Caller, require_key
from api.chats import Gone, Lines
from api.datasets import model_version
from api.deps import App, Services
from api.errors import ApiError, error_body, request_id_of
from api.named import model_exists
from api.schemas.bodies import described
from api.schemas.chat import (
    Answer,
    ChatBody,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Usage,
    read_chat,
)
from api.schemas.problems import answers
from api.streams import DONE, HEARTBEAT_SECONDS, PING, EventStream
from jobs.errors import InvalidModelName

router = APIRouter(prefix="/v1/chat", tags=["chat"], dependencies=[Depends(require_key)])

# How soon it is noticed that a client has left which waits for a whole answer.
LOOK_SECONDS = 1.0
Paced = AsyncIterator[dict[str, Any] | None]
STREAMED: dict[str, Any] = {
    "description": "The answer; with stream: true, pieces of it as server-sent events.",
    "model": ChatCompletion,
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post(
    "/completions",
    operation_id="createChatCompletion",
    response_model=None,
    openapi_extra=described(ChatBody),
    responses={
        200: STREAMED,
        **answers(
            *chats.CODES,
            "model_not_found",
            "unsupported_parameter",
            "unknown_parameter",
            "missing_required_parameter",
            "invalid_value",
            "invalid_request",
            "conflicting_parameters",
            "request_too_large",
            "too_many_streams",
            "queue_quota_exceeded",
        ),
    },
)
async def create_chat_completion(request: Request, app: App, key: Caller) -> Response:
    """The model's answer to a conversation. A model that is not loaded is loaded now, where a slot is free."""
    body = await read_chat(request)
    ask = body.asked()
    version = await run_in_threadpool(_version, app, key.project, body.model)
    async with AsyncExitStack() as stack:
        app.followers.take_seat(key.id)
        stack.callback(app.followers.leave_seat, key.id)
        lines = await stack.enter_async_context(
            app.chats.asking(key.project, body.model, version, ask, request.is_disconnected)
        )
        check = partial(app.followers.check_key, key.id)
        if not body.stream:
            whole = await _whole(body, _paced(lines, LOOK_SECONDS, check), request.is_disconnected)
            return Response(whole.model_dump_json(), media_type="application/json")
        paced = _paced(lines, HEARTBEAT_SECONDS, check)
        blocks = _blocks(body, paced, request_id_of(request))
        return EventStream(blocks, closed=stack.pop_all().aclose)


def _version(app: Services, project: str, name: str) -> str | None:
    try:
        model_exists(app, project, name)
    except (ApiError, InvalidModelName) as error:
        raise ApiError(
            "model_not_found",
            f"No model {name!r} is here; GET /v1/models lists those that are, ORG/NAME is one of the hub.",
            "model",
        ) from error
    return model_version(app, name)


async def _whole(body: ChatBody, lines: Paced, gone: Gone) -> ChatCompletion:
    told: dict[str, Any] = {}
    texts = []
    async for line in lines:
        if await gone():
            break
        texts.append((line or {}).get("text", ""))
        told |= line or {}
    message = Answer(content="".join(texts))
    return ChatCompletion(
        **_head(body),
        choices=[Choice(message=message, finish_reason=told.get("finish_reason", "stop"))],
        usage=_usage(told),
    )


async def _blocks(body: ChatBody, lines: Paced, request_id: str) -> AsyncIterator[str]:
    head = _head(body)
    # `usage: null` stands in a piece only where usage was asked for.
    left_out = set() if body.include_usage else {"usage"}

    def block(choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        chunk = ChatCompletionChunk(**head, choices=choices, usage=usage)
        return f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"

    told: dict[str, Any] = {}
    yield block([ChunkChoice(delta=Delta(role="assistant", content=""))])
    try:
        async for line in lines:
            told |= line or {}
            if line is None:
                yield PING
            elif "text" in line:
                yield block([ChunkChoice(delta=Delta(content=line["text"]))])
            elif "finish_reason" in line:
                yield block([ChunkChoice(delta=Delta(), finish_reason=line["finish_reason"])])
    except ApiError as error:
        # The answer has begun, so the error is a block.
        yield f"data: {json.dumps(error_body(error, request_id))}\n\n"
        return
    if body.include_usage:
        yield block([], _usage(told))
    yield DONE


async def _paced(lines: Lines, seconds: float, check: Callable[[], None]) -> Paced:
    """The lines, and None whenever none came for so long; before each, `check` may raise."""
    coming = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(lines, None))
            await asyncio.wait({coming}, timeout=seconds)
            check()
            if not coming.done():
                yield None
                continue
            line, coming = coming.result(), None
            if line is None:
                return
            yield line
    finally:
        if coming is not None:
            coming.cancel()


def _head(body: ChatBody) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model,
    }


def _usage(told: dict[str, Any]) -> Usage:
    prompt, answer = told.get("prompt_tokens", 0), told.get("completion_tokens", 0)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)
