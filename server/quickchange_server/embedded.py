"""A server inside another program, without a socket: for tests of what calls it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from quickchange_server.api.app import create_app
from quickchange_server.base_folder import resolve_base
from quickchange_server.config import ServerConfig
from quickchange_server.request_record import RequestObserver
from quickchange_server.serving import add_static_adapters, build_services
from quickchange_server.startup_keys import open_keyring


@asynccontextmanager
async def running_app(
    config: ServerConfig, observers: tuple[RequestObserver, ...] = ()
) -> AsyncIterator[FastAPI]:
    """Give a started server as an ASGI app; it stops when the block ends.

    All settings but those of sockets hold. Loading the base blocks the event loop for a while.
    `observers` are told of each request.

    Raises: CannotStart.
    """
    base_folder = resolve_base(config.model, config.revision, config.cache_folder)
    services = build_services(config, base_folder, open_keyring(config), observers)
    app = create_app(services)
    async with app.router.lifespan_context(app):
        await add_static_adapters(services.adapters, config.static_adapters)
        yield app
