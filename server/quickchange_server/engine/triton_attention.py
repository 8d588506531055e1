"""Attention that reads KV blocks where they lie, for GPUs. Import it only where Triton is.

A program owns one KV head of a piece of one row's context, or of a tile of a prompt's tokens; its
rows are tokens × the query heads that share the head. It walks the block table once with a running
softmax: nothing is gathered, and only the request's own blocks are read. Pieces of one row are
joined in their order by a second kernel.

Source: Dao et al. 2022 (arXiv 2205.14135); blocks as in Kwon et al. 2023 (arXiv 2309.06180);
pieces as in Flash-Decoding (Dao et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from quickchange_adapters.ops.staged_ints import StagedInts
from quickchange_adapters.ops.triton_chain import is_chained, launch_options
from torch import Tensor

from quickchange_server.engine.attention import KvShape, KvStorage, Rule
from quickchange_server.engine.attention_tiles import (
    MAX_PIECES,
    MIN_PIECE,
    Cut,
    KvRow,
    TileTable,
    tile_table,
)
from quickchange_server.engine.triton_attention_kernels import (
    attend_pieces,
    attend_tiles,
    join_pieces,
)

MAX_TILE_ROWS = 64
MIN_TILE = 16
MIN_PROGRAMS, MAX_PROGRAMS, PROGRAMS_PER_ROW = 64, 512, 8
"""For each KV head of a captured step: what pieces there are take turns."""
PIECE_WARPS, CHAINED_PIECE_WARPS = 4, 2
"""For each program of a piece. Two were a sixth faster with many rows on an H200."""
JOINED_HEADS = 32
"""How many query heads' sums are joined at a time, of several pieces."""


