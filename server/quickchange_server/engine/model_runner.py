"""Turn scheduled rows into tensors, run the model once, and sample. Owns all KV tensors.

Knows the packed form of a step. Does not know queues, callers or adapters beyond their slots.
"""

import logging
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from quickchange_adapters.merge import MergedCopy
from quickchange_adapters.ops.deltas import add_embedding, add_head
from quickchange_adapters.plan import StepPlan, StepTables, build_plan, join_blocks
from quickchange_adapters.pool import AdapterPool
from torch import Tensor

from quickchange_server.engine.attention import (
    AttentionStep,
    DecodeBucket,
    KvShape,
    KvStorage,
    PrefillChunk,
    Rule,
    ShapeProbe,
    block_bytes,
)
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.cuda_graphs import DecodeBatch, Decoded, DecodeGraphs
from quickchange_server.engine.decode_launch import DecodeLaunch, DecodeLauncher
from quickchange_server.engine.native_step import NativeStep
from quickchange_server.engine.packing import Packing
from quickchange_server.engine.request import TokenLogprobs
from quickchange_server.engine.sampler import (
    FindHighest,
    Sample,
    highest_of_rows,
    rows_logprobs,
    sample,
)
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.settings import EngineSettings

if TYPE_CHECKING:
    from quickchange_server.engine.fused_layers import FusedLayers
    from quickchange_server.engine.triton_kernels import TritonKernels

log = logging.getLogger(__name__)
MAX_LENGTH_SPREAD = 2.0
WARM_UP_TOKENS = 32


