"""Does `quickchange serve` do on a GPU, over HTTP, what it does on a CPU?

Makes a random base with a tokenizer and PEFT adapters in a temporary folder, starts the server on
them as a child process, and asks: loads and streams while adapters change, answers beside those of
transformers and PEFT, versions, merges, refusals, metrics, an end in order. Needs what the server
needs, and PEFT; fetches nothing; runs from the source tree:

    PYTHONPATH=server:adapters:. python benchmarks/gpu_server.py --out gpu-results/server

Exit code 1: a check is BAD, or a section failed. `--device cpu --shape tiny` is a trial.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_run import GpuRun, parsed_options
from benchmarks.gpu_server_model import SHAPES
from benchmarks.gpu_server_plan import KINDS, ServerPlan

BUDGET_S = 120.0
GRACE_S = 60.0


def main() -> None:
    """Run everything, and report."""
    options = parsed_options(__doc__, SHAPES, KINDS, BUDGET_S)
    run = GpuRun(options, GRACE_S)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(prefix="quickchange-gpu-") as folder:
        plan = ServerPlan(run.session, Path(folder), SHAPES[options.shape], device)
        try:
            plan.run(options.only)
        except Exception as error:
            run.session.fail("the run", error)
        finally:
            plan.close()
    run.end("The server on a GPU", "server.md", "BAD")


if __name__ == "__main__":
    main()
