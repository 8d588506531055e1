"""Where in the device pool a base's linears live: groups, parts and layers, as plain data.

A group is a set of linears of one block that read the same input (q, k, v; gate, up) and are
computed as one. All blocks that have a group of the same kind share its arenas.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

ROW_UNIT = 8


@dataclass(frozen=True, slots=True)
class GroupShape:
    """One kind of projection group.

    Attributes:
        kind: path within the block, parts joined with `+`: `self_attn.q_proj+k_proj+v_proj`.
        in_features: width of the common input.
        part_outs: output width of each part, in order.
        num_layers: how many blocks have this group.
    """

    kind: str
    in_features: int
    part_outs: tuple[int, ...]
    num_layers: int

    @property
    def num_parts(self) -> int:
        """How many linears the group fuses."""
        return len(self.part_outs)

    @property
    def out_features(self) -> int:
        """Output width of all parts together."""
        return sum(self.part_outs)

    @property
    def part_slices(self) -> tuple[slice, ...]:
        """Columns of each part within the fused output."""
        ends = [sum(self.part_outs[: i + 1]) for i in range(self.num_parts)]
        return tuple(slice(end - out, end) for end, out in zip(ends, self.part_outs, strict=True))

    @property
    def row_elements(self) -> int:
        """Elements of one rank row over all layers, A and B together."""
        return self.num_layers * (self.num_parts * self.in_features + self.out_features)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one linear sits: its group's kind, the layer within the arenas, the part."""

    kind: str
    layer: int
    part: int


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """All groups of a base, and the place of every linear (by its module path).

    `head` and `embedding` are module paths, None where an adapter cannot target them; their
    vocabulary-sized updates live outside the arenas.
    """

    groups: Mapping[str, GroupShape] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    head: str | None = None
    embedding: str | None = None

    @property
    def row_elements(self) -> int:
        """Elements of one rank row in every group."""
        return sum(group.row_elements for group in self.groups.values())


def round_up_rows(rank: int) -> int:
    """Round a rank up to whole allocation units."""
    return -(-rank // ROW_UNIT) * ROW_UNIT
