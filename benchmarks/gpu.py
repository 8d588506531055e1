"""Does the GPU's path compute what it should, and how fast is it?

First the comparisons with plain oracles, then, under a budget of seconds, the timings: most wanted
first, each row printed and written as it comes. A section that fails prints where, and the rest
goes on; one that needs more time than is left is left out, and said to be. Needs torch, Triton
and transformers only (PEFT for its own lines), and runs from the source tree:

    PYTHONPATH=server:adapters:. python benchmarks/gpu.py --shape 8b --out gpu-results

Exit code 1: something is computed wrongly, or a section failed. `--device cpu --shape tiny` goes
through every section with tiny sizes; with TRITON_INTERPRET=1 in Triton's interpreter, slowly.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_engine import SHAPES
from benchmarks.gpu_run import GpuRun, parsed_options
from benchmarks.gpu_sections import KINDS, Plan

BUDGET_S = 570.0
GRACE_S = 15.0


def add_checks_option(parser: argparse.ArgumentParser) -> None:
    """Add what says which comparisons are made."""
    parser.add_argument(
        "--checks",
        metavar="NAMES",
        type=lambda text: tuple(text.split(";")),
        default=("",),
        help="how the names of the comparisons begin that are made, with semicolons (default: all)",
    )


def main() -> None:
    """Run what was asked for, and report."""
    options = parsed_options(__doc__, SHAPES, KINDS, BUDGET_S, add_checks_option)
    sys.setswitchinterval(1e-4)  # as the server has it: loads go on beside steps
    run = GpuRun(options, GRACE_S)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    Plan(device, options.shape, run.session, options.checks).run(options.only)
    run.end("The GPU's path", "gpu.md", "failed")


if __name__ == "__main__":
    main()
