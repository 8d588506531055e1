"""The GPU's kernels compile for GPUs, in bfloat16, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SMALLEST_SHARED_MEMORY = 99 * 1024  # of one block, on GPUs of compute capability 8.6 and 8.9


def test_every_kernel_compiles_within_the_shared_memory_of_a_block(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    shared: dict[str, int] = json.loads(done.stdout)
    assert len(shared) == 8
    assert {name: used for name, used in shared.items() if used > SMALLEST_SHARED_MEMORY} == {}
