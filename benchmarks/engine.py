"""How fast is the engine alone, without HTTP, and how far is that from the machine's limit?

Decode steps per second for the base and for rows of several adapters, and prefill tokens per
second. Needs torch and transformers only, and runs from the source tree:

    PYTHONPATH=server:adapters python benchmarks/engine.py --model BASE_FOLDER --device cpu

`--profile torch`, `python` or `native` prints where the time of a decode step goes, per scenario.
"""

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickchange_server.thread_affinity import prepare_threads, restore_affinity

from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, option_type
from benchmarks.workload import DEFAULT_SCENARIOS, max_adapters, parse_scenarios


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=["int8"], help="quantise the base")
    parser.add_argument("--kernels", default="auto", help="auto, native or plain")
    parser.add_argument(
        "--scenarios",
        type=option_type(parse_scenarios),
        default=parse_scenarios(DEFAULT_SCENARIOS),
        help=f"adapters:rows with commas; adapters may be base or merged ({DEFAULT_SCENARIOS})",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per row")
    parser.add_argument("--prefill-tokens", type=int, default=1000, help="0: no prefill runs")
    parser.add_argument("--max-step-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-cache-mib", type=int, default=1024)
    parser.add_argument("--adapter-device-mib", type=int, default=1024)
    parser.add_argument(
        "--profile", choices=("torch", "python", "native"), help="profile decode steps"
    )
    parser.add_argument("--profile-steps", type=int, default=20)
    add_output_options(parser)
    return parser.parse_args()


def settings_of(options: argparse.Namespace, dtype: str, bandwidth: float) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        "server": "none: EngineClient in this process",
        "base": options.model.name,
        "dtype, device": f"{dtype}, {options.device}",
        "kernels, quantised": f"{options.kernels}, {options.quantize or 'no'}",
        "work": f"prompts of {options.prompt_tokens} tokens, {options.tokens} tokens out, greedy, "
        f"end of text ignored, at most {options.max_step_tokens} tokens a step",
        "adapters": f"rank {options.rank} on every linear of the blocks, in turn over the rows",
        "runs": f"{options.repeats} interleaved; medians of the runs",
        "read bandwidth measured here": f"{bandwidth / 1e9:.1f} GB/s",
    }


def main() -> None:
    """Measure and report, or profile."""
    options = parsed_options()
    prepare_threads()
    machine = Machine.here()
    from benchmarks.engine_runs import EngineBench, engine_table, read_bandwidth

    restore_affinity()
    bandwidth = read_bandwidth(options.device)
    bench = EngineBench(options)
    num_adapters = max_adapters(options.scenarios)
    if options.profile:
        asyncio.run(bench.profile(options.scenarios, num_adapters))
        return
    runs = asyncio.run(bench.run_all(options.scenarios, num_adapters))
    report = Report(
        "The engine alone",
        machine,
        settings_of(options, bench.dtype, bandwidth),
        engine_table(runs, bench.floor, bandwidth),
        [run.as_json() for figures in runs.values() for run in figures],
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
