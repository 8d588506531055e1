"""What does the host's part of a captured decode step cost: scheduling, tables, handing out?

Runs without a GPU: nothing is computed, a replay returns logits that are there. So what is timed is
the engine's own Python, and none of what a GPU's driver takes. Runs of steps in turn and of steps
launched ahead are interleaved; on a GPU the latter's part is hidden behind the step that runs.

    PYTHONPATH=server:adapters python benchmarks/host_step.py
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from quickchange_server.engine.cuda_graphs import Decoded, Replay
from quickchange_server.engine.packing import Packing
from quickchange_server.engine.settings import EngineSettings
from torch import Tensor

from benchmarks.gpu_engine import MIB, TINY, GpuEngine, Row, random_adapter, random_prompt
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table

VOCABULARY = 512
MAX_ROWS = 64
MAX_MODEL_LEN = 8192
RANKS = (8, 16, 32, 64)
HEADER = ("rows", "adapters", "prompt", "in turn", "ahead")
SHAPE = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """So many rows, each with an adapter of its own or none, after prompts of one length."""

    num_rows: int
    num_adapters: int
    prompt_tokens: int

    def rows(self) -> list[Row]:
        """Return the requests."""
        return [self._row(index) for index in range(self.num_rows)]

    def _row(self, index: int) -> Row:
        mix = ((index % self.num_adapters, 1.0),) if self.num_adapters else ()
        return Row(random_prompt(self.prompt_tokens, index), mix)


def idle_engine(*, is_ahead: bool) -> GpuEngine:
    """Make an engine whose steps compute nothing."""
    settings = EngineSettings(
        device="cpu",
        dtype="float32",
        kv_cache_bytes=1024 * MIB,
        adapter_device_bytes=64 * MIB,
        max_step_tokens=MAX_MODEL_LEN,
        max_batch_rows=MAX_ROWS,
        merged_bytes=0,
        kernels="triton",
        steps_ahead=is_ahead,
    )
    engine = GpuEngine("llama", SHAPE, settings)
    logits = torch.randn(MAX_ROWS, VOCABULARY)
    decoded = Decoded.of(logits)

    def compute(packed: Packing, merged: object) -> Tensor:
        return logits[: len(packed.logit_rows())]

    def capture(compute: Replay) -> Replay:
        return lambda: decoded

    assert engine.runner.graphs is not None
    engine.runner._compute = compute  # type: ignore[method-assign]
    engine.runner.graphs._capture = capture
    for seed in range(MAX_ROWS):
        engine.add_adapter(random_adapter(engine.base, RANKS[seed % len(RANKS)], seed))
    return engine


def step_ms(engine: GpuEngine, batch: Batch, num_tokens: int) -> float:
    """Return the median period of a batch's decode steps."""
    engine.run(batch.rows(), num_tokens, None)
    return 1e3 * median(engine.recorder.decode_periods_s(batch.num_rows))


def measure(batches: Sequence[Batch], num_tokens: int, repeats: int) -> Iterator[dict[str, object]]:
    """Yield a row for each batch: every run's median, and the medians of these."""
    ways = {"in turn": idle_engine(is_ahead=False), "ahead": idle_engine(is_ahead=True)}
    for batch in batches:
        runs: dict[str, list[float]] = {way: [] for way in ways}
        for engine in ways.values():
            engine.run(batch.rows(), 4, None)
        for _ in range(repeats):
            for way, engine in ways.items():
                runs[way].append(step_ms(engine, batch, num_tokens))
        yield {
            "rows": batch.num_rows,
            "adapters": batch.num_adapters,
            "prompt": batch.prompt_tokens,
            "runs_ms": runs,
            **{way: median(own) for way, own in runs.items()},
        }


BATCHES = (
    Batch(1, 0, 512),
    Batch(8, 8, 512),
    Batch(64, 0, 512),
    Batch(64, 64, 512),
    Batch(64, 64, 3000),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small batch: does it work?")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    batches = (Batch(2, 2, 16),) if options.quick else BATCHES
    machine = Machine.here()
    results = list(measure(batches, options.tokens, options.repeats))
    rows = [
        (*(str(each[name]) for name in HEADER[:3]), *(f"{each[way]:.2f} ms" for way in HEADER[3:]))
        for each in results
    ]
    settings = {"steps of a run": options.tokens, "repeats": options.repeats}
    table = markdown_table(HEADER, rows)
    report = Report("The host's part of a step", machine, settings, table, results)
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    main()
