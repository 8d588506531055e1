"""The runs behind engine.py: drive an EngineClient, listen to its steps, work out the floor.

The floor of a decode step is the time to read, once, the base's matrices, the matrices of the
distinct adapters in the batch, and the rows' KV: no decode step can be faster than that.
"""

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.observer import StepStats
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.engine.settings import EngineSettings

from benchmarks.failure import BenchmarkFailure
from benchmarks.report import markdown_table
from benchmarks.step_profile import StepProfiler
from benchmarks.timing import percentile
from benchmarks.workload import Scenario, adapter_name

MIB = 1 << 20
B_STD = 0.02
SKIPPED_STEPS = 3
ENGINE_HEADER = (
    "scenario",
    "decode steps/s (lowest–highest)",
    "decode tokens/s",
    "step p50 / p99 ms",
    "between steps ms",
    "floor ms",
    "floor / step",
    "prefill tokens/s",
)


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """One run of one scenario.

    `step_*`: inside the engine's step; `period_s`: from the end of one decode step to the end of
    the next, which is what a row waits for its next token.
    """

    scenario: str
    num_rows: int
    period_s: float
    step_p50_s: float
    step_p99_s: float
    prefill_tokens_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class StepRecorder:
    """Keeps every step with the time at its end; passes steps on to a profiler, if there is one."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, StepStats]] = []
        self.profiler: StepProfiler | None = None

    def on_step(self, stats: StepStats) -> None:
        """Take note of one finished step."""
        self.steps.append((time.perf_counter(), stats))
        if self.profiler is not None and stats.kind == "decode":
            self.profiler.on_decode_step()

    def on_activation(self, seconds: float) -> None:
        """Do nothing."""

    def full_decode_steps(self, num_rows: int) -> list[tuple[float, float]]:
        """Return (end, seconds) of the decode steps with all rows, without the first few."""
        steps = [
            (end, stats.seconds)
            for end, stats in self.steps
            if stats.kind == "decode" and stats.num_rows == num_rows
        ]
        return steps[SKIPPED_STEPS:]


class EngineBench:
    """One engine over one base, and the scenarios run on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._recorder = StepRecorder()
        settings = EngineSettings(
            device=options.device,
            dtype=options.dtype,
            kernels=options.kernels,
            quantize=options.quantize,
            kv_cache_bytes=options.kv_cache_mib * MIB,
            adapter_device_bytes=options.adapter_device_mib * MIB,
            adapter_host_bytes=64 * options.adapter_device_mib * MIB,
            max_batch_rows=max(scenario.num_clients for scenario in options.scenarios),
            max_step_tokens=options.max_step_tokens,
        )
        self._engine = EngineClient(options.model, settings, self._recorder)
        self._config = json.loads((options.model / "config.json").read_text())
        self._seeds = itertools.count()
        self._ids = itertools.count()

    @property
    def dtype(self) -> str:
        """The weights' number format."""
        return str(self._engine.dtype).removeprefix("torch.")

    async def run_all(
        self, scenarios: Sequence[Scenario], num_adapters: int
    ) -> dict[Scenario, list[EngineFigures]]:
        """Warm up, then run all scenarios in turn, several times."""
        runs: dict[Scenario, list[EngineFigures]] = {scenario: [] for scenario in scenarios}
        async with self._started(num_adapters):
            for scenario in scenarios:
                await self._decode(scenario, num_tokens=8)
            for _, scenario in itertools.product(range(self._options.repeats), scenarios):
                figures = await self._measure(scenario)
                runs[scenario].append(figures)
                note = f"{scenario.title}: {1 / figures.period_s:.1f} decode steps/s"
                print(note, file=sys.stderr, flush=True)
        return runs

    async def profile(self, scenarios: Sequence[Scenario], num_adapters: int) -> None:
        """Print where the time of decode steps goes, one scenario after the other."""
        async with self._started(num_adapters):
            for scenario in scenarios:
                kind = self._options.profile
                native = self._engine._engine.runner.native if kind == "native" else None
                profiler = StepProfiler(kind, self._options.profile_steps, native)
                async with self._prepared(scenario):
                    await self._decode(scenario, num_tokens=8)
                    self._recorder.profiler = profiler
                    await self._decode(scenario, self._options.profile_steps + 4)
                self._recorder.profiler = None
                print(f"\n### {scenario.title}\n\n{profiler.summary()}")

    def floor(self, scenario: Scenario) -> int:
        """Return the bytes that one decode step of a scenario must read at least."""
        itemsize = self._engine.dtype.itemsize
        modules = block_linears(self._engine.base).values()
        head = self._config["vocab_size"] * self._config["hidden_size"]
        base = head + sum(m.in_features * m.out_features for m in modules)
        ranks = 0 if scenario.is_merged else self._options.rank * _num_used_adapters(scenario)
        adapters = ranks * sum(m.in_features + m.out_features for m in modules)
        base_bytes = base * (itemsize if self._options.quantize is None else 1)
        return int(base_bytes + itemsize * adapters + self._kv_bytes(scenario))

    def _kv_bytes(self, scenario: Scenario) -> float:
        heads = self._config["num_attention_heads"]
        width = self._config.get("head_dim") or self._config["hidden_size"] // heads
        per_token = 2 * width * (self._config.get("num_key_value_heads") or heads)
        length = self._options.prompt_tokens + self._options.tokens / 2
        per_layer = scenario.num_clients * length * per_token * self._engine.dtype.itemsize
        return float(per_layer * self._engine.base.num_layers)

    @asynccontextmanager
    async def _started(self, num_adapters: int) -> AsyncIterator[None]:
        await self._engine.start()
        try:
            for index in range(num_adapters):
                spec, dtype = self._engine.base, self._engine.dtype
                weights = random_weights(spec, self._options.rank, dtype, seed=index)
                await self._engine.load_adapter(weights)
            yield
        finally:
            await self._engine.stop()

    @asynccontextmanager
    async def _prepared(self, scenario: Scenario) -> AsyncIterator[None]:
        """Hold the merged copy that a merged scenario needs."""
        if scenario.is_merged:
            await self._engine.merge(adapter_name(0))
        yield
        if scenario.is_merged:
            await self._engine.unmerge(adapter_name(0))

    async def _measure(self, scenario: Scenario) -> EngineFigures:
        """Run a scenario once.

        Raises: BenchmarkFailure when the answers are too short to see its steps.
        """
        async with self._prepared(scenario):
            await self._decode(scenario, self._options.tokens)
            steps = self._recorder.full_decode_steps(scenario.num_clients)
            prefill_tokens_per_s = await self._prefill_rate(scenario)
        if len(steps) < 2:
            raise BenchmarkFailure(
                f"{scenario.label}: only {len(steps)} decode steps had all rows; raise --tokens"
            )
        ends, seconds = [end for end, _ in steps], [each for _, each in steps]
        periods = [after - before for before, after in itertools.pairwise(ends)]
        return EngineFigures(
            scenario.label,
            scenario.num_clients,
            percentile(periods, 0.5),
            percentile(seconds, 0.5),
            percentile(seconds, 0.99),
            prefill_tokens_per_s,
        )

    async def _decode(self, scenario: Scenario, num_tokens: int) -> None:
        """Run all rows of a scenario at once, from new prompts."""
        self._recorder.steps.clear()
        length, rows = self._options.prompt_tokens, range(scenario.num_clients)
        await asyncio.gather(
            *(self._finish(scenario.adapter_of(row), length, num_tokens) for row in rows)
        )

    async def _prefill_rate(self, scenario: Scenario) -> float:
        """Return prompt tokens per second of one long prompt; NaN where none is wanted."""
        if not self._options.prefill_tokens:
            return math.nan
        self._recorder.steps.clear()
        await self._finish(scenario.adapter_of(0), self._options.prefill_tokens, 1)
        seconds = sum(stats.seconds for _, stats in self._recorder.steps)
        return float(self._options.prefill_tokens / seconds)

    async def _finish(self, adapter: int | None, num_prompt: int, num_tokens: int) -> None:
        """Run one request over random tokens to its end."""
        generator = torch.Generator().manual_seed(next(self._seeds))
        vocab_size = self._config["vocab_size"]
        request = GenerationRequest(
            f"bench-{next(self._ids)}",
            tuple(torch.randint(vocab_size, (num_prompt,), generator=generator).tolist()),
            () if adapter is None else (AdapterRef(adapter_name(adapter)),),
            SamplingParams(temperature=0),
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        async for output in self._engine.generate(request):
            if output.failure is not None:
                raise BenchmarkFailure(f"a request failed: {output.failure.message}")


def block_linears(spec: BaseSpec) -> dict[str, ModuleSpec]:
    """Return the linears of the blocks: neither the embedding nor the output head."""
    kinds = ("linear", "conv1d")
    return {path: module for path, module in spec.modules.items() if module.kind in kinds}


def random_weights(spec: BaseSpec, rank: int, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """Make a random, non-zero adapter on every linear of a base's blocks, without files."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in block_linears(spec).items():
        bound = 1 / math.sqrt(module.in_features)
        lora_a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
        lora_b = torch.empty(module.out_features, rank).normal_(0, 2 * B_STD, generator=generator)
        pairs[path] = LoraPair(lora_a.to(dtype), lora_b.to(dtype))
    return AdapterWeights(adapter_name(seed), pairs)


def read_bandwidth(device: str, num_bytes: int = 512 * MIB) -> float:
    """Return how many bytes per second a sum over a large tensor reads; the best of several."""
    values = torch.ones(num_bytes // 4, device=device)
    is_cuda = values.device.type == "cuda"
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        values.sum()
        if is_cuda:
            torch.cuda.synchronize(values.device)
        seconds.append(time.perf_counter() - started)
    return num_bytes / min(seconds)


def engine_table(
    runs: Mapping[Scenario, Sequence[EngineFigures]],
    floor_bytes: Callable[[Scenario], int],
    bandwidth: float,
) -> str:
    """Return one row per scenario: medians over its runs, beside the floor."""
    rows = [_row(s, figures, floor_bytes(s) / bandwidth) for s, figures in runs.items()]
    return markdown_table(ENGINE_HEADER, rows)


def _row(scenario: Scenario, runs: Sequence[EngineFigures], floor_s: float) -> Sequence[str]:
    rates = [1 / run.period_s for run in runs]
    step_s = median(run.step_p50_s for run in runs)
    period_s = median(run.period_s for run in runs)
    return (
        scenario.title.replace("client", "row"),
        f"{1 / period_s:.1f} ({min(rates):.1f}–{max(rates):.1f})",
        f"{scenario.num_clients / period_s:.1f}",
        f"{1e3 * step_s:.1f} / {1e3 * median(run.step_p99_s for run in runs):.1f}",
        f"{1e3 * (period_s - step_s):.2f}",
        f"{1e3 * floor_s:.1f}",
        f"{floor_s / period_s:.2f}",
        f"{median(run.prefill_tokens_per_s for run in runs):.0f}",
    )


def _num_used_adapters(scenario: Scenario) -> int:
    return min(scenario.num_adapters, scenario.num_clients)
