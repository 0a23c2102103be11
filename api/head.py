"""HEAD wherever GET is: the same answer without its body.

The route runs as for GET until its headers are known, and is then cancelled, so that a HEAD of a large file reads nothing
and one of a stream ends. The road not taken is a HEAD beside each GET in every router.
"""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD as GET, and let all else through."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        begun = asyncio.Event()

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                begun.set()

        route = asyncio.ensure_future(self.app({**scope, "method": "GET"}, receive, send_start))
        start = asyncio.ensure_future(begun.wait())
        await asyncio.wait((route, start), return_when=asyncio.FIRST_COMPLETED)
        start.cancel()
        if not route.done():
            route.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await route
