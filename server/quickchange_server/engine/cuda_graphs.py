"""Decode steps captured once per number of rows, and replayed with new inputs.

A captured step reads what changes at fixed addresses. Rows behind the last real one are padding up
to a power of two; they compute a token that nobody wants, in the scratch block:

| input | of a row | of a padding row |
|---|---|---|
| token id, position, KV slot | its own | 0, 0, 0: the scratch block's first slot |
| tile and block table | its own | one token at position 0 of block 0 |
| delta tables | its row block's items | none |

The highest token of each row is found in the captured step too. Knows nothing of the model:
`Forward` computes, `Capture` turns a computation into a replay.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from quickchange_adapters.ops.staged_ints import StagedInts
from quickchange_adapters.plan import RowBlock, StepTables
from torch import Tensor

from quickchange_server.engine.attention import StepTiles
from quickchange_server.engine.attention_tiles import KvRow

log = logging.getLogger(__name__)
MIN_ROWS = 2
NUM_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token for each row, on the host or on the device; `blocks` are those of adapters."""

    token_ids: Sequence[int] | Tensor
    rows: Sequence[KvRow]
    blocks: Sequence[RowBlock]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """A decode step's inputs on the device, padding included: each [rows]."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tiles: StepTiles


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step computed, on the device, until the next one is queued; padding is left out.

    Attributes:
        logits: [rows, vocabulary] float32.
        highest: [rows] ids of the highest logits.
        is_finite: [rows] whether those are finite, and so all that are not minus infinity.
    """

    logits: Tensor
    highest: Tensor
    is_finite: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Decoded":
        """Find the highest of each row; waits for nothing."""
        values, places = logits.max(dim=-1)
        return cls(logits, places, values.abs() < math.inf)

    def first(self, num_rows: int) -> "Decoded":
        """Return the first rows."""
        return Decoded(self.logits[:num_rows], self.highest[:num_rows], self.is_finite[:num_rows])


Replay = Callable[[], Decoded]
Capture = Callable[[Replay], Replay]
Forward = Callable[[DecodeBatch, StepTables | None], Tensor]
"""Computes logits [rows, vocabulary]."""


class TileMaker(Protocol):
    """Makes a step's tiles, at the same address each time."""

    def fill_for_capture(self, rows: Sequence[KvRow]) -> StepTiles:
        """Lay out and upload one step; what it launches serves any of as many rows."""


class DecodeInputs:
    """Where captured steps read their rows. One for all sizes: one step runs at a time."""

    def __init__(
        self, attention: TileMaker, max_rows: int, block_size: int, device: torch.device
    ) -> None:
        self._attention = attention
        self._block_size = block_size
        self._staged = StagedInts(3 * max_rows, device, torch.long)

    def fill(self, step: DecodeStep, num_rows: int) -> DecodeBatch:
        """Upload a step padded to `num_rows`; equal sizes give equal addresses."""
        num_real = len(step.rows)
        padding = [KvRow(row, 0, 1, (0,)) for row in range(num_real, num_rows)]
        rows = [*step.rows, *padding]
        is_known = not isinstance(step.token_ids, Tensor)
        token_ids = [*(step.token_ids if is_known else [0] * num_real), *([0] * len(padding))]
        positions = [row.position for row in rows]
        slots = [self._slot(row) for row in rows]
        self._staged.upload([*token_ids, *positions, *slots])
        inputs = self._staged.values[: 3 * num_rows].view(3, num_rows)
        if isinstance(step.token_ids, Tensor):
            inputs[0, :num_real].copy_(step.token_ids)
        return DecodeBatch(inputs[0], inputs[1], inputs[2], self._attention.fill_for_capture(rows))

    def _slot(self, row: KvRow) -> int:
        block = row.blocks[row.position // self._block_size]
        return block * self._block_size + row.position % self._block_size


class DecodeGraphs:
    """Captured steps by (rows, whether any uses adapters), made when first wanted."""

    def __init__(
        self,
        forward: Forward,
        inputs: DecodeInputs,
        deltas: StepTables,
        max_rows: int,
        capture: Capture,
    ) -> None:
        self._forward = forward
        self._inputs = inputs
        self._deltas = deltas
        self._max_rows = max_rows
        self._capture = capture
        self._replays: dict[tuple[int, bool], Replay] = {}
        self._forgotten: list[dict[tuple[int, bool], Replay]] = []
        self._is_off = False

    @property
    def num_captured(self) -> int:
        """How many steps were captured so far."""
        return len(self._replays)

    def forget(self) -> None:
        """Capture anew from now on: what steps launch has changed.

        The old ones stay, unused: PyTorch does not take up a memory pool that all have left.
        """
        self._forgotten.append(self._replays)
        self._replays = {}

    def captured(self, num_rows: int, *, has_adapters: bool) -> Replay | None:
        """Return the captured step that so many rows take, if there is one: to be timed."""
        padded = padded_rows(num_rows, self._max_rows)
        return None if padded is None else self._replays.get((padded, has_adapters))

    def capture_all(self) -> None:
        """Capture every size now, so that no stream waits for it later; the largest first.

        Smaller ones then find all their memory in the pool.
        """
        self._deltas.fill(())
        num_rows = self._max_rows
        while not self._is_off:
            batch = self._inputs.fill(DecodeStep([], [], ()), num_rows)
            for has_adapters in (True, False):
                self._replay(batch, num_rows, has_adapters=has_adapters)
            if num_rows <= MIN_ROWS:
                break
            num_rows = max(MIN_ROWS, 1 << (num_rows - 1).bit_length() - 1)

    def run(self, step: DecodeStep) -> Decoded | None:
        """Queue a step; its results are valid until the next call; None: compute it plainly."""
        num_rows = padded_rows(len(step.rows), self._max_rows)
        if self._is_off or num_rows is None:
            return None
        if self._deltas.fill(step.blocks) < len(step.blocks):
            return None
        batch = self._inputs.fill(step, num_rows)
        replay = self._replay(batch, num_rows, has_adapters=bool(step.blocks))
        return None if replay is None else replay().first(len(step.rows))

    def _replay(self, batch: DecodeBatch, num_rows: int, *, has_adapters: bool) -> Replay | None:
        key = (num_rows, has_adapters)
        if key not in self._replays:
            deltas = self._deltas if has_adapters else None
            if deltas is not None:
                deltas.launch_for(num_rows)
            if self._is_off:
                return None
            try:
                self._replays[key] = self._capture(lambda: Decoded.of(self._forward(batch, deltas)))
            except Exception:  # Triton's errors have no base in common with PyTorch's
                log.exception("decode steps cannot be captured; they are computed without graphs")
                self._is_off = True
                return None
        return self._replays[key]


def padded_rows(num_rows: int, max_rows: int) -> int | None:
    """Return the next power of two, at most `max_rows`; None for more rows than that."""
    if num_rows > max_rows:
        return None
    return min(max(MIN_ROWS, 1 << (num_rows - 1).bit_length()), max_rows)


def compute_again(compute: Replay) -> Replay:
    """Where nothing can be captured, replaying is computing: the inputs are read anew."""
    return compute


class DeviceCapture:
    """Captures CUDA graphs that share one memory pool, so only one result is valid at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Replay) -> Replay:
        """Warm up beside the stream, as capturing demands, then capture."""
        stream = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                compute()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            decoded = compute()

        def replay() -> Decoded:
            graph.replay()
            return decoded

        return replay
