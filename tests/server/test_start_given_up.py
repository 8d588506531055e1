"""An adapter that is unloaded each time it was loaded: 503, and nothing stays counted."""

from collections.abc import AsyncIterator
from dataclasses import replace

from quickchange_server.api.app import AppServices, create_app
from quickchange_server.engine.request import GenerationRequest, TokenOutput
from quickchange_server.errors import Unavailable

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine


class NeverLoaded(ScriptedEngine):
    """Has lost the adapter whenever a request is submitted."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        raise Unavailable("it was unloaded", code="adapter_not_loaded")
        yield


async def test_a_request_that_gives_up_starting_gives_its_place_back(services: AppServices) -> None:
    unlucky = replace(services, engine=NeverLoaded())
    async for caller in serve_in_process(create_app(unlucky)):
        answer = await caller.post("/v1/completions", json={"model": "ada", "prompt": "a"})
        assert answer.status_code == 503
        assert "in turn" in answer.json()["error"]["message"]
        assert unlucky.requests._in_flight.total == 0
