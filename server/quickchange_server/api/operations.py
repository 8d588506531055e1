"""What an operator and a probe ask: alive, ready, version, metrics, memory."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quickchange_server import __version__
from quickchange_server.api.auth import Admin, Scraper
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.errors import Unavailable

Json = dict[str, Any]

probes = APIRouter(tags=["operations"], route_class=ScopedRoute)
router = APIRouter(tags=["operations"], route_class=ScopedRoute)


@probes.head("/livez", include_in_schema=False)
@probes.get("/livez")
async def livez(services: Services) -> Json:
    """Say whether event loop and engine go on; 503 when the engine died or hangs."""
    check_engine(services)
    return {"status": "alive"}


@probes.head("/health", include_in_schema=False)
@probes.head("/readyz", include_in_schema=False)
@probes.get("/health")
@probes.get("/readyz")
async def readyz(request: Request, services: Services) -> Json:
    """Say whether requests are served: base loaded, catalog read, not stopping."""
    if request.app.state.drain.is_begun:
        raise Unavailable("the server is shutting down", code="draining")
    if not request.app.state.is_ready:
        raise Unavailable("the server is starting or stopping", code="not_ready")
    check_engine(services)
    return {"status": "ready"}


def check_engine(services: AppServices) -> None:
    """Say nothing while the engine goes on. Raises: Unavailable when it died or hangs."""
    state = services.engine.snapshot()
    if not state.is_alive:
        raise Unavailable("the engine does not run", code="engine_dead")
    silent_s = time.monotonic() - state.heartbeat_monotonic_s
    if silent_s > services.stall_s:
        raise Unavailable(
            f"the engine has given no sign of life for {silent_s:.0f} s", code="engine_stalled"
        )


@probes.head("/version", include_in_schema=False)
@probes.get("/version")
async def version(services: Services) -> Json:
    """Show what is running."""
    base = services.engine.base
    return {"version": __version__, "base": base.name, "base_digest": base.digest}


@probes.head("/metrics", include_in_schema=False)
@probes.get("/metrics", response_class=Response)
async def metrics(request: Request, services: Services, caller: Scraper) -> Response:
    """Show the metrics in Prometheus' text format, or OpenMetrics when asked for."""
    accept = request.headers.get("accept", "")
    found = services.metrics.peek(accept)
    if found is None:
        found = await asyncio.to_thread(services.metrics.render, accept)
    text, content_type = found
    return Response(text, headers={"content-type": content_type})


@router.head("/v1/memory", include_in_schema=False)
@router.get("/v1/memory")
async def memory(services: Services, caller: Admin) -> Json:
    """Show bytes by part, and by adapter version: all of them to the tenant default.

    `bytes`: what the engine's parts take and may take; `process`: the process's resident size.
    """
    state = services.engine.snapshot()
    process = await asyncio.to_thread(services.memory.parts, services.engine.process_bytes)
    device = services.engine.device_bytes()
    parts = {**state.memory_bytes, **device, "process_rss": process["total"]}
    mine = services.adapters.digests_of(caller.tenant)
    adapters = [
        {
            "digest": adapter.digest,
            "host": adapter.host_bytes,
            "device": adapter.device_bytes,
            "merged": adapter.merged_bytes,
            "num_running": adapter.num_running,
        }
        for adapter in state.adapters.values()
        if mine is None or adapter.digest in mine
    ]
    return {"object": "memory", "bytes": parts, "process": process, "adapters": adapters}
