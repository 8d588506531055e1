"""Does `quickchange serve` do on a GPU, over HTTP, what it does on a CPU?

Makes a random base with a tokenizer and PEFT adapters in a temporary folder, starts the server on
them as a child process, and asks: loads and streams while adapters change, answers beside those of
transformers and PEFT, versions, merges, refusals, metrics, an end in order. Needs what the server
needs, and PEFT; fetches nothing; runs from the source tree:

    PYTHONPATH=server:adapters:. python benchmarks/gpu_server.py --out gpu-results/server

Exit code 1: a check is BAD, or a section failed. `--device cpu --shape tiny` is a trial.
"""

import argparse
import faulthandler
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_server_model import SHAPES
from benchmarks.gpu_server_plan import KINDS, ServerPlan
from benchmarks.gpu_session import Session
from benchmarks.machine import Machine
from benchmarks.report import Report

BUDGET_S = 120.0
GRACE_S = 60.0
"""Behind the budget; then whatever hangs is shown and ended."""


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="of the base")
    parser.add_argument(
        "--only",
        metavar="KINDS",
        type=lambda text: tuple(text.split(",")),
        default=KINDS,
        help=f"which kinds of checks, with commas: {', '.join(KINDS)} (default: all)",
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
        help="where rows, tables and the servers' logs go (default: the folder that OUT names)",
    )
    options = parser.parse_args()
    unknown = set(options.only) - set(KINDS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    return options


def main() -> None:
    """Run everything, and report."""
    options = parsed_options()
    faulthandler.dump_traceback_later(options.budget + GRACE_S, exit=True)
    session = Session(options.budget, options.out)
    device = torch.device(options.device)
    machine = Machine.here()
    settings = {"base": f"random, shape {options.shape}", "device": str(device)}
    print(f"{machine.describe()}\n{settings}", flush=True)
    session.note("machine", machine)
    session.note("settings", settings)
    with tempfile.TemporaryDirectory(prefix="quickchange-gpu-") as folder:
        plan = ServerPlan(session, Path(folder), SHAPES[options.shape], device)
        try:
            plan.run(options.only)
        except Exception as error:
            session.fail("the run", error)
        finally:
            plan.close()
    report = Report("The server on a GPU", machine, settings, "\n\n".join(session.tables), [])
    session.write("server.md", report.markdown())
    print(f"\n{report.markdown()}")
    print(f"left out: {', '.join(session.left_out) or 'nothing'}")
    print(f"BAD: {', '.join(session.failures) or 'nothing'}; {session.left_s:.0f} s are left")
    faulthandler.cancel_dump_traceback_later()
    sys.exit(bool(session.failures))


if __name__ == "__main__":
    main()
