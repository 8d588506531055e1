"""Captured decode steps whose tokens are chosen on the device and not waited for.

So the next step can be launched before the host knows them: they are copied on the device into its
input. Everything is queued in one stream, in this order, which is why a single set of inputs,
tables and logits serves a step that runs and the one behind it:

    inputs of n, step n, its tokens chosen, their way to the host | inputs of n + 1, step n + 1, …

On the host, what is uploaded for n + 1 replaces what was uploaded for n, whose transfer was over
when step n began; the tokens of n and n + 1 have places of their own (`token_fetch.py`).

Only for rows that are `is_plain`: what else a request may ask of its logits, the host does.
"""

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from quickchange_adapters.plan import RowBlock
from torch import Tensor

from quickchange_server.engine.batch_sampler import Draw, choose_together, index_on
from quickchange_server.engine.cuda_graphs import Decoded, DecodeGraphs, DecodeStep
from quickchange_server.engine.logits import needs_adjusting
from quickchange_server.engine.packing import Packing, decode_rows, row_blocks
from quickchange_server.engine.sampler import Sample, draw_of
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.token_fetch import Fetch, TokenFetcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """A decode step that was launched.

    `chosen` [rows]: its tokens on the device until another step is queued, always valid ids; a row
    whose logits are not finite has any, and its sample has none.
    """

    rows: SequenceOf[ScheduledRow]
    blocks: SequenceOf[RowBlock]
    chosen: Tensor
    fetch: Fetch

    def samples(self) -> list[Sample | None]:
        """Wait for the step, and return its rows' results."""
        return [Sample(token if token >= 0 else None) for token in self.fetch.wait()]


class DecodeLauncher:
    """Launches captured steps, each of them perhaps behind one that still runs."""

    def __init__(self, graphs: DecodeGraphs, max_rows: int, device: torch.device) -> None:
        self._graphs = graphs
        self._device = device
        self._fetcher = TokenFetcher(max_rows, device)

    def choose(self, packed: Packing, decoded: Decoded) -> DecodeLaunch | None:
        """Choose the tokens of a replayed step; None: that is not to be done on the device."""
        rows = packed.rows
        if not all(row.needs_logits and is_plain(row.sequence) for row in rows):
            return None
        return self._tried(rows, packed.row_blocks, decoded)

    def launch_after(
        self, launch: DecodeLaunch, rows: SequenceOf[ScheduledRow]
    ) -> DecodeLaunch | None:
        """Launch the step after another one: `rows` are some of that one's, a token further.

        None: no captured step takes them, or their tokens cannot be chosen on the device; the step
        may be computed once more then.
        """
        before = {row.sequence: index for index, row in enumerate(launch.rows)}
        places = [before[row.sequence] for row in rows]
        chosen, blocks = launch.chosen, launch.blocks
        if places != list(range(len(before))):
            chosen = chosen[index_on(places, self._device)]
            blocks = row_blocks(rows, range(len(rows)))
        decoded = self._graphs.run(DecodeStep(chosen, decode_rows(rows), blocks))
        return None if decoded is None else self._tried(rows, blocks, decoded)

    def _tried(
        self, rows: SequenceOf[ScheduledRow], blocks: SequenceOf[RowBlock], decoded: Decoded
    ) -> DecodeLaunch | None:
        try:
            return self._choose(rows, blocks, decoded)
        except Exception:
            log.exception("rows cannot be drawn together; each is tried by itself")
            return None

    def _choose(
        self, rows: SequenceOf[ScheduledRow], blocks: SequenceOf[RowBlock], decoded: Decoded
    ) -> DecodeLaunch:
        draws: list[Draw | None] = [draw_of(row.sequence, row.end) for row in rows]
        chosen = choose_together(decoded.logits, decoded.highest, draws)
        checked = torch.where(decoded.is_finite, chosen, -1)
        return DecodeLaunch(rows, blocks, chosen, self._fetcher.fetch(checked))


def is_plain(sequence: Sequence) -> bool:
    """Whether a request's next tokens are the highest or drawn, without another look at logits.

    Once it is, it stays so.
    """
    request = sequence.request
    asks = request.sampling.logprobs is not None or request.prompt_logprobs is not None
    return not asks and not needs_adjusting(sequence)
