"""Does the GPU's path compute what it should, and how fast is it?

First the comparisons with plain oracles; then, if all are good, the timings. Needs torch, Triton
and transformers only, and runs from the source tree:

    PYTHONPATH=server:adapters:. python benchmarks/gpu.py --shape 8b --markdown gpu.md

`--device cpu` with TRITON_INTERPRET=1 tries out the comparisons in Triton's interpreter (slow).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_checks import Check, run_checks
from benchmarks.gpu_engine import SHAPES
from benchmarks.gpu_timings import (
    Timing,
    attention_timings,
    delta_timings,
    engine_timings,
)
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table

SCENARIOS = ((1, 0), (1, 1), (8, 8), (32, 0), (32, 1), (32, 32))
TRIAL_SCENARIOS = ((2, 1),)


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="base of the timings")
    parser.add_argument("--only", choices=("checks", "timings"))
    add_output_options(parser)
    return parser.parse_args()


def checked(device: torch.device) -> list[Check]:
    """Make all comparisons and print each."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    checks = []
    for check in run_checks(device, [torch.float32, half]):
        verdict = "good" if check.is_good else "BAD"
        print(f"{verdict:5}{check.error:10.2e} (limit {check.limit:.0e})  {check.name}", flush=True)
        checks.append(check)
    return checks


def timed(device: torch.device, shape: str) -> list[Timing]:
    """Take all timings; a few small ones where there is no GPU."""
    is_trial = device.type != "cuda"
    dtype = torch.float32 if is_trial else torch.bfloat16
    scale = 16 if is_trial else 1
    scenarios = TRIAL_SCENARIOS if is_trial else SCENARIOS
    with torch.inference_mode():
        kernels = [
            *delta_timings(device, dtype, scale),
            *attention_timings(device, dtype, scale),
        ]
    name = str(dtype).removeprefix("torch.")
    return [*kernels, *engine_timings(device, name, shape, scenarios)]


def main() -> None:
    """Check, then measure and report. Exit code 1: something is computed wrongly."""
    options = parsed_options()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checks = [] if options.only == "timings" else checked(device)
    num_bad = sum(not check.is_good for check in checks)
    print(f"{len(checks) - num_bad} of {len(checks)} comparisons are good", flush=True)
    if num_bad:
        sys.exit(1)
    if options.only == "checks":
        return
    timings = timed(device, options.shape)
    report = Report(
        "The GPU's path",
        Machine.here(),
        {"base": f"random, shape {options.shape}", "device": str(device)},
        markdown_table(("what", "median", ""), timings),
        [{"what": what, "median": value, "note": note} for what, value, note in timings],
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    main()
