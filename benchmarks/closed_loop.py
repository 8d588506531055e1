"""Clients in a closed loop: each sends its next request when its last one has ended.

Knows OpenAI's streaming completions, and neither who started the server nor what is printed.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.failure import BenchmarkFailure
from benchmarks.server_process import Target
from benchmarks.sse_client import EventConnection, timing_of
from benchmarks.timing import Figures, RequestTiming, summarise
from benchmarks.workload import Prompts, Scenario, adapter_name

Selector = Callable[[str, int | None], Mapping[str, object]]
"""From the base's name and an adapter's index (None: the base) to the fields that select it."""
Pick = Callable[[Scenario, int], int | None]
"""From a scenario and a request's index to the index of its adapter."""


def by_model(base_name: str, adapter: int | None) -> Mapping[str, object]:
    """Select an adapter by `model`, as the OpenAI-compatible servers do."""
    return {"model": base_name if adapter is None else adapter_name(adapter)}


@dataclass(frozen=True, slots=True)
class Work:
    """What each client asks for, and how often."""

    prompts: Prompts
    num_tokens: int
    requests_per_client: int

    def payload(self, selection: Mapping[str, object], num_tokens: int) -> dict[str, Any]:
        """Return the body of one request for a new prompt."""
        return {
            **selection,
            "prompt": self.prompts.take(),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class ClosedLoop:
    """Clients in a closed loop against one server."""

    def __init__(
        self,
        target: Target,
        work: Work,
        select: Selector = by_model,
        pick: Pick = Scenario.adapter_of,
    ) -> None:
        self._target = target
        self._work = work
        self._select = select
        self._pick = pick
        self._base_name = target.base_name()

    async def warm_up(self, scenario: Scenario) -> None:
        """Send one short request per client and per adapter, so that all is loaded."""
        num_requests = max(scenario.num_clients, scenario.num_adapters)
        await self._run(scenario, num_requests, 4, Scenario.adapter_of)

    async def measure(self, scenario: Scenario) -> Figures:
        """Run a scenario once."""
        client_cpu_s, server_cpu_s = time.process_time(), self._target.cpu_s()
        num_requests = scenario.num_clients * self._work.requests_per_client
        timings = await self._run(scenario, num_requests, self._work.num_tokens, self._pick)
        short = sum(timing.num_tokens != self._work.num_tokens for timing in timings)
        if short:
            raise BenchmarkFailure(
                f"{short} of {num_requests} answers did not have {self._work.num_tokens} tokens: "
                "the server does not know ignore_eos, or its context is too short"
            )
        client_cpu_s = time.process_time() - client_cpu_s
        return summarise(timings, client_cpu_s, self._target.cpu_s() - server_cpu_s)

    async def _run(
        self, scenario: Scenario, num_requests: int, num_tokens: int, pick: Pick
    ) -> list[RequestTiming]:
        adapters = iter([pick(scenario, index) for index in range(num_requests)])
        timings: list[RequestTiming] = []
        async with asyncio.TaskGroup() as clients:
            for _ in range(scenario.num_clients):
                clients.create_task(self._client(adapters, num_tokens, timings))
        return timings

    async def _client(
        self, adapters: Iterator[int | None], num_tokens: int, timings: list[RequestTiming]
    ) -> None:
        connection = EventConnection(self._target.url, self._target.api_key)
        try:
            for adapter in adapters:
                selection = self._select(self._base_name, adapter)
                payload = self._work.payload(selection, num_tokens)
                started_s = time.perf_counter()
                events = await connection.post("/v1/completions", payload)
                timings.append(timing_of(started_s, events))
        finally:
            connection.close()
