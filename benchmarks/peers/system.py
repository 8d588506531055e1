"""What all sides of the comparison have in common: how they are made, run and measured.

Systems run one at a time. A system is started anew in each round, and every scenario is warmed
before it is measured.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.closed_loop import ClosedLoop, Selector, Work, by_model
from benchmarks.failure import BenchmarkFailure
from benchmarks.server_process import Target
from benchmarks.timing import Figures
from benchmarks.workload import Prompts, Scenario, max_adapters

SCENARIO_TIMEOUT_S = 900.0
NUM_CHECKED_PROMPTS = 8
NUM_CHECKED_TOKENS = 16

T = TypeVar("T")
Measured = tuple[Scenario, Figures]


@dataclass(frozen=True, slots=True)
class Job:
    """What all systems are given: the base, the adapters' folders, and the clients' work."""

    base: Path
    adapters: Sequence[Path]
    rank: int
    work: Work
    scenarios: Sequence[Scenario]

    @property
    def max_clients(self) -> int:
        """The most requests at once."""
        return max(scenario.num_clients for scenario in self.scenarios)

    @property
    def max_request_tokens(self) -> int:
        """Room for one request: a prompt has up to three tokens a word."""
        return 3 * self.work.prompts.num_words + self.work.num_tokens + 8


class System(ABC):
    """One side of the comparison."""

    name: str

    @abstractmethod
    def prepare(self) -> None:
        """Install and make what is missing.

        Raises: BenchmarkFailure.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return versions and settings, in a line; called after `prepare`."""

    @abstractmethod
    def measure(self, scenarios: Sequence[Scenario]) -> Iterator[Measured]:
        """Start, warm up, run each scenario once, stop.

        Raises: BenchmarkFailure, OSError, EOFError.
        """

    def groups(self, scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
        """Return the scenarios in groups that are run from one start each."""
        return [list(scenarios)] if scenarios else []


class ServerSystem(System):
    """A system that is asked over HTTP, by the closed loop of throughput.py."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def serving(self, num_adapters: int) -> AbstractContextManager[Target]:
        """Run the server with so many of the job's adapters until the end of the block."""

    @property
    def select(self) -> Selector:
        """How a request names its adapter."""
        return by_model

    def measure(self, scenarios: Sequence[Scenario]) -> Iterator[Measured]:
        """Start the server, warm it up, run each scenario once, stop it."""
        num_adapters = max_adapters(scenarios)
        with self.serving(num_adapters) as target:
            if num_adapters:
                check_adapter_acts(target, self.select, self.job.work.prompts)
            loop = ClosedLoop(target, self.job.work, self.select)
            for scenario in scenarios:
                _finish(loop.warm_up(scenario), scenario)
            for scenario in scenarios:
                yield scenario, _finish(loop.measure(scenario), scenario)


def check_adapter_acts(target: Target, select: Selector, prompts: Prompts) -> None:
    """Ask the base and an adapter the same: a peer that leaves the adapter out is not measured.

    Some prompts have the same greedy answer with and without; not all of several have.

    Raises: BenchmarkFailure when no answer differs.
    """
    base_name = target.base_name()
    for _ in range(NUM_CHECKED_PROMPTS):
        prompt = prompts.take()
        base, adapter = (
            target.complete(select(base_name, index), prompt, NUM_CHECKED_TOKENS)
            for index in (None, 0)
        )
        if base != adapter:
            return
    raise BenchmarkFailure(f"an adapter changes nothing: it and the base say {base!r}")


def with_and_without_adapters(scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
    """Return the scenarios of the base, and those of adapters, without empty groups."""
    base = [scenario for scenario in scenarios if not scenario.num_adapters]
    others = [scenario for scenario in scenarios if scenario.num_adapters]
    return [group for group in (base, others) if group]


def _finish(run: Coroutine[None, None, T], scenario: Scenario) -> T:
    """Run to the end, but not for ever."""

    async def limited() -> T:
        return await asyncio.wait_for(run, SCENARIO_TIMEOUT_S)

    try:
        return asyncio.run(limited())
    except TimeoutError as error:
        raise BenchmarkFailure(
            f"{scenario.label} did not end within {SCENARIO_TIMEOUT_S:.0f} s"
        ) from error
