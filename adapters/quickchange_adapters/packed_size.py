"""How much memory a version takes once it is packed: from its tensors, or from headers alone.

Part of what packs adapters on machines that have nothing to check them with: see TYPE_CHECKING.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quickchange_adapters.layout import AdapterLayout, round_up_rows

if TYPE_CHECKING:
    from quickchange_adapters.structure import Structure


@dataclass(frozen=True, slots=True)
class PackedSize:
    """Rank rows by kind of group, bytes of all tensors, and bytes outside the arenas."""

    rows: Mapping[str, int]
    num_bytes: int
    num_vocabulary_bytes: int = 0


def packed_size(structure: "Structure", layout: AdapterLayout, item_bytes: int) -> PackedSize:
    """Return what `pack_adapter` will make of files that fit the base; no numbers are read."""
    ranks: dict[str, int] = {}
    num_vocabulary = 0
    for plan in structure.pairs:
        if plan.module in (layout.head, layout.embedding):
            num_vocabulary += math.prod(plan.lora_a.shape) + math.prod(plan.lora_b.shape)
        else:
            kind = layout.places[plan.module].kind
            ranks[kind] = max(ranks.get(kind, 0), plan.rank)
    biased = {layout.places[plan.module].kind for plan in structure.biases}
    rows = {
        kind: round_up_rows(ranks.get(kind, 0) + (kind in biased)) for kind in ranks.keys() | biased
    }
    num_elements = sum(num * layout.groups[kind].row_elements for kind, num in rows.items())
    vocabulary_bytes = num_vocabulary * item_bytes
    return PackedSize(rows, num_elements * item_bytes + vocabulary_bytes, vocabulary_bytes)
