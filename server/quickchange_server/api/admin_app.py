"""What operators get on a port of their own (`--admin-port`): probes, version, metrics. No keys.

It shows the API's own state, and nothing that changes anything.
"""

from fastapi import FastAPI

from quickchange_server.api import operations
from quickchange_server.api.error_handlers import add_error_handlers
from quickchange_server.api.middleware import (
    BodyLimit,
    HttpMetrics,
    KeyGuard,
    LoopbackGuard,
    RequestContext,
)
from quickchange_server.api.services import AppServices
from quickchange_server.keyring import Keyring


def create_admin_app(api: FastAPI) -> FastAPI:
    """Return an app that shares the state of the API's."""
    services: AppServices = api.state.services
    app = FastAPI(title="Quickchange, for operators", openapi_url=None, redirect_slashes=False)
    app.state = api.state
    add_error_handlers(app)
    app.include_router(operations.probes)
    nobody_s = Keyring()
    app.add_middleware(BodyLimit, limit=lambda _: 0)
    app.add_middleware(KeyGuard, keyring=nobody_s)
    if services.is_loopback_only:
        app.add_middleware(LoopbackGuard, cors_origins=(), keyring=nobody_s)
    app.add_middleware(HttpMetrics, metrics=services.metrics, routes=operations.probes.routes)
    app.add_middleware(RequestContext)
    return app
