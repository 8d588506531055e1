"""What do steps cost merged and unmerged, and do steps of their own pay for a merged adapter?

The engine alone, without HTTP. Clients in a closed loop mix one hot adapter with others; each round
runs the base, the hot adapter unmerged, merged in everybody's steps, and merged with steps of its
own where the server expects them to pay. Then the costs that were learned are printed.

    PYTHONPATH=server:adapters python benchmarks/merged_steps.py --model BASE_FOLDER
"""

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.step_groups import StepGroups
from quickchange_server.thread_affinity import prepare_threads, restore_affinity

from benchmarks.engine_runs import MIB, random_weights
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.hot_mix import HOT, NUM_COLD, HotMix, read_mixes
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.workload import adapter_name

WAYS = ("base", "unmerged", "merged", "steps of its own")
HEADER = ("mix", *(f"{way}, tokens/s" for way in WAYS), "of its own / merged", "of its own / base")
Runs = dict[HotMix, dict[str, list[float]]]


class MergedStepsBench:
    """One engine over one base, and the mixes run on it in every way."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        settings = EngineSettings(
            dtype=options.dtype,
            kernels=options.kernels,
            kv_cache_bytes=options.kv_cache_mib * MIB,
            max_batch_rows=max(mix.num_clients for mix in options.mixes),
            auto_merge=True,  # learn from all steps, of every way
        )
        self._engine = EngineClient(options.model, settings)
        self._ids = itertools.count()

    @property
    def costs(self) -> dict[str, float]:
        """The seconds that were learned."""
        return self._engine._engine.groups.costs.coefficients

    async def run_all(self, mixes: Sequence[HotMix]) -> Runs:
        """Warm up, then run every mix in every way in turn, several times."""
        engine, runs = self._engine, {mix: {way: list[float]() for way in WAYS} for mix in mixes}
        await engine.start()
        try:
            for index in range(1 + NUM_COLD):
                weights = random_weights(engine.base, self._options.rank, engine.dtype, index)
                await engine.load_adapter(weights)
            for repeat in range(-1, self._options.repeats):  # the first round only learns
                for mix, way in itertools.product(mixes, WAYS):
                    rate = await self._rate(mix, way, repeat)
                    if repeat >= 0:
                        runs[mix][way].append(rate)
                        print(f"{mix.title}, {way}: {rate:.1f} tokens/s", file=sys.stderr)
        finally:
            await engine.stop()
        return runs

    async def _rate(self, mix: HotMix, way: str, seed: int) -> float:
        """Return tokens out per second of one run."""
        hot, groups = adapter_name(HOT), self._engine._engine.groups
        copies = self._engine._engine.residency.merged
        self._engine._engine.groups = StepGroups(copies, groups.costs, is_on=way == WAYS[-1])
        if way in ("merged", WAYS[-1]):
            await self._engine.merge(hot)
        else:
            await self._engine.unmerge(hot)
        count = mix.num_clients * self._options.requests
        drawn = [None] * count if way == "base" else mix.draw(count, seed)
        waiting, started_s = iter(drawn), time.perf_counter()
        await asyncio.gather(*(self._client(waiting) for _ in range(mix.num_clients)))
        num_tokens: int = count * self._options.tokens
        return num_tokens / (time.perf_counter() - started_s)

    async def _client(self, waiting: Any) -> None:
        for adapter in waiting:
            number = next(self._ids)
            rng = random.Random(number)
            refs = () if adapter is None else (AdapterRef(adapter_name(adapter)),)
            prompt = tuple(rng.randrange(300) for _ in range(self._options.prompt_tokens))
            sampling, num = SamplingParams(temperature=0), self._options.tokens
            request = GenerationRequest(f"m{number}", prompt, refs, sampling, num, ignore_eos=True)
            async for output in self._engine.generate(request):
                if output.failure is not None:
                    raise BenchmarkFailure(f"a request failed: {output.failure.message}")


def steps_table(runs: Runs) -> str:
    """Return one row per mix; ratios are medians of the ratios of single rounds."""
    rows = []
    for mix, ways in runs.items():
        own = ways[WAYS[-1]]
        ratios = (
            median(a / b for a, b in zip(own, ways[way], strict=True)) for way in ("merged", "base")
        )
        rates = (f"{median(ways[way]):.1f}" for way in WAYS)
        rows.append((mix.title, *rates, *(f"{ratio:.3f}" for ratio in ratios)))
    return markdown_table(HEADER, rows)


def costs_table(costs: dict[str, float]) -> str:
    """Return what was learned, in milliseconds."""
    return markdown_table(("part", "ms"), [(n, f"{1e3 * s:.3f}") for n, s in costs.items()])


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kernels", default="auto", help="auto, native or plain")
    parser.add_argument("--shares", default="0.5,0.9,1.0", help="of the hot adapter")
    parser.add_argument("--clients", default="1,16", help="with commas")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=4, help="per client and round")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-cache-mib", type=int, default=1024)
    add_output_options(parser)
    options = parser.parse_args()
    try:
        options.mixes = read_mixes(options.shares, options.clients)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """Measure and report."""
    prepare_threads()
    restore_affinity()
    options, machine = parsed_options(), Machine.here()
    bench = MergedStepsBench(options)
    runs = asyncio.run(bench.run_all(options.mixes))
    settings = {
        "server": "none: EngineClient in this process",
        "base": options.model.name,
        "dtype, kernels": f"{options.dtype}, {options.kernels}",
        "work": f"prompts of {options.prompt_tokens} tokens, {options.tokens} tokens out, greedy",
        "adapters": f"rank {options.rank}: one hot, {NUM_COLD} cold, the base",
        "runs": f"{options.repeats} interleaved, {options.requests} requests a client in each",
    }
    table = f"{steps_table(runs)}\n\n{costs_table(bench.costs)}"
    results = [{"mix": mix.title, "tokens_per_s": ways} for mix, ways in runs.items()]
    report = Report("Steps of a merged adapter", machine, settings, table, results)
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