@dataclass(frozen=True, slots=True)
class Partials:
    """Sums of pieces that are to be joined: float32, flat; layers use it in turn."""

    mixed: Tensor
    stats: Tensor

    @classmethod
    def of(cls, count: int, shapes: Sequence[KvShape], device: torch.device) -> "Partials":
        """Make room for so many pieces of any layer."""
        heads = [shape.num_heads * shape.num_groups for shape in shapes] or [1]
        values = [each * shape.value_dim for each, shape in zip(heads, shapes, strict=False)] or [1]
        return cls(
            torch.empty(count * max(values), dtype=torch.float32, device=device),
            torch.empty(count * max(heads) * 2, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True)
class TritonTiles:
    """One step's work on the device; implements `StepTiles`."""

    numbers: Tensor
    partials: Partials
    table: TileTable
    num_programs: int
    num_joined: int
    tile_tokens: int

    def attend(
        self, storage: KvStorage, layer: int, query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        """Fill out [tokens, heads, value dim] for query [heads, tokens, dim]."""
        query = query if query.stride(2) == 1 else query.contiguous()
        kv = storage.keys[layer], storage.values[layer]
        if self.num_programs:
            self._attend_pieces(kv, query, rule, out)
        if self.table.num_tiles:
            self._attend_tiles(kv, query, rule, out)

    def _attend_pieces(
        self, kv: tuple[Tensor, Tensor], query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        keys, values = kv
        num_kv, value_dim = keys.shape[2], values.shape[3]
        groups = query.shape[0] // num_kv
        row_tile = _padded(groups)
        partials = self.partials.mixed, self.partials.stats
        options = launch_options(is_on=is_chained(out.device))
        num_warps = CHAINED_PIECE_WARPS if options["IS_CHAINED"] else PIECE_WARPS
        attend_pieces[(self.num_programs, num_kv)](
            self.numbers, query, keys, values, out, *partials, *_numbers(rule, query),
            **_constants(kv, groups, rule), ROW_TILE=row_tile,
            num_warps=num_warps, num_stages=3, **options,
        )  # fmt: skip
        if self.num_joined:
            joined_tile = triton.next_power_of_2(groups)
            join_pieces[(self.num_joined, num_kv)](
                self.numbers, out, *partials,
                NUM_KV=num_kv, GROUPS=groups, VALUE_DIM=value_dim,
                VALUE_TILE=_padded(value_dim), ROW_TILE=joined_tile,
                PIECE_TILE=max(1, JOINED_HEADS // joined_tile), **options,
            )  # fmt: skip

    def _attend_tiles(
        self, kv: tuple[Tensor, Tensor], query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        keys, values = kv
        groups = query.shape[0] // keys.shape[2]
        attend_tiles[(self.table.num_tiles, keys.shape[2])](
            self.numbers, query, keys, values, out, *_numbers(rule, query),
            **_constants(kv, groups, rule), ROW_TILE=_padded(self.tile_tokens * groups),
            num_warps=4, num_stages=_tile_stages(keys),
            **launch_options(is_on=is_chained(out.device)),
        )  # fmt: skip


class TritonAttention:
    """Makes each step's work list; the integers and the sums stay at one address while they fit.

    `positions_per_tile` is chosen for the layer with the most query heads per KV head.
    """

    def __init__(
        self,
        shapes: Sequence[KvShape],
        block_size: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        groups = max((shape.num_groups for shape in shapes), default=1)
        self.positions_per_tile = max(1, MAX_TILE_ROWS // groups)
        self._cut = Cut(MIN_PIECE, self.positions_per_tile, block_size)
        self._shapes = shapes
        self._device = device
        self._staged = StagedInts(capacity, device)
        self._partials = Partials.of(0, shapes, device)
        self._num_partials = 0

    def reserve(self, max_rows: int) -> None:
        """Make room for the sums of so many rows of any length: then they never move."""
        self._grow(max_rows * MAX_PIECES)

    def fill(self, rows: Sequence[KvRow]) -> TritonTiles:
        """Lay out and upload one step; a step larger than any before moves to a new address."""
        table = self._upload(rows)
        return self._tiles(table, table.num_pieces, table.num_joined)

    def fill_for_capture(self, rows: Sequence[KvRow]) -> TritonTiles:
        """Do the same, with programs for any later step of as many rows of one token."""
        count = min(max(PROGRAMS_PER_ROW * len(rows), MIN_PROGRAMS), MAX_PROGRAMS)
        return self._tiles(self._upload(rows), count, len(rows))

    def _upload(self, rows: Sequence[KvRow]) -> TileTable:
        table = tile_table(rows, self._cut)
        if len(table.numbers) > self._staged.capacity:
            self._staged = StagedInts(2 * len(table.numbers), self._device)
        self._grow(table.num_partials)
        self._staged.upload(table.numbers)
        return table

    def _grow(self, num_partials: int) -> None:
        if num_partials > self._num_partials:
            self._num_partials = num_partials
            self._partials = Partials.of(num_partials, self._shapes, self._device)

    def _tiles(self, table: TileTable, num_programs: int, num_joined: int) -> TritonTiles:
        return TritonTiles(
            self._staged.values,
            self._partials,
            table,
            num_programs,
            num_joined,
            self.positions_per_tile,
        )


def _numbers(rule: Rule, query: Tensor) -> tuple[float, float, int, int, int]:
    return (
        rule.scaling,
        rule.softcap or 1.0,
        rule.window or 0,
        query.stride(0),
        query.stride(1),
    )


def _constants(kv: tuple[Tensor, Tensor], groups: int, rule: Rule) -> dict[str, int | bool]:
    keys, values = kv
    return {
        "BLOCK_SIZE": keys.shape[1],
        "NUM_KV": keys.shape[2],
        "GROUPS": groups,
        "KEY_DIM": keys.shape[3],
        "VALUE_DIM": values.shape[3],
        "KEY_TILE": _padded(keys.shape[3]),
        "VALUE_TILE": _padded(values.shape[3]),
        "POSITION_TILE": _position_tile(keys),
        "HAS_CAP": rule.softcap is not None,
        "HAS_WINDOW": rule.window is not None,
    }


def _padded(size: int) -> int:
    padded: int = max(MIN_TILE, triton.next_power_of_2(size))
    return padded


def _tile_stages(keys: Tensor) -> int:
    return 2 if keys.shape[3] * keys.element_size() <= 512 else 1


def _position_tile(keys: Tensor) -> int:
    """How many positions at a time: K and V of the stages must fit into shared memory."""
    bytes_per_head = keys.shape[3] * keys.element_size()
    return 64 if bytes_per_head <= 256 else 32 if bytes_per_head <= 512 else 16
