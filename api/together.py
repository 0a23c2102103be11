"""Quick questions to the store that many requests ask at once: one trip to a thread answers all, equal ones are asked once.

Under load most of a poll's cost is going to a thread and coming back, and most polls of a moment ask the same. Whoever asks
while the thread is at it is answered by the next trip. So every answer is younger than its question, nothing is kept, and a
revoked key is refused by the next request, in whatever process it was revoked. The road not taken is to remember keys
and versions for a moment: it saves the same and must be told of every change.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")
Questions = dict[tuple[Callable[..., Any], tuple[Any, ...]], "Future[Any]"]


class Together:
    """For functions that only read and take about a millisecond: they share one thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="together")
        self._asked: Questions = {}
        self._answered = asyncio.Event()
        self._away = False

    async def ask(self, function: Callable[..., R], *args: Any) -> R:
        """What `function(*args)` returns or raises; equal functions and arguments are one question."""
        answer: Future[R] = self._asked.setdefault((function, args), Future())
        answered = self._answered
        if not self._away:
            self._away = True
            # Not at once: what else has come in this turn of the loop goes with it.
            asyncio.get_running_loop().call_soon(self._go)
        await answered.wait()
        return answer.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _go(self) -> None:
        asked, answered = self._asked, self._answered
        self._asked, self._answered = {}, asyncio.Event()

        def back(_: asyncio.Future[None]) -> None:
            answered.set()
            self._away = bool(self._asked)
            if self._away:
                self._go()

        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._thread, _answer, asked).add_done_callback(back)


def _answer(asked: Questions) -> None:
    for (function, args), answer in asked.items():
        try:
            answer.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - raised again by whoever asked
            answer.set_exception(error)
