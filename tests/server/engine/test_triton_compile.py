"""The GPU's kernels compile for GPUs, in bfloat16, on a machine that has none, and fit them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SMALLEST_SHARED_MEMORY = 99 * 1024  # of one block, on GPUs of compute capability 8.6 and 8.9
REGISTERS, SHARED_MEMORY = 64 * 1024, 227 * 1024  # of a multiprocessor of compute capability 9.0
WARP = 32
Usage = dict[str, int]


@pytest.fixture(scope="module")
def usages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Usage]:
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Usage] = json.loads(done.stdout)
    assert len(found) == 43
    return found


def test_every_kernel_compiles_within_the_shared_memory_of_a_block(
    usages: dict[str, Usage],
) -> None:
    large = {name: each for name, each in usages.items() if each["shared"] > SMALLEST_SHARED_MEMORY}
    assert set(large) == {"product, deep, sm_90"}, "which runs on large GPUs alone"


def test_no_kernel_of_a_decode_step_spills_registers(usages: dict[str, Usage]) -> None:
    """What is spilled goes through memory, which is what a decode step is short of."""
    assert {n: e for n, e in usages.items() if e["stack"] and not n.startswith("tiles")} == {}
    assert {n: e for n, e in usages.items() if e["stack"] and n.endswith("sm_90")} == {}


def test_what_reads_weights_and_kv_reads_sixteen_bytes_at_a_time(usages: dict[str, Usage]) -> None:
    """Triton falls back to one number a load where it cannot see that a column is aligned."""
    readers = ("shrink", "expand", "product", "pieces", "tiles", "norm", "gated")
    narrow = {n: e for n, e in usages.items() if e["widest_load_bytes"] < 16}
    assert {n: e for n, e in narrow.items() if n.startswith(readers)} == {}


@pytest.mark.parametrize("kernel", ["shrink", "pieces", "product"])
def test_enough_bytes_are_in_flight_to_keep_the_memory_busy(
    usages: dict[str, Usage], kernel: str
) -> None:
    """On a multiprocessor: 3 TB/s times a microsecond, over 132 of them, are 23 KB."""
    for name, usage in usages.items():
        if name.startswith(kernel) and name.endswith("sm_90"):
            by_registers = REGISTERS // (usage["registers"] * usage["threads"])
            num_blocks = min(by_registers, SHARED_MEMORY // usage["shared"])
            assert num_blocks * usage["bytes_in_flight"] >= 32 * 1024, name
