"""Routes that check their caller's key before they read a body.

FastAPI reads a body before it calls any dependency, so the check is made around its handler.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from quickchange_server.api.auth import OPEN_PATHS, Needs

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ScopedRoute(APIRoute):
    """A route whose caller's type says which scope it needs; only the open paths need none."""

    @property
    def needs(self) -> Needs | None:
        """What the route asks of its caller's key."""
        calls = (dependency.call for dependency in self.dependant.dependencies)
        return next((call for call in calls if isinstance(call, Needs)), None)

    def get_route_handler(self) -> Handler:
        """Return FastAPI's handler with the check before it."""
        handle, needs = super().get_route_handler(), self.needs
        if needs is None:
            assert self.path in OPEN_PATHS, f"{self.path} declares no caller"
            return handle

        async def checked(request: Request) -> Response:
            needs.check(request)
            return await handle(request)

        return checked
