"""Generation requests that end before their route's function is called are counted here.

FastAPI reads and checks a body before it calls the function, so the function cannot see these.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices
from quickchange_server.errors import ScopeMissing
from quickchange_server.metrics import RequestSummary

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class GenerationRoute(ScopedRoute):
    """A route whose unreadable and invalid bodies, and foreign keys, count as rejected requests."""

    def get_route_handler(self) -> Handler:
        """Return FastAPI's handler with the counting around it."""
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handle(request)
            except (RequestValidationError, HTTPException, ScopeMissing) as error:
                services: AppServices = request.app.state.services
                has_left = isinstance(error.__cause__, ClientDisconnect)
                outcome = RequestSummary("cancelled" if has_left else "rejected")
                services.metrics.on_request_end(outcome)
                raise

        return counted