class ModelRunner:
    """The base, its KV storage and the pool, run one packed step at a time.

    Of the settings, only which kernels run and the most rows of a step matter here.
    """

    def __init__(
        self,
        base: BaseModel,
        pool: AdapterPool,
        kv_cache_bytes: int,
        block_size: int,
        settings: EngineSettings | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        self.base = base
        self.pool = pool
        base.holder.arenas = pool.arenas
        self.kv_shapes, self._rules = self._probe_layers()
        num_blocks = kv_cache_bytes // block_bytes(self.kv_shapes, block_size, base.dtype.itemsize)
        like = torch.empty(0, dtype=base.dtype, device=base.device)
        self.storage = KvStorage(self.kv_shapes, int(num_blocks), block_size, like)
        self._kernels = self._make_kernels(settings)
        self._fused = self._make_fused_layers(settings)
        self.is_exact = (
            self._kernels is None and base.device.type == "cpu" and base.dtype == torch.float32
        )
        self.native: NativeStep | None = None
        self._find_highest: FindHighest = highest_of_rows
        self.graphs: DecodeGraphs | None = None
        self.launcher: DecodeLauncher | None = None
        if self._kernels is not None and settings.cuda_graphs:
            self.graphs = self._kernels.decode_graphs(self.decode)
            if settings.steps_ahead:
                parts = self.graphs, settings.max_batch_rows, base.device
                self.launcher = DecodeLauncher(*parts)

    def start_native(self, max_model_len: int) -> None:
        """Hand the base to the native library, if it computes this base's steps.

        Call it when nothing of the base, the pool and the storage changes its place any more.
        """
        if self.base.native is not None and self._kernels is None:
            parts = self.base, self.pool, self.storage
            self.native = NativeStep(*parts, self._rules, max_model_len)
            self._find_highest = self.native.highest

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels and capture all decode steps, where there are any to capture.

        It works in the scratch block. Without it, the first requests of each kind and size would
        wait for seconds, and whoever streams with them.
        """
        if self._kernels is None:
            return
        device = self.base.device
        is_cuda = device.type == "cuda"
        with torch.cuda.device(device) if is_cuda else nullcontext():
            rows = [KvRow(0, 0, WARM_UP_TOKENS, [0] * WARM_UP_TOKENS)]
            zeros = torch.zeros(WARM_UP_TOKENS, dtype=torch.long, device=device)
            step = AttentionStep(self.storage, zeros, tiles=self._kernels.attention.fill(rows))
            self._run_blocks(self.base.embed(zeros), zeros, step, zeros[:1])
            self._kernels.deltas.warm_up()
            if self.graphs is not None:
                self.graphs.capture_all()

    @torch.inference_mode()
    def run(
        self, rows: SequenceOf[ScheduledRow], merged: MergedCopy | None
    ) -> DecodeLaunch | list[Sample | None]:
        """Compute all rows in one packed step; one entry per row, None where no token was due.

        `merged`: the copy that every row of this step uses. `rows` hold single-token rows first.
        A launch: the step runs, and has its entries later.
        """
        packed = Packing(rows)
        decoded = self._replay(packed) if merged is None else None
        if decoded is None:
            return self._sample(packed, self._compute(packed, merged))
        launch = None if self.launcher is None else self.launcher.choose(packed, decoded)
        if launch is not None:
            return launch
        wanted = packed.logit_rows()
        is_all = len(wanted) == len(packed.rows)
        return self._sample(packed, decoded.logits if is_all else decoded.logits[wanted])

    @torch.inference_mode()
    def run_after(
        self, launch: DecodeLaunch, rows: SequenceOf[ScheduledRow]
    ) -> DecodeLaunch | None:
        """Launch the step after one that still runs: some of its rows, a token further.

        None: it must be run when the tokens are known.
        """
        return None if self.launcher is None else self.launcher.launch_after(launch, rows)

    def prepare_blocks(self, blocks: SequenceOf[int]) -> None:
        """Make new owners' blocks safe to read behind the last token, where a path does that."""
        if self._kernels is None and self.native is None and not self.is_exact:
            self.clear_blocks(blocks)

    def clear_blocks(self, blocks: SequenceOf[int]) -> None:
        """Zero the KV of blocks whose content may be damaged."""
        if blocks:
            self.storage.clear(blocks)

    def _compute(self, packed: Packing, merged: MergedCopy | None) -> Tensor:
        if self.native is not None:
            return self._compute_natively(self.native, packed, merged)
        self.base.holder.plan = self._plan(packed, merged)
        try:
            return self._forward(packed, packed.logit_rows())
        finally:
            self.base.holder.plan = StepPlan(0)

    def _compute_natively(
        self, native: NativeStep, packed: Packing, merged: MergedCopy | None
    ) -> Tensor:
        """Return float32 logits; the vocabulary's two ends of adapters are added here."""
        step = packed.native_input(self.base)
        if merged is None:
            step.blocks = join_blocks(packed.row_blocks)
        logits, hidden = native.run(step, merged)
        if merged is None:
            for block in packed.head_blocks():
                add_head(logits, hidden, block, is_exact=True)
        return logits

    def _replay(self, packed: Packing) -> Decoded | None:
        """Return a decode step's results from a captured one; None where there is none."""
        step = None if self.graphs is None else packed.decode_step()
        return None if self.graphs is None or step is None else self.graphs.run(step)

    def decode(self, batch: DecodeBatch, deltas: StepTables | None) -> Tensor:
        """Compute float32 logits of one token a row. Runs while a step is being captured."""
        self.base.holder.plan = StepPlan(batch.token_ids.shape[0], tables=deltas)
        step = AttentionStep(self.storage, batch.slots, tiles=batch.tiles)
        try:
            embeds = self.base.embed(batch.token_ids)
            return self._run_blocks(embeds, batch.positions, step, None).float()
        finally:
            self.base.holder.plan = StepPlan(0)

    def _plan(self, packed: Packing, merged: MergedCopy | None) -> StepPlan:
        if merged is not None:
            return StepPlan(packed.num_tokens, merged=merged)
        plan = build_plan(
            packed.row_blocks,
            packed.num_tokens,
            self.pool,
            is_exact=self.is_exact,
            tables=None if self._kernels is None else self._kernels.deltas,
        )
        return replace(plan, head_blocks=packed.head_blocks())

    def _forward(self, packed: Packing, hidden_rows: list[int]) -> Tensor:
        """Return float32 logits of the wanted packed rows [wanted, vocabulary]."""
        device = self.base.device
        step = self._attention_step(packed)
        token_ids = torch.tensor(packed.token_ids, device=device)
        embeds = self.base.embed(token_ids)
        for block in packed.row_blocks:
            add_embedding(embeds, token_ids, block, is_exact=self.is_exact)
        positions = torch.tensor(packed.positions, device=device)
        wanted = torch.tensor(hidden_rows or [0], device=device)
        return self._run_blocks(embeds, positions, step, wanted)[: len(hidden_rows)].float()

    def _run_blocks(
        self, embeds: Tensor, positions: Tensor, step: AttentionStep, wanted: Tensor | None
    ) -> Tensor:
        """Return logits of the wanted rows, None: of all; embeds [tokens, width]: overwritten."""
        if self._fused is not None:
            assert self.base.head is not None
            hidden = self._fused.run(embeds, positions, step)
            fused: Tensor = self.base.head(hidden if wanted is None else hidden[wanted])
            return fused
        output = self.base.model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=None,
            use_cache=False,
            logits_to_keep=0 if wanted is None else wanted,
            step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _attention_step(self, packed: Packing) -> AttentionStep:
        size, device = self.storage.block_size, self.base.device
        slots = torch.tensor(packed.kv_slots(size), device=device)
        step = AttentionStep(self.storage, slots)
        if self._kernels is not None:
            step.tiles = self._kernels.attention.fill(packed.kv_rows())
            return step
        for rows in _length_buckets(packed.decode_rows(), is_exact=self.is_exact):
            step.buckets.append(self._bucket(rows))
        for start, row in packed.chunk_rows():
            blocks = row.sequence.blocks[: -(-row.end // size)]
            table = torch.tensor(blocks, device=device)
            step.chunks.append(PrefillChunk(start, start + row.num_tokens, table, row.end))
        return step

    def _bucket(self, rows: list[tuple[int, ScheduledRow]]) -> DecodeBucket:
        device = self.base.device
        longest = max(row.end for _, row in rows)
        width = -(-longest // self.storage.block_size)
        # behind its end a row reads, masked, its own last block: never another's, nor scratch
        tables = [_padded(row.sequence.blocks, width) for _, row in rows]
        return DecodeBucket(
            torch.tensor([index for index, _ in rows], device=device),
            torch.tensor(tables, device=device),
            torch.tensor([row.end for _, row in rows], device=device),
            longest,
        )

    def _sample(self, packed: Packing, logits: Tensor) -> list[Sample | None]:
        results: list[Sample | None] = [None] * len(packed.rows)
        due, offset, picked = [], 0, []
        for index, row in enumerate(packed.rows):
            count = packed.num_logits(row)
            if row.sequence.request.prompt_logprobs is not None:
                self._note_prompt_logprobs(row, logits[offset : offset + count])
            if row.needs_logits:
                due.append(index)
                picked.append(offset + count - 1)
            offset += count
        if due:
            wanted = logits[picked] if len(picked) != logits.shape[0] else logits
            sequences = [packed.rows[index].sequence for index in due]
            samples = sample(wanted, sequences, self._find_highest)
            for index, result in zip(due, samples, strict=True):
                results[index] = result
        return results

    def _note_prompt_logprobs(self, row: ScheduledRow, logits: Tensor) -> None:
        """Append log probabilities of the prompt tokens that this chunk's rows predict."""
        sequence = row.sequence
        num_top = sequence.request.prompt_logprobs
        noted: list[TokenLogprobs | None] = sequence.prompt_logprobs
        if not noted:
            noted.append(None)
        targets = range(len(noted), min(row.end + 1, sequence.num_prompt))
        if targets:
            wanted = [sequence.token_ids[target] for target in targets]
            scores = logits[targets[0] - 1 - row.start : targets[-1] - row.start]
            noted.extend(rows_logprobs(scores, wanted, num_top or 0))

    def _make_kernels(self, settings: EngineSettings) -> "TritonKernels | None":
        is_cuda = self.base.device.type == "cuda"
        if settings.kernels in ("plain", "native") or (settings.kernels == "auto" and not is_cuda):
            return None
        from quickchange_server.engine.triton_kernels import TritonKernels, use_skinny_products

        if settings.skinny_products:
            use_skinny_products(self.base)
        sizes = settings.max_batch_rows, settings.max_step_tokens, self.base.max_model_len
        return TritonKernels(self.pool, self.storage, self.kv_shapes, *sizes)

    def _make_fused_layers(self, settings: EngineSettings) -> "FusedLayers | None":
        if self._kernels is None or not settings.fused_layers:
            return None
        from quickchange_server.engine.fused_layers import FusedLayers, fused_refusal

        reason = fused_refusal(self.base)
        if reason is not None:
            log.info("blocks are run as transformers has them: %s", reason)
            return None
        return FusedLayers(self.base, self.storage, self._rules)

    @torch.inference_mode()
    def _probe_layers(self) -> tuple[list[KvShape], list[Rule]]:
        """Learn every layer's KV shape and attention rule from one forward of two tokens."""
        probe = ShapeProbe()
        device = self.base.device
        embeds = self.base.embed(torch.zeros(2, dtype=torch.long, device=device))
        self.base.model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=torch.arange(2, device=device).unsqueeze(0),
            past_key_values=None,
            use_cache=False,
            logits_to_keep=1,
            step=probe,
        )
        layers = sorted(probe.shapes)
        return [probe.shapes[i] for i in layers], [probe.rules[i] for i in layers]


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks[:width] + blocks[-1:] * (width - len(blocks))


def _length_buckets(
    rows: list[tuple[int, ScheduledRow]], *, is_exact: bool
) -> list[list[tuple[int, ScheduledRow]]]:
    """Group decode rows so that padding stays below the spread; alone each in exact mode."""
    if is_exact:
        return [[row] for row in rows]
    buckets: list[list[tuple[int, ScheduledRow]]] = []
    for row in sorted(rows, key=lambda entry: entry[1].end):
        if buckets and row[1].end <= MAX_LENGTH_SPREAD * buckets[-1][0][1].end:
            buckets[-1].append(row)
        else:
            buckets.append([row])
    return buckets
