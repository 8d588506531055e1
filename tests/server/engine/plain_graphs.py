"""Captured decode steps without kernels: plain products over tables that stay at one address.

What a GPU has, as far as the engine sees it, at the speed of a CPU. Each replay reads anew what was
filled last, as a captured step does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from quickchange_adapters.arena import Arena
from quickchange_adapters.ops.deltas import add_block
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.plan import Projection, RowBlock
from quickchange_server.engine.attention import DecodeBucket, KvStorage, Rule, _decode
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.cuda_graphs import DecodeGraphs, DecodeInputs, compute_again
from quickchange_server.engine.decode_launch import DecodeLauncher
from quickchange_server.engine.model_runner import ModelRunner
from torch import Tensor


@dataclass
class PlainTiles:
    """One row after another."""

    rows: Sequence[KvRow] = ()

    def fill_for_capture(self, rows: Sequence[KvRow]) -> "PlainTiles":
        self.rows = [KvRow(row.start, row.position, 1, list(row.blocks)) for row in rows]
        return self

    def attend(
        self, storage: KvStorage, layer: int, query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        for row in self.rows:
            length = row.position + 1
            index, blocks = torch.tensor([row.start]), torch.tensor([row.blocks])
            bucket = DecodeBucket(index, blocks, torch.tensor([length]), length)
            out[index] = _decode(storage, layer, query, bucket, rule)


@dataclass
class PlainTables:
    """One row block after another."""

    blocks: Sequence[RowBlock] = ()
    _x: Tensor | None = None

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        self.blocks = list(blocks)
        return len(blocks)

    def launch_for(self, max_blocks: int) -> None:
        pass

    def start(self, x: Tensor, arena: Arena, layer: int) -> None:
        self._x = x

    def add(self, y: Tensor, arena: Arena, layer: int) -> None:
        assert self._x is not None
        for block in self.blocks:
            add_block(y, self._x, arena, layer, block)

    def project(
        self, weight: LinearWeight, x: Tensor, bias: Tensor | None, arena: Arena, layer: int
    ) -> Projection:
        y = weight.apply(x, bias)
        self.start(x, arena, layer)
        self.add(y, arena, layer)
        return Projection(y)


def use_plain_graphs(runner: ModelRunner, max_rows: int, *, is_ahead: bool) -> None:
    """Let a runner replay its decode steps, and choose their tokens as a GPU does."""
    device, block_size = runner.base.device, runner.storage.block_size
    inputs = DecodeInputs(PlainTiles(), max_rows, block_size, device)
    runner.graphs = DecodeGraphs(runner.decode, inputs, PlainTables(), max_rows, compute_again)
    if is_ahead:
        runner.launcher = DecodeLauncher(runner.graphs, max_rows, device)
