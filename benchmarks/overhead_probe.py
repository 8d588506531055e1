"""The part of overhead.py that needs a process of its own; it prints one line of JSON.

python benchmarks/overhead_probe.py engine BASE_FOLDER    TTFTs of the bare engine
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickchange_server.thread_affinity import prepare_threads, restore_affinity

from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.workload import Prompts

if TYPE_CHECKING:
    from quickchange_server.engine.client import EngineClient

NUM_TOKENS = 2


async def engine_ttfts(options: argparse.Namespace) -> list[float]:
    """Return the TTFTs of requests that follow one another in a bare engine.

    Raises: BenchmarkFailure when a request fails.
    """
    from quickchange_server.engine.client import EngineClient
    from quickchange_server.engine.settings import EngineSettings
    from quickchange_server.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.folder)
    engine = EngineClient(options.folder, EngineSettings(device=options.device))
    prompts = Prompts(options.prompt_words, options.seed)
    restore_affinity()
    await engine.start()
    try:
        return [
            await _ttft(engine, f"bench-{index}", tokenizer.encode(prompts.take()))
            for index in range(options.requests)
        ]
    finally:
        await engine.stop()


async def _ttft(engine: "EngineClient", request_id: str, prompt_ids: list[int]) -> float:
    from quickchange_server.engine.request import GenerationRequest, SamplingParams

    request = GenerationRequest(
        request_id,
        tuple(prompt_ids),
        sampling=SamplingParams(temperature=0),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    started_s = time.perf_counter()
    times_s = []
    async for output in engine.generate(request):
        times_s.append(time.perf_counter())
        if output.failure is not None:
            raise BenchmarkFailure(f"a request failed: {output.failure.message}")
    return times_s[0] - started_s


def main() -> None:
    """Measure one part and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("engine",))
    parser.add_argument("folder", type=Path, help="folder of the base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare_threads()
    print(json.dumps({"ttfts_s": asyncio.run(engine_ttfts(options))}))


if __name__ == "__main__":
    with exit_on_failure():
        main()
