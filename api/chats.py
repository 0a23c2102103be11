"""Models that answer: found, waited for while they load, and spoken to.

A chat is a chore that a worker holds (`jobs.chores.CHAT`); its row says where the model listens and with which token. The
API goes there directly, so no message passes the database, and leaving the connection ends the answer. A model that is
not there is asked for and waited for as long as proxies hold a request; after that the client is told to come back,
which OpenAI's clients do by themselves. A slot that trains is never waited for: that may take hours.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from fastapi.concurrency import run_in_threadpool

from api.errors import ERRORS, ApiError
from api.queueing import Queueing
from jobs.chores import CHAT
from jobs.queue import Bell
from jobs.spec import ChoreRecord
from jobs.states import ChoreStatus, Stage
from jobs.store import Store

LOADING_SECONDS = 50.0
ASK_SECONDS = 0.25
# Between two pieces of an answer; a long prompt on a CPU takes minutes before the first.
SILENCE_SECONDS = 600.0
CODES = ("model_loading", "gpu_busy", "context_length_exceeded", "model_unsupported")

Gone = Callable[[], Awaitable[bool]]
Lines = AsyncIterator[dict[str, Any]]


class Chats:
    """The way to every model that answers."""

    def __init__(self, store: Store, bell: Bell, queueing: Queueing) -> None:
        self._store, self._bell, self._queueing = store, bell, queueing
        # No proxy of the environment stands between the API and its workers.
        self._http = httpx.AsyncClient(
            trust_env=False, timeout=httpx.Timeout(SILENCE_SECONDS, connect=5)
        )

    async def close(self) -> None:
        """Leave all connections."""
        await self._http.aclose()

    @asynccontextmanager
    async def asking(
        self, project: str, model: str, version: str | None, ask: dict[str, Any], gone: Gone
    ) -> AsyncIterator[Lines]:
        """The lines of an answer, which `sat_io.chat` describes; it ends with the block.

        Args:
            project: whose the chat is.
            model: a model of the project, which exists.
            version: changes with the files of a local model.
            ask: what to answer, and how.
            gone: whether the client has left.

        Raises:
            ApiError: the model cannot be had now, cannot be had at all, or refuses.
        """
        response = await self._open(project, model, {"model_version": version}, ask, gone)
        try:
            if not response.is_success:
                raise _told(json.loads(await response.aread()))
            yield _lines(response)
        finally:
            await response.aclose()

    async def _open(
        self, project: str, model: str, params: dict[str, Any], ask: dict[str, Any], gone: Gone
    ) -> httpx.Response:
        until = time.monotonic() + LOADING_SECONDS
        while True:
            place = await self._place(project, model, params, until, gone)
            headers = {"authorization": f"Bearer {place['token']}"}
            request = self._http.build_request("POST", place["url"], json=ask, headers=headers)
            # It may have just left, or died with its worker, and its port may be another one's by now; the row follows
            # within a lease.
            with suppress(httpx.TransportError):
                response = await self._http.send(request, stream=True)
                if response.status_code != httpx.codes.UNAUTHORIZED:
                    return response
                await response.aclose()
            if time.monotonic() > until or await gone():
                raise _loading(model)
            await asyncio.sleep(ASK_SECONDS)

    async def _place(
        self, project: str, model: str, params: dict[str, Any], until: float, gone: Gone
    ) -> dict[str, str]:
        """Where the model listens (url, token), once it does."""
        rung = None
        while True:
            chat = await run_in_threadpool(self._store.ask_chore, project, CHAT, model, params)
            if chat.result is not None:
                return chat.result
            if chat.status == ChoreStatus.FAILED:
                raise _told(chat.error or {})
            late = time.monotonic() > until or await gone()
            if chat.status == ChoreStatus.WAITING:
                await run_in_threadpool(self._refuse_busy, chat, late)
                if chat.id != rung:
                    rung = chat.id
                    await run_in_threadpool(self._bell.ring)
            elif late:
                raise _loading(model)
            await asyncio.sleep(ASK_SECONDS)

    def _refuse_busy(self, chat: ChoreRecord, late: bool) -> None:
        """Raises ApiError where no slot will soon be free, and wakes nobody for the model later."""
        seen = self._queueing.snapshot()
        slots, training = seen.slots[Stage.TRAIN], len(seen.lines[Stage.TRAIN].left)
        if training < slots and not late:
            return
        self._store.withdraw_chore(chat.project, chat.id)
        others = "" if training >= slots else ", and models that answer hold the rest"
        why = f"{training} of {slots} slots train{others}" if slots else "no worker is alive"
        raise ApiError(
            "gpu_busy",
            f"No slot is free to load {chat.subject}: {why}. Training comes first; try again later.",
            headers={"retry-after": "5"},
        )


async def _lines(response: httpx.Response) -> Lines:
    """Each line that is not an error; an end without an end is one. Raises ApiError."""
    ended = False
    try:
        async for line in response.aiter_lines():
            told = json.loads(line)
            if "code" in told:
                raise _told(told)
            ended = "finish_reason" in told
            yield told
    except httpx.TransportError:
        pass
    if not ended:
        raise ApiError(
            "gpu_busy",
            "The model was unloaded while it answered: a job took its slot, or its worker has ended. Try again.",
            headers={"retry-after": "5"},
        )


def _told(error: dict[str, Any]) -> ApiError:
    """An error of the model's process; what only a job can have becomes a plain one."""
    code = error.get("code", "")
    busy = {"retry-after": "5"} if code == "gpu_busy" else {}
    code = code if code in ERRORS else "model_unsupported"
    return ApiError(code, error["message"], error.get("param"), headers=busy)


def _loading(model: str) -> ApiError:
    return ApiError(
        "model_loading",
        f"{model} is being loaded; try again in a moment.",
        headers={"retry-after": "3"},
    )
