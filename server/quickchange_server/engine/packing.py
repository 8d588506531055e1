"""A step's rows laid out one after another, as the paths that compute it take them. No kernels."""

from collections.abc import Sequence as SequenceOf
from functools import cached_property

import torch
from quickchange_adapters.ops.deltas import add_embedding
from quickchange_adapters.plan import RowBlock, Term

from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.cuda_graphs import DecodeStep
from quickchange_server.engine.native_step import StepInput
from quickchange_server.engine.scheduler import ScheduledRow


class Packing:
    """Rows laid out one after another in a single packed row of tokens.

    A step of one token is padded to two: products of one row take another path in some kernels.
    """

    def __init__(self, rows: SequenceOf[ScheduledRow]) -> None:
        self.rows = rows
        self.starts: list[int] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        for row in rows:
            self.starts.append(len(self.token_ids))
            self.token_ids.extend(row.sequence.token_ids[row.start : row.end])
            self.positions.extend(range(row.start, row.end))
        self._num_padding = 2 - len(self.token_ids) if len(self.token_ids) < 2 else 0
        self.token_ids.extend([0] * self._num_padding)
        self.positions.extend([0] * self._num_padding)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, padding included."""
        return len(self.token_ids)

    @cached_property
    def row_blocks(self) -> list[RowBlock]:
        """A block for each row that needs adapters, in row order."""
        return row_blocks(self.rows, self.starts)

    def head_blocks(self) -> tuple[RowBlock, ...]:
        """Blocks over the wanted logits' rows, of requests whose adapters change the head."""
        blocks: list[RowBlock] = []
        start = 0
        for row in self.rows:
            end = start + self.num_logits(row)
            terms = _terms_of(row)
            if end > start and any(term.slot.head is not None for term in terms):
                blocks.append(RowBlock(start, end, terms))
            start = end
        return tuple(blocks)

    def kv_slots(self, block_size: int) -> list[int]:
        """Where each token's K and V go; padding goes to the scratch block."""
        slots: list[int] = []
        for row in self.rows:
            blocks = row.sequence.blocks
            slots.extend(
                blocks[p // block_size] * block_size + p % block_size
                for p in range(row.start, row.end)
            )
        return slots + [0] * self._num_padding

    def kv_rows(self) -> list[KvRow]:
        """Rows with where their tokens stand and where their KV lies."""
        return [
            KvRow(start, row.start, row.num_tokens, row.sequence.blocks)
            for start, row in zip(self.starts, self.rows, strict=True)
        ]

    def native_input(self, base: BaseModel) -> StepInput:
        """Return the step as the native library takes it: without padding, without deltas."""
        num_tokens = len(self.token_ids) - self._num_padding
        token_ids = torch.tensor(self.token_ids[:num_tokens])
        embeds = base.embed(token_ids)
        for block in self.row_blocks:
            add_embedding(embeds, token_ids, block, is_exact=True)
        step = StepInput(embeds, self.positions[:num_tokens])
        for row in self.rows:
            step.tables.extend([len(step.kv_blocks)] * row.num_tokens)
            step.kv_blocks.extend(row.sequence.blocks)
        step.wanted = self.logit_rows()
        return step

    def decode_step(self) -> DecodeStep | None:
        """Return the step as a captured one takes it; None if it holds anything else.

        Anything else: several tokens of a row, or adapters that change the vocabulary's two ends.
        """
        blocks = self.row_blocks
        slots = [term.slot for block in blocks for term in block.terms]
        has_ends = any(slot.head is not None or slot.embedding is not None for slot in slots)
        if has_ends or any(row.num_tokens > 1 for row in self.rows):
            return None
        return DecodeStep(self.token_ids[: len(self.rows)], self.kv_rows(), blocks)

    def decode_rows(self) -> list[tuple[int, ScheduledRow]]:
        """Single-token rows with their packed index."""
        return [(s, r) for s, r in zip(self.starts, self.rows, strict=True) if r.num_tokens == 1]

    def chunk_rows(self) -> list[tuple[int, ScheduledRow]]:
        """Longer rows with their packed start."""
        return [(s, r) for s, r in zip(self.starts, self.rows, strict=True) if r.num_tokens > 1]

    def num_logits(self, row: ScheduledRow) -> int:
        """How many of a row's tokens need logits: all for prompt logprobs, else the last."""
        if row.sequence.request.prompt_logprobs is not None and row.start < row.sequence.num_prompt:
            return row.num_tokens
        return int(row.needs_logits)

    def logit_rows(self) -> list[int]:
        """Packed indices of the tokens whose logits are wanted, in row order."""
        wanted: list[int] = []
        for start, row in zip(self.starts, self.rows, strict=True):
            end = start + row.num_tokens
            wanted.extend(range(end - self.num_logits(row), end))
        return wanted


def row_blocks(rows: SequenceOf[ScheduledRow], starts: SequenceOf[int]) -> list[RowBlock]:
    """Return a block for each row that needs adapters; `starts`: where rows lie in the step."""
    blocks: list[RowBlock] = []
    for start, row in zip(starts, rows, strict=True):
        terms = _terms_of(row)
        if terms:
            blocks.append(RowBlock(start, start + row.num_tokens, terms))
    return blocks


def decode_rows(rows: SequenceOf[ScheduledRow]) -> list[KvRow]:
    """Return where the KV of a decode step's rows lies; its tokens need not be known."""
    return [KvRow(i, row.start, 1, row.sequence.blocks) for i, row in enumerate(rows)]


def _terms_of(row: ScheduledRow) -> tuple[Term, ...]:
    pairs = zip(row.sequence.slots, row.sequence.request.adapters, strict=True)
    return tuple(Term(slot, adapter.weight) for slot, adapter in pairs)
