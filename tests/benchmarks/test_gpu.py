"""The GPU's benchmark: what it may import, and that its comparisons notice a wrong result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("fastapi", "starlette", "uvicorn", "sqlalchemy", "re2", "gguf", "multipart", "openai")
SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing one of them fails
import benchmarks.gpu
print("imported")
"""


def test_it_runs_where_only_torch_triton_and_transformers_are() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    path = os.pathsep.join(str(ROOT / each) for each in ("server", "adapters", ""))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.stdout.strip() == "imported", done.stderr


def test_its_engine_answers_a_mixed_batch_as_hugging_face_does() -> None:
    """With plain kernels, since only the driving is tested here."""
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    from benchmarks import gpu_checks
    from benchmarks.gpu_engine import VOCABULARY

    engine = gpu_checks.ready_engine(torch.device("cpu"), "llama", "float32", kernels="plain")
    answers = engine.run(gpu_checks.ROWS, 3, VOCABULARY)
    assert all(len(answer.token_ids) == 3 for answer in answers)
    worst = gpu_checks.hugging_face_error(engine, "llama", answers)
    assert worst < 1e-4
    swapped = [answers[2], answers[1], answers[0], *answers[3:]]
    assert gpu_checks.hugging_face_error(engine, "llama", swapped) > 0.1


@pytest.mark.parametrize(("error", "is_good"), [(0.5, True), (1.5, False), (float("nan"), False)])
def test_a_comparison_is_good_below_its_limit_only(error: float, *, is_good: bool) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    from benchmarks.gpu_checks import Check

    assert Check("check", error, 1.0).is_good is is_good
