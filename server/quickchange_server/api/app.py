"""Put routes, middleware and error handlers together, and start and stop what is behind them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from quickchange_server import __version__
from quickchange_server.api import (
    adapter_states,
    adapters,
    documentation,
    generate,
    generation,
    keys,
    lora_path,
    models,
    operations,
)
from quickchange_server.api.body_pace import BodyPace
from quickchange_server.api.drain_guard import DrainGuard, DrainParting
from quickchange_server.api.error_handlers import add_error_handlers
from quickchange_server.api.middleware import (
    BodyLimit,
    HttpMetrics,
    KeyGuard,
    LoopbackGuard,
    MistakeAnswer,
    RequestContext,
)
from quickchange_server.api.services import AppServices, BodyLimits
from quickchange_server.drain import Drain

UPLOAD_PATH = "/v1/adapters"

ROOMS = (
    *(generation, generate, models),
    *(adapters, adapter_states, lora_path, keys),
    *(operations, documentation),
)

__all__ = ["AppServices", "BodyLimits", "create_app"]


def create_app(services: AppServices) -> FastAPI:
    """Return the app; its lifespan starts the engine and reads the catalog."""
    app = FastAPI(
        title="Quickchange",
        summary="One base, many LoRA adapters, inside one running batch.",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        responses=documentation.NO_FRAMEWORK_ERRORS,
        openapi_url=None,  # what FastAPI would add itself knows nothing of keys
    )
    app.state.services = services
    app.state.is_ready = False
    app.state.drain = Drain()
    _watch(services)
    add_error_handlers(app)
    for room in ROOMS:
        app.include_router(room.router)
    app.include_router(operations.probes)
    _add_middleware(app, services)
    return app


def _watch(services: AppServices) -> None:
    """Have what is behind the routes measured."""
    metrics, adapters, keyring = services.metrics, services.adapters, services.keyring

    def has_tenants() -> bool:
        return len(adapters.names.tenants | keyring.tenants()) > 1

    services.requests.has_tenants = has_tenants
    metrics.watch(services.engine.snapshot, services.engine.device_bytes)
    metrics.watch_adapters(services.engine.snapshot, adapters.names, adapters.loading, has_tenants)
    metrics.watch_process(partial(services.memory.recent, services.engine.process_bytes))
    metrics.watch_wishes(adapters.num_unmet)
    adapters.on_adapter_gone(metrics.forget_adapter)
    adapters.tell(metrics)


def _add_middleware(app: FastAPI, services: AppServices) -> None:
    """Add from the inside out: what is added last sees a request first."""
    limits = services.limits

    def limit_of(scope: Scope) -> int:
        is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        return limits.upload_bytes if is_upload else limits.json_bytes

    app.add_middleware(BodyLimit, limit=limit_of)
    app.add_middleware(BodyPace, pace=limits.json_pace, upload_path=UPLOAD_PATH)
    app.add_middleware(KeyGuard, keyring=services.keyring)
    if services.is_loopback_only:
        origins = services.cors_origins
        app.add_middleware(LoopbackGuard, cors_origins=origins, keyring=services.keyring)
    app.add_middleware(DrainGuard, drain=app.state.drain)
    app.add_middleware(MistakeAnswer)
    if services.cors_origins:  # outside of all that answers, so that pages can read any refusal
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(DrainParting, drain=app.state.drain)
    routers = (*(room.router for room in ROOMS), operations.probes)
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(HttpMetrics, metrics=services.metrics, routes=routes)
    app.add_middleware(RequestContext, observers=services.observers)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: AppServices = app.state.services
    await services.engine.start()
    try:
        if services.keys is not None:
            await services.keys.refresh()
            services.adapters.on_catalog_change(services.keys.refresh)
        await services.adapters.start()
        for name, folder in services.static_adapters:
            await services.adapters.add_static(name, folder)
        app.state.is_ready = True
        yield
    finally:
        app.state.is_ready = False
        try:
            await services.adapters.stop()
        finally:
            await services.engine.stop()
