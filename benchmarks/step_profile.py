"""Profiles a stretch of decode steps from inside the engine's thread.

The engine calls its observer on its own thread once a step; there the profiler is switched on and
off, so that it sees that thread and no other.
"""

import cProfile
import io
import pstats
from typing import Literal

import torch
from quickchange_server.engine.native_step import NativeStep

from benchmarks.failure import BenchmarkFailure
from benchmarks.report import markdown_table

NUM_LINES = 30

ProfilerKind = Literal["torch", "python", "native"]


class StepProfiler:
    """Switched on by the first decode step, off after `num_steps` more.

    `torch` shows operators, `python` functions, `native` the stages of the native library. The
    first two slow the steps: read shares, not times.
    """

    def __init__(
        self, kind: ProfilerKind, num_steps: int, native: NativeStep | None = None
    ) -> None:
        if kind == "native" and native is None:
            raise BenchmarkFailure("native kernels do not run this base here")
        self._native = native
        self._seconds: dict[str, float] = {}
        self._kind = kind
        self._num_steps = num_steps
        self._num_seen = 0
        self._python = cProfile.Profile()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._torch = torch.profiler.profile(activities=activities)

    def on_decode_step(self) -> None:
        """Count a step; runs on the engine thread."""
        if self._num_seen == 0:
            self._start()
        elif self._num_seen == self._num_steps:
            self._stop()
        self._num_seen += 1

    def summary(self) -> str:
        """Return the table of what took longest.

        Raises: BenchmarkFailure when fewer decode steps ran than were to be profiled.
        """
        if self._num_seen <= self._num_steps:
            raise BenchmarkFailure(
                f"{self._num_seen} decode steps ran, {self._num_steps} were wanted"
            )
        if self._kind == "python":
            text = io.StringIO()
            pstats.Stats(self._python, stream=text).sort_stats("tottime").print_stats(NUM_LINES)
            return text.getvalue()
        if self._kind == "native":
            return self._stages()
        table: str = self._torch.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=NUM_LINES, max_name_column_width=40
        )
        return f"{self._num_steps} decode steps\n{table}"

    def _stages(self) -> str:
        milliseconds = {name: 1e3 * s / self._num_steps for name, s in self._seconds.items()}
        rows = [(name, f"{each:.2f}") for name, each in milliseconds.items()]
        rows.append(("all stages", f"{sum(milliseconds.values()):.2f}"))
        return f"{self._num_steps} decode steps\n{markdown_table(('stage', 'ms a step'), rows)}"

    def _start(self) -> None:
        if self._native is not None:
            self._native.start_clock()
            return
        if self._kind == "python":
            self._python.enable()
        else:
            self._torch.start()

    def _stop(self) -> None:
        if self._native is not None:
            self._seconds = self._native.read_clock()
            return
        if self._kind == "python":
            self._python.disable()
        else:
            self._torch.stop()
