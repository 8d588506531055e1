"""An adapter that is unloaded between its load and the start: the request stays one request."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from quickchange_server.api import generation_run
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.detokenizer import Detokenizer
from quickchange_server.engine.request import GenerationRequest, TokenOutput
from quickchange_server.errors import Unavailable
from quickchange_server.tokenizer import Tokenizer

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine

BODY: dict[str, Any] = {"model": "ada", "prompt": "a", "n": 2}
MIX: dict[str, Any] = {"model": "tiny", "adapters": [{"model": "ada"}, {"model": "bob"}]}


class OftenUnloaded(ScriptedEngine):
    """Has lost the adapter when one of the first `num_losses` requests is submitted."""

    num_losses = 10_000

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        if self.num_losses:
            self.num_losses -= 1
            raise Unavailable("it was unloaded", code="adapter_not_loaded")
        async for output in super().generate(request):
            yield output


def counted(services: AppServices) -> dict[str, float]:
    """Return what ended how, of all API requests and of the adapter's."""
    value = services.metrics.registry.get_sample_value
    totals = {}
    for outcome in ("ok", "rejected", "error", "cancelled"):
        labels = {"outcome": outcome}
        of_adapter = {"adapter": "ada", **labels}
        totals[outcome] = value("quickchange_requests_total", labels) or 0.0
        totals["ada " + outcome] = value("quickchange_adapter_requests_total", of_adapter) or 0.0
    return {name: total for name, total in totals.items() if total}


async def test_a_request_that_gives_up_starting_gives_its_place_back(services: AppServices) -> None:
    unlucky = replace(services, engine=OftenUnloaded())
    async for caller in serve_in_process(create_app(unlucky)):
        answer = await caller.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert "in turn" in answer.json()["error"]["message"]
        assert unlucky.requests._in_flight.total == 0
        assert counted(unlucky) == {"rejected": 1, "ada rejected": 1}


@pytest.mark.parametrize("body", [BODY, BODY | MIX], ids=["one", "mix"])
async def test_a_request_that_starts_at_the_second_try_is_counted_once(
    services: AppServices, body: dict[str, Any]
) -> None:
    engine = OftenUnloaded()
    engine.num_losses = 1
    unlucky = replace(services, engine=engine)
    async for caller in serve_in_process(create_app(unlucky)):
        answer = await caller.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
        assert unlucky.requests._in_flight.total == 0
        assert counted(unlucky) == {"ok": 1, "ada ok": 1}
        assert not engine.live


class NoReader(Tokenizer):
    """Cannot read what is generated."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.__dict__.update(tokenizer.__dict__)

    def detokenizer(self) -> Detokenizer:
        raise ValueError("there is no way to read it")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "ada"}}),
        ("/v1/completions", BODY),
        ("/v1/completions", BODY | {"stream": True}),
    ],
)
async def test_a_fault_while_the_answer_is_prepared_keeps_no_place(
    services: AppServices, path: str, body: dict[str, Any]
) -> None:
    broken = replace(services, tokenizer=NoReader(services.tokenizer))
    async for caller in serve_in_process(create_app(broken)):
        assert (await caller.post(path, json=body)).status_code == 500
        assert broken.requests._in_flight.total == 0


async def test_a_fault_between_admission_and_start_counts_as_an_error(
    services: AppServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(generation_run, "_choices", fail)
    counted = services.metrics.registry.get_sample_value
    async for caller in serve_in_process(create_app(services)):
        assert (await caller.post("/v1/completions", json=BODY)).status_code == 500
        assert services.requests._in_flight.total == 0
        assert counted("quickchange_requests_total", {"outcome": "error"}) == 1
