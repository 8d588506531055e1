"""The GPU's benchmark: what it may import, that its comparisons notice, and how a run is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_server.engine.observer import StepStats

from benchmarks.gpu_engine import Recorder
from benchmarks.gpu_session import Row, Section, Session
from tests.server.engine.plain_graphs import use_plain_graphs

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


def test_its_engine_launches_steps_ahead_also_behind_a_load() -> None:
    """A load that ends calls the engine's thread, which is not there."""
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    from benchmarks import gpu_checks

    engine = gpu_checks.ready_engine(torch.device("cpu"), "llama", "float32", kernels="plain")
    use_plain_graphs(engine.runner, 8, is_ahead=True)
    engine.run(gpu_checks.ROWS, 4, None, is_resident=False)
    before = engine.num_ahead
    engine.run(gpu_checks.ROWS, 8, None)
    assert engine.num_ahead > before + 3


@pytest.mark.parametrize(("error", "is_good"), [(0.5, True), (1.5, False), (float("nan"), False)])
def test_a_comparison_is_good_below_its_limit_only(error: float, *, is_good: bool) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    from benchmarks.gpu_far_checks import Check

    assert Check("check", error, 1.0).is_good is is_good


def rows_of(count: int, error: Exception | None = None) -> Iterator[Row]:
    for index in range(count):
        yield Row((str(index),), {"index": index})
    if error is not None:
        raise error


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_row_is_in_the_file_as_soon_as_it_was_measured(tmp_path: Path) -> None:
    session = Session(100, tmp_path)
    seen = []

    def rows() -> Iterator[Row]:
        for row in rows_of(3):
            yield row
            seen.append(len(records_of(tmp_path)))

    session.run(Section("things", ("thing",), 1, rows))
    assert seen == [1, 2, 3]
    assert records_of(tmp_path)[2]["index"] == 2


def test_a_failed_section_keeps_its_rows_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(100, tmp_path)
    first = session.run(Section("bad", ("n",), 1, lambda: rows_of(2, ValueError("no such thing"))))
    second = session.run(Section("good", ("n",), 1, lambda: rows_of(1)))
    assert (len(first), len(second), session.failures) == (2, 1, ["bad"])
    assert "no such thing" in capsys.readouterr().out
    assert [each for each in records_of(tmp_path) if "failed" in each]
    assert len(session.tables) == 2


def test_a_row_that_cannot_be_measured_leaves_the_others(tmp_path: Path) -> None:
    def fail() -> Row:
        raise RuntimeError("out of memory")

    session = Session(100, tmp_path)
    own = [partial(Row, (str(n),), {"n": n}) for n in range(2)]
    rows = session.run(Section("mixed", ("n",), 1, lambda: [own[0], fail, own[1]]))
    assert [row.values["n"] for row in rows] == [0, 1]
    assert session.failures == ["mixed"]


def test_a_section_that_needs_more_time_than_is_left_is_left_out_and_named(tmp_path: Path) -> None:
    now_s = [0.0]
    session = Session(60, tmp_path, clock=lambda: now_s[0])
    now_s[0] = 40
    assert session.run(Section("long", ("n",), 30, lambda: rows_of(1))) == []
    assert len(session.run(Section("short", ("n",), 20, lambda: rows_of(1)))) == 1
    assert session.left_out == ["long"]
    assert session.failures == []
    assert "20 s are left" in records_of(tmp_path)[0]["left_out"]


def test_a_step_is_timed_from_end_to_end_while_all_rows_decode() -> None:
    recorder = Recorder()
    kinds = [("prefill", 2), ("decode", 2), ("decode", 2), ("mixed", 2), ("decode", 2)]
    for kind, num_rows in kinds:
        recorder.on_step(StepStats(kind, "base", 0.0, num_rows, 0, 0))  # type: ignore[arg-type]
    recorder.ends_s = [1.0, 3.0, 6.0, 10.0, 15.0]
    assert recorder.decode_periods_s(2) == [3.0]


def test_every_part_of_it_runs_with_tiny_sizes(tmp_path: Path) -> None:
    """A slip in a line that only a lent GPU reaches would cost the whole lease."""
    pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--shape", "tiny"]
    path = os.pathsep.join(str(ROOT / each) for each in ("server", "adapters", ""))
    done = subprocess.run(
        [*command, "--only", "ceilings,decode,loads,peers,many", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sections = {each["section"] for each in records_of(tmp_path) if "section" in each}
    assert {"Ceilings", "Decode steps", "Prefill", "Gaps", "Thousands of adapters"} <= sections
    assert {"PEFT", "transformers, continuous batching"} <= sections
    assert "#### Decode steps" in (tmp_path / "gpu.md").read_text()
