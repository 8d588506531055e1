"""Bodies other than uploads must come at a pace too: nobody keeps a half-read body for ever."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.upload_pace import UploadPace
from quickchange_server.errors import TooSlow


class BodyPace:
    """Stop waiting for a body that comes too slowly.

    The route that reads gets the refusal (408), so that it is counted and shaped as its others are.
    What comes after the body's end, the client's leaving, has all the time in the world.
    """

    def __init__(self, app: ASGIApp, pace: UploadPace, upload_path: str) -> None:
        self._app = app
        self._pace = pace
        self._upload_path = upload_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a watched body; an upload's is watched where it is read."""
        if scope["type"] != "http" or scope["path"] == self._upload_path:
            return await self._app(scope, receive, send)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        num_bytes, is_whole = 0, False

        async def receive_in_time() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(started_s + self._pace.allowed_s(num_bytes)):
                    event = await receive()
            except TimeoutError as error:
                refusal = self._pace.refusal(num_bytes, loop.time() - started_s)
                raise HTTPException(TooSlow.status, refusal.message) from error
            num_bytes += len(event.get("body", b""))
            is_whole = not event.get("more_body", False)
            return event

        return await self._app(scope, receive_in_time, send)
