"""The server as a Ray Serve application: engines that Ray starts, and a front that chooses one.

    serve run quickchange_server.ray_app:build min_replicas=2 model=/models/llama

Each engine is a whole server without a socket (embedded.py): its routes, keys, limits and adapters
are those of `quickchange serve`, and all share the store and the catalog that the settings name.
Ray is told by what names an engine was asked for adapters, and prefers it for them. That is a hint
and nothing more: each engine loads what it is asked for, and lets go of it, by its own rules.
"""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.datastructures import Headers as RequestHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from quickchange_server.asgi_call import AnsweringApp, AsgiCall, Headers
from quickchange_server.config import ServerConfig
from quickchange_server.errors import QueueFull, QuickchangeError, Unavailable
from quickchange_server.ray_settings import read_settings
from quickchange_server.thread_affinity import prepare_threads, restore_affinity

MAX_NAMES = 256
"""Names that an engine tells Ray of: those it was asked for last."""
REPLICA_HEADER = b"x-quickchange-replica"


def build(arguments: dict[str, Any]) -> Any:
    """Return the application, for `serve run` and `serve.run`.

    `arguments`: the fields of `RaySettings`, and every setting of the server but its ports.
    Settings that are not given are read here, from the variables and the file that `quickchange
    serve` reads, and are the same for all replicas.

    Raises: ConfigInvalid.
    """
    layout, config = read_settings(arguments)
    engines = serve.deployment(EngineReplica, "engine", **layout.engine_options(config))
    front = serve.deployment(Front, "ingress", **layout.ingress_options(config))
    return front.bind(engines.bind(config), config.base_name, config.is_public)


class EngineReplica:
    """A server that is called by Ray."""

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]
        """Start the server; blocks for as long as the base takes to load.

        Raises: CannotStart.
        """
        prepare_threads()
        from quickchange_server.embedded import running_app
        from quickchange_server.request_log import log_request, set_up_logging

        restore_affinity()
        set_up_logging(config.log_level, config.log_format)
        self._stack = AsyncExitStack()
        self._app = await self._stack.enter_async_context(running_app(config, (log_request,)))
        self._id = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, call: AsgiCall) -> AsyncGenerator[Message]:
        """Have the server answer one request; yields ASGI's messages."""
        await self._note(call)
        async for message in AnsweringApp(self._app, call).messages():
            if message["type"] == "http.response.start":
                message["headers"] = [*_without_id(message["headers"]), (REPLICA_HEADER, self._id)]
            yield message

    async def check_health(self) -> None:
        """Tell Ray whether this replica must be replaced.

        Raises: QuickchangeError.
        """
        from quickchange_server.api.operations import check_engine

        check_engine(self._app.state.services)

    async def __del__(self) -> None:
        """End the server in order; Ray calls this when nothing runs on it any more."""
        await self._stack.aclose()

    async def _note(self, call: AsgiCall) -> None:
        """Have Ray know that this engine is asked for an adapter, if the caller may ask for it."""
        name = serve.get_multiplexed_model_id()
        if name and self._may_ask(call, name):
            await self.hold(name)

    def _may_ask(self, call: AsgiCall, name: str) -> bool:
        from quickchange_server.api.auth import authenticate
        from quickchange_server.api.named_adapters import check_model

        services = self._app.state.services
        try:
            caller = authenticate(RequestHeaders(raw=call.headers), services.keyring)
            check_model(caller, name)
            services.adapters.resolve(name, tenant=caller.tenant)
        except QuickchangeError:
            return False  # the server says it in words
        return True

    @serve.multiplexed(max_num_models_per_replica=MAX_NAMES)  # type: ignore[untyped-decorator]
    async def hold(self, name: str) -> str:
        """Count an adapter as held here.

        The request that comes with the name loads it, under its tenant's quotas, and the engine
        unloads it when it needs the room: nothing is done here that could contradict either.
        """
        return name


class Front:
    """Ray's side of the ingress."""

    def __init__(self, engines: Any, base: str, is_public: bool) -> None:
        from quickchange_server.ray_ingress import Ingress

        self._engines = engines.options(stream=True)
        self._app = Ingress(self._answering, base, is_public=is_public).app()

    async def __call__(self, request: Request) -> Response:
        """Return what answers the request."""
        return _AnsweredBy(self._app)

    async def _answering(self, call: AsgiCall, adapter: str) -> AsyncGenerator[Message]:
        """Call an engine.

        Raises: QuickchangeError.
        """
        engines = self._engines.options(multiplexed_model_id=adapter) if adapter else self._engines
        messages = engines.answer.remote(call)
        try:
            async for message in messages:
                yield message
        except BackPressureError as error:
            raise QueueFull("all engines are busy and the line is full: try again soon") from error
        except RayTaskError:
            raise  # the server's own mistake, not the loss of a server
        except (RayError, RayServeException) as error:
            raise Unavailable(
                "the engine that had this request ended: send it again", retry_after_s=1
            ) from error
        finally:
            messages.cancel()


def _without_id(headers: Headers) -> Headers:
    """Leave out the request's id: Ray's proxy, which gave it, sends it too."""
    return [(name, value) for name, value in headers if name != b"x-request-id"]


class _AnsweredBy(Response):
    """Hands a connection to an ASGI app."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
