"""How does Quickchange compare with its peers on this machine, in this hour?

Installs each peer into an environment of its own, and gives all of them the work of throughput.py,
one system at a time, all of them in each round. What cannot be installed or started stands in the
table with the reason.

    python benchmarks/peers/compare.py --markdown table.md --json runs.json
    python benchmarks/peers/compare.py --systems quickchange,llama.cpp --scenarios 8:16
"""

import argparse
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.closed_loop import Work
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import ROOT, Machine
from benchmarks.make_adapters import AdapterShape, write_adapters
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.outcome import Outcome, detail_table, outcome_results, ratio_table
from benchmarks.peers.own_server import OwnServer
from benchmarks.peers.peft_generate import PeftGenerate
from benchmarks.peers.system import Job, System
from benchmarks.peers.vllm_server import VllmServer
from benchmarks.report import Report, add_output_options, option_type
from benchmarks.server_process import base_folder, checkpoint_dtype
from benchmarks.workload import Prompts, Scenario, max_adapters, parse_scenarios

PEER_SCENARIOS = "base:1,base:16,1:1,1:16,8:16"
SYSTEM_NAMES = ("quickchange", "PEFT", "vLLM", "llama.cpp")


def make_systems(names: Sequence[str], job: Job, folder: Path) -> list[System]:
    """Return the systems that were asked for, ours first."""
    makers: dict[str, Callable[[], System]] = {
        "quickchange": lambda: OwnServer(job),
        "peft": lambda: PeftGenerate(job, folder),
        "vllm": lambda: VllmServer(job, folder),
        "llama.cpp": lambda: LlamaServer(job, folder),
    }
    wanted = {name.lower() for name in names}
    return [make() for name, make in makers.items() if name in wanted]


def prepared(systems: Sequence[System], job: Job) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Install all systems; return an outcome for each, with what failed, and their descriptions."""
    outcomes = {system.name: Outcome() for system in systems}
    descriptions = {}
    for system in systems:
        _say(f"preparing {system.name}")
        try:
            system.prepare()
            descriptions[system.name] = system.describe()
        except (BenchmarkFailure, OSError) as error:
            descriptions[system.name] = f"not installed: {error}"
            outcomes[system.name].fail(job.scenarios, f"not installed: {error}")
            _say(f"{system.name}: not installed: {error}")
    return outcomes, descriptions


def run_round(system: System, outcome: Outcome, scenarios: Sequence[Scenario]) -> None:
    """Run one system's scenarios once; what fails is noted and not tried again."""
    for group in system.groups(outcome.unfailed(scenarios)):
        missing = list(group)
        try:
            for scenario, figures in system.measure(group):
                outcome.add(scenario, figures)
                missing.remove(scenario)
                _say(f"{system.name}, {scenario.title}: {figures.tokens_per_s:.1f} tokens/s")
        except* (BenchmarkFailure, OSError, EOFError) as failures:
            reason = _reason(failures)
            outcome.fail(missing, reason)
            _say(f"{system.name}: not measured: {reason}")


def run_all(
    systems: Sequence[System], outcomes: dict[str, Outcome], job: Job, repeats: int
) -> None:
    """Run all rounds; each starts with another system, so that none is always the first."""
    for repeat in range(repeats):
        _say(f"round {repeat + 1} of {repeats}")
        first = repeat % len(systems)
        for system in [*systems[first:], *systems[:first]]:
            run_round(system, outcomes[system.name], job.scenarios)


def settings_of(
    options: argparse.Namespace, job: Job, descriptions: dict[str, str]
) -> dict[str, object]:
    """Return what is printed above the tables."""
    return {
        "base": f"{job.base.name}, {checkpoint_dtype(job.base)}",
        "work": f"prompts of {options.prompt_words} words, {options.tokens} tokens out, greedy, "
        "end of text ignored, streaming /v1/completions, every prompt new",
        "adapters": f"rank {options.rank} on all seven linears, in turn",
        "runs": f"{options.repeats} rounds of all systems, each started anew and warmed, "
        f"{options.requests} requests a client in each; medians of the rounds, and of their ratios",
        "seed": options.seed,
        **descriptions,
    }


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument(
        "--systems",
        type=option_type(read_systems),
        default=SYSTEM_NAMES,
        help=f"with commas ({','.join(SYSTEM_NAMES)})",
    )
    parser.add_argument(
        "--scenarios",
        type=option_type(parse_scenarios),
        default=parse_scenarios(PEER_SCENARIOS),
        help=f"adapters:clients with commas; adapters may be base ({PEER_SCENARIOS})",
    )
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=2, help="requests per client and round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".bench", help="where peers are installed (.bench)"
    )
    parser.add_argument("--install-only", action="store_true", help="install, measure nothing")
    add_output_options(parser)
    options = parser.parse_args()
    if any(scenario.is_merged for scenario in options.scenarios):
        parser.error("merged adapters are not compared: the peers have none")
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def read_systems(text: str) -> tuple[str, ...]:
    """Read the names of systems.

    Raises: ValueError when one is not known.
    """
    names = tuple(text.split(","))
    for name in names:
        if name.lower() not in (known.lower() for known in SYSTEM_NAMES):
            raise ValueError(f"{name!r} is none of {', '.join(SYSTEM_NAMES)}")
    return names


def main() -> None:
    """Install, measure and report."""
    options = parsed_options()
    machine = Machine.here()
    base = base_folder(options.model)
    with tempfile.TemporaryDirectory(prefix="quickchange-peers-") as made:
        count = max_adapters(options.scenarios)
        adapters = write_adapters(base, Path(made), count, AdapterShape(options.rank))
        prompts = Prompts(options.prompt_words, options.seed)
        work = Work(prompts, options.tokens, options.requests)
        job = Job(base, adapters, options.rank, work, options.scenarios)
        systems = make_systems(options.systems, job, options.folder.resolve())
        outcomes, descriptions = prepared(systems, job)
        if options.install_only:
            print("\n".join(f"{name}: {text}" for name, text in descriptions.items()))
            return
        run_all(systems, outcomes, job, options.repeats)
    publish(options, machine, settings_of(options, job, descriptions), outcomes)


def publish(
    options: argparse.Namespace,
    machine: Machine,
    settings: dict[str, object],
    outcomes: dict[str, Outcome],
) -> None:
    """Print both tables, and write the files that were asked for."""
    own, scenarios = next(iter(outcomes)), options.scenarios
    tables = f"{ratio_table(outcomes, own, scenarios)}\n\n{detail_table(outcomes, scenarios)}"
    results = outcome_results(outcomes, own, scenarios)
    report = Report("Quickchange and its peers", machine, settings, tables, results)
    report.publish(options.markdown, options.json)


def _reason(failures: BaseExceptionGroup[Exception]) -> str:
    """Return the first single failure of a group of groups, as a sentence."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, BenchmarkFailure) else f"{type(error).__name__}: {error}"


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are stopped then too
    with exit_on_failure():
        main()
