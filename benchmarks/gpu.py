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
import faulthandler
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_engine import SHAPES
from benchmarks.gpu_sections import KINDS, Plan
from benchmarks.gpu_session import Session
from benchmarks.machine import Machine
from benchmarks.report import Report

BUDGET_S = 570.0
GRACE_S = 15.0
"""Behind the budget; then whatever hangs is shown and ended."""


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="base of the timings")
    parser.add_argument(
        "--only",
        metavar="KINDS",
        type=lambda text: tuple(text.split(",")),
        default=KINDS,
        help=f"which kinds of sections, with commas: {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument(
        "--checks",
        metavar="NAMES",
        type=lambda text: tuple(text.split(";")),
        default=("",),
        help="how the names of the comparisons begin that are made, with semicolons (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="default: %(default)s"
    )
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else None,
        metavar="FOLDER",
        help="where rows.jsonl and gpu.md go (default: the folder that OUT names)",
    )
    options = parser.parse_args()
    unknown = set(options.only) - set(KINDS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    return options


def main() -> None:
    """Run what was asked for, and report."""
    options = parsed_options()
    faulthandler.dump_traceback_later(options.budget + GRACE_S, exit=True)
    sys.setswitchinterval(1e-4)  # as the server has it: loads go on beside steps
    session = Session(options.budget, options.out)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    machine = Machine.here()
    settings = {"base": f"random, shape {options.shape}", "device": str(device)}
    print(f"{machine.describe()}\n{settings}", flush=True)
    session.note("machine", machine)
    session.note("settings", settings)
    plan = Plan(device, options.shape, session, options.checks)
    plan.run(options.only)
    report = Report("The GPU's path", machine, settings, "\n\n".join(session.tables), [])
    session.write("gpu.md", report.markdown())
    print(f"\n{report.markdown()}")
    print(f"left out: {', '.join(session.left_out) or 'nothing'}")
    print(f"failed: {', '.join(session.failures) or 'nothing'}; {session.left_s:.0f} s are left")
    faulthandler.cancel_dump_traceback_later()
    sys.exit(bool(session.failures))


if __name__ == "__main__":
    main()
