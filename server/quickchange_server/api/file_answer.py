"""A file as an answer, whole or the ranges of it that were asked for. Knows no adapters."""

from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from quickchange_server.errors import InvalidRequest


class FileAnswer(FileResponse):
    """A file whose refusals have the shape of every other one.

    Raises: InvalidRequest for a `Range` that is none; one outside of the file is a 416.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""

        async def send_file(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 400:
                raise InvalidRequest(
                    "Range: is not one of bytes; send bytes=FIRST-LAST, or leave it out",
                    param="range",
                )
            await send(message)

        await super().__call__(scope, receive, send_file)
