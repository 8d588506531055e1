"""A quiet tenant beside a flood: the arithmetic, and a small run against a real server."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.fairness import Outcome, outcome_table

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fairness.py"


def test_the_bound_is_alone_and_two_full_steps() -> None:
    outcome = Outcome((0.1, 0.1, 0.1), (0.12, 0.15), 0.03)
    assert abs(outcome.bound_s - 0.16) < 1e-9
    assert outcome.is_within
    assert not Outcome((0.1,), (0.17,), 0.03).is_within
    lines = outcome_table(outcome).splitlines()
    assert [cell.strip() for cell in lines[4].strip("|").split("|")][3] == "160"
    assert lines[-1] == "A step of the full batch takes 30.0 ms (mean); the bound holds."


def test_a_small_run_measures_both(tiny_base: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    sizes = ["--rows", "4", "--flood-clients", "12", "--adapters", "0", "--tokens", "60"]
    counts = ["--requests", "3", "--repeats", "1", "--pause", "0.01", "--prompt-words", "8"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", str(tiny_base), *sizes, *counts]
        + ["--json", str(results), "--server-args", "--max-model-len 256 --kv-cache-bytes 8MiB"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "beside the flood" in done.stdout
    (result,) = json.loads(results.read_text())["results"]
    assert len(result["alone_s"]) == len(result["beside_s"]) == 3
    assert result["step_s"] >= 0  # so short a run may have no step of a full batch
