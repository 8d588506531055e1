"""How many tokens per second does a server give, and how long do its clients wait?

A closed loop over HTTP: each of C clients sends its next request when the last one has ended.
Requests stream, are greedy, ignore the end of text, and use N adapters in turn. Drives
`quickchange serve`, which it starts itself, or any OpenAI-compatible server given by --url.

    python benchmarks/throughput.py --model builtin:smollm2-135m
    python benchmarks/throughput.py --url http://127.0.0.1:8000 --scenarios base:1,base:16
"""

import argparse
import asyncio
import itertools
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import (
    Report,
    add_output_options,
    option_type,
    scenario_results,
    scenario_table,
)
from benchmarks.server_options import add_server_options, server_settings, target_of
from benchmarks.server_process import Target
from benchmarks.timing import Figures
from benchmarks.workload import (
    DEFAULT_SCENARIOS,
    Prompts,
    Scenario,
    adapter_name,
    max_adapters,
    parse_scenarios,
)

Runs = dict[Scenario, list[Figures]]


def run_all(target: Target, work: Work, scenarios: tuple[Scenario, ...], repeats: int) -> Runs:
    """Warm up, then run every scenario in turn, and all of them again: noise hits all alike."""
    loop = ClosedLoop(target, work)
    runs: Runs = {scenario: [] for scenario in scenarios}
    for scenario in scenarios:
        with _prepared(target, scenario):
            asyncio.run(loop.warm_up(scenario))
    for repeat, scenario in itertools.product(range(repeats), scenarios):
        with _prepared(target, scenario):
            figures = asyncio.run(loop.measure(scenario))
        runs[scenario].append(figures)
        _say(f"{repeat + 1}/{repeats} {scenario.title}: {figures.tokens_per_s:.1f} tokens/s")
    return runs


@contextmanager
def _prepared(target: Target, scenario: Scenario) -> Iterator[None]:
    """Hold the merged copy that a merged scenario needs."""
    if scenario.is_merged:
        target.merge(adapter_name(0))
    try:
        yield
    finally:
        if scenario.is_merged:
            target.unmerge(adapter_name(0))


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "work": f"prompts of {options.prompt_words} words, {options.tokens} tokens out, greedy, "
        "end of text ignored, streaming /v1/completions, every prompt new",
        "adapters": f"rank {options.rank} on all seven linears, in turn",
        "runs": f"{options.repeats} interleaved, {options.requests} requests a client in each; "
        "medians of the runs",
        "seed": options.seed,
    }


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument(
        "--scenarios",
        type=option_type(parse_scenarios),
        default=parse_scenarios(DEFAULT_SCENARIOS),
        help=f"adapters:clients with commas; adapters may be base or merged ({DEFAULT_SCENARIOS})",
    )
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=2, help="requests per client and run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    add_output_options(parser)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, options.requests)
    with target_of(options, max_adapters(options.scenarios)) as target:
        runs = run_all(target, work, options.scenarios, options.repeats)
        settings = settings_of(options, target)
    report = Report(
        "Throughput over HTTP", machine, settings, scenario_table(runs), scenario_results(runs)
    )
    report.publish(options.markdown, options.json)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
