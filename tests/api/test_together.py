"""Questions that share a trip: asked once where they are equal, answered anew for whoever comes later."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from api.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


@pytest.fixture
def run() -> Callable[[Callable[[Together], Coroutine[Any, Any, None]]], None]:
    def given(test: Callable[[Together], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            together = Together()
            try:
                await test(together)
            finally:
                together.close()

        asyncio.run(whole())

    return given


class Door:
    """A question whose answer waits until it is let through, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun, self.open = threading.Event(), threading.Event()

    def question(self, name: str) -> tuple[str, int]:
        self.asked.append(name)
        self.begun.set()
        assert self.open.wait(10)
        return name, len(self.asked)


def test_who_comes_while_the_thread_is_away_is_answered_by_one_later_trip(run) -> None:
    async def test(together: Together) -> None:
        door = Door()
        first = asyncio.create_task(together.ask(door.question, "a"))
        await asyncio.to_thread(door.begun.wait)
        later = [asyncio.create_task(together.ask(door.question, n)) for n in ("a", "b", "a")]
        await asyncio.sleep(0)
        door.open.set()
        assert await first == ("a", 1)
        # Asked anew, since they came after the first was asked; once, since they are equal.
        assert await asyncio.gather(*later) == [("a", 2), ("b", 3), ("a", 2)]
        assert door.asked == ["a", "a", "b"]

    run(test)


def test_an_error_is_only_for_whoever_asked(run) -> None:
    async def test(together: Together) -> None:
        asked = [together.ask(int, text) for text in ("1", "x", "2", "x")]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert (found[0], found[2]) == (1, 2)
        assert isinstance(found[1], ValueError)
        assert isinstance(found[3], ValueError)

    run(test)


def test_who_gives_up_takes_nobodys_answer_away(run) -> None:
    async def test(together: Together) -> None:
        door = Door()
        gone, stays = (asyncio.create_task(together.ask(door.question, "a")) for _ in range(2))
        await asyncio.to_thread(door.begun.wait)
        gone.cancel()
        door.open.set()
        assert await stays == ("a", 1)
        assert gone.cancelled()
        assert await together.ask(door.question, "b") == ("b", 2)

    run(test)
