"""What a captured decode step reads where, and when a step is captured. Captures nothing itself."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from quickchange_adapters.arena import Arena
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.plan import Projection, RowBlock, StepTables, Term
from quickchange_adapters.pool import Slot
from quickchange_server.engine.attention import KvStorage, Rule
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.cuda_graphs import (
    DecodeBatch,
    DecodeGraphs,
    DecodeInputs,
    DecodeStep,
    Replay,
    padded_rows,
)
from torch import Tensor

BLOCK_SIZE = 4
MAX_ROWS = 6
CPU = torch.device("cpu")
BLOCK = RowBlock(0, 1, (Term(Slot("a", {}, 0)),))


@dataclass
class Tiles:
    """Stands for a step's tiles on the device."""

    rows: Sequence[KvRow]

    def attend(
        self, storage: KvStorage, layer: int, query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        raise NotImplementedError


class TileMaker:
    """Keeps the rows that it was given."""

    def fill_for_capture(self, rows: Sequence[KvRow]) -> Tiles:
        return Tiles(rows)


@dataclass
class Tables:
    """Step tables with room for so many blocks; notes for what it launches."""

    capacity: int = MAX_ROWS
    launches: list[int] = field(default_factory=list)

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        return min(len(blocks), self.capacity)

    def launch_for(self, max_blocks: int) -> None:
        self.launches.append(max_blocks)

    def start(self, x: Tensor, arena: Arena, layer: int) -> None:
        raise NotImplementedError

    def project(
        self, weight: LinearWeight, x: Tensor, bias: Tensor | None, arena: Arena, layer: int
    ) -> Projection:
        raise NotImplementedError

    def add(self, y: Tensor, arena: Arena, layer: int) -> None:
        raise NotImplementedError


def inputs_of() -> DecodeInputs:
    return DecodeInputs(TileMaker(), MAX_ROWS, BLOCK_SIZE, CPU)


def step_of(num_rows: int, blocks: Sequence[RowBlock] = ()) -> DecodeStep:
    rows = [KvRow(i, 5 + i, 1, [10 * i + 3, 10 * i + 4, 10 * i + 5]) for i in range(num_rows)]
    return DecodeStep([100 + i for i in range(num_rows)], rows, blocks)


@dataclass
class Recorder:
    """A model whose logits are its token ids, and a capture that notes what it captured."""

    captured: list[tuple[int, bool]] = field(default_factory=list)
    error: RuntimeError | None = None

    def forward(self, batch: DecodeBatch, tables: StepTables | None) -> Tensor:
        self.last = (batch.token_ids.shape[0], tables is not None)
        return batch.token_ids[:, None].float()

    def capture(self, compute: Replay) -> Replay:
        if self.error is not None:
            raise self.error
        compute()
        self.captured.append(self.last)
        return compute

    def graphs(self, tables: Tables | None = None, max_rows: int = MAX_ROWS) -> DecodeGraphs:
        return DecodeGraphs(self.forward, inputs_of(), tables or Tables(), max_rows, self.capture)


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6), (7, None)]
)
def test_rows_are_padded_to_powers_of_two_up_to_the_most(num_rows: int, expected: int) -> None:
    assert padded_rows(num_rows, MAX_ROWS) == expected


def test_rows_keep_their_own_and_padding_goes_to_the_scratch_block() -> None:
    batch = inputs_of().fill(step_of(3), 4)
    assert batch.token_ids.tolist() == [100, 101, 102, 0]
    assert batch.positions.tolist() == [5, 6, 7, 0]
    assert batch.slots.tolist() == [4 * 4 + 1, 14 * 4 + 2, 24 * 4 + 3, 0]
    assert isinstance(batch.tiles, Tiles)
    assert [row.start for row in batch.tiles.rows] == [0, 1, 2, 3]
    assert batch.tiles.rows[3] == KvRow(3, 0, 1, (0,))


def test_equal_sizes_have_equal_addresses_and_nothing_old_is_left() -> None:
    inputs = inputs_of()
    first = inputs.fill(step_of(4), 4)
    addresses = [t.data_ptr() for t in (first.token_ids, first.positions, first.slots)]
    inputs.fill(step_of(6), 6)
    second = inputs.fill(step_of(3), 4)
    assert [t.data_ptr() for t in (second.token_ids, second.positions, second.slots)] == addresses
    assert first.token_ids.tolist() == second.token_ids.tolist() == [100, 101, 102, 0]
    assert second.slots.tolist()[3] == 0


def test_a_step_is_captured_once_per_size_and_use_of_adapters() -> None:
    recorder, tables = Recorder(), Tables()
    graphs = recorder.graphs(tables)
    for num_rows in (3, 4, 3, 6, 5):
        decoded = graphs.run(step_of(num_rows))
        assert decoded is not None
        assert decoded.logits[:, 0].tolist() == [100 + i for i in range(num_rows)]
        assert decoded.highest.tolist() == [0] * num_rows
        assert decoded.is_finite.tolist() == [True] * num_rows
    assert recorder.captured == [(4, False), (6, False)]
    assert tables.launches == []
    assert graphs.run(step_of(3, [BLOCK])) is not None
    assert recorder.captured[2:] == [(4, True)]
    assert tables.launches == [4]
    assert graphs.num_captured == 3


def test_steps_that_do_not_fit_are_left_to_the_plain_path() -> None:
    recorder = Recorder()
    graphs = recorder.graphs(Tables(capacity=1))
    assert graphs.run(step_of(MAX_ROWS + 1)) is None
    assert graphs.run(step_of(2, [BLOCK, BLOCK])) is None
    assert recorder.captured == []


def test_a_capture_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(error=RuntimeError("operation not permitted when stream is capturing"))
    graphs = recorder.graphs()
    assert graphs.run(step_of(2)) is None
    recorder.error = None
    assert graphs.run(step_of(2)) is None
    assert "without graphs" in caplog.text


def test_all_sizes_can_be_captured_ahead_and_are_those_that_steps_want() -> None:
    recorder = Recorder()
    graphs = recorder.graphs()
    graphs.capture_all()
    assert recorder.captured == [(n, has) for n in (6, 4, 2) for has in (True, False)]
    for num_rows in range(1, MAX_ROWS + 1):
        assert graphs.run(step_of(num_rows)) is not None
        assert graphs.run(step_of(num_rows, [BLOCK])) is not None
    assert graphs.num_captured == 6


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, (1,)), (2, (2,)), (3, (3, 2)), (4, (4, 2))])
def test_capturing_ahead_ends_with_the_smallest_size(max_rows: int, sizes: tuple[int, ...]) -> None:
    recorder = Recorder()
    graphs = recorder.graphs(max_rows=max_rows)
    graphs.capture_all()
    assert recorder.captured == [(n, has) for n in sizes for has in (True, False)]
    assert graphs.run(step_of(1)) is not None
    assert graphs.num_captured == 2 * len(sizes)


def test_capturing_ahead_ends_with_the_first_failure() -> None:
    recorder = Recorder(error=RuntimeError("out of memory"))
    graphs = recorder.graphs()
    graphs.capture_all()
    recorder.error = None
    graphs.capture_all()
    assert recorder.captured == []


def test_forgotten_steps_are_captured_anew_and_the_old_ones_stay_alive() -> None:
    recorder = Recorder()
    graphs = recorder.graphs()
    graphs.run(step_of(2))
    before = weakref.ref(graphs.captured(2, has_adapters=False))
    graphs.forget()
    assert graphs.captured(2, has_adapters=False) is None
    graphs.run(step_of(2))
    assert recorder.captured == [(2, False), (2, False)]
    assert before() is not None
