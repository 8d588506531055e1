"""One projection group's storage in the device pool, and which of its rows are taken."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quickchange_adapters.host_adapter import HostGroup
from quickchange_adapters.layout import GroupShape
from quickchange_adapters.zero_memory import give_back, lazy_zeros


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, end) of one group's arenas; with `has_bias` the last one is a bias."""

    start: int
    end: int
    has_bias: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.end - self.start

    def moved_to(self, start: int) -> "RowRange":
        """Return as many rows elsewhere."""
        return replace(self, start=start, end=start + self.num_rows)


@dataclass(slots=True)
class Arena:
    """One group's storage: lora_a [layers, rows, parts, in], lora_b [layers, rows, out]."""

    shape: GroupShape
    lora_a: Tensor
    lora_b: Tensor
    used: list[RowRange] = field(default_factory=list)

    @classmethod
    def of(
        cls, shape: GroupShape, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> "Arena":
        """Make an empty one, of zeros."""
        a_shape = (shape.num_layers, num_rows, shape.num_parts, shape.in_features)
        b_shape = (shape.num_layers, num_rows, shape.out_features)
        return cls(shape, lazy_zeros(a_shape, dtype, device), lazy_zeros(b_shape, dtype, device))

    @property
    def num_rows(self) -> int:
        """Capacity in rank rows."""
        return self.lora_a.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one rank row over all layers."""
        return self.shape.row_elements * self.lora_a.dtype.itemsize

    @property
    def num_active_rows(self) -> int:
        """End of the last taken range: the window that a dense step computes."""
        return self.used[-1].end if self.used else 0

    def find_free(self, num_rows: int) -> RowRange | None:
        """Return the lowest hole of so many rows, or None."""
        start = 0
        for taken in self.used:
            if taken.start - start >= num_rows:
                break
            start = taken.end
        if start + num_rows > self.num_rows:
            return None
        return RowRange(start, start + num_rows)

    def take(self, rows: RowRange) -> None:
        """Mark rows as taken."""
        self.used.append(rows)
        self.used.sort(key=lambda taken: taken.start)

    def give(self, rows: RowRange) -> None:
        """Mark rows as free. They keep their values, which are finite."""
        self.used.remove(rows)

    def fill(self, rows: RowRange, group: HostGroup) -> None:
        """Copy a group's numbers into its rows. Runs on any thread; nobody else may name them."""
        self.lora_a[:, rows.start : rows.end].copy_(group.lora_a, non_blocking=True)
        self.lora_b[:, rows.start : rows.end].copy_(group.lora_b, non_blocking=True)

    def copy_rows(self, source: RowRange, start: int) -> None:
        """Copy rows to where they begin at `start`; both may overlap."""
        end = start + source.num_rows
        for tensor in (self.lora_a, self.lora_b):
            moved = tensor[:, source.start : source.end]
            if end > source.start:
                moved = moved.clone()
            tensor[:, start:end].copy_(moved)

    def give_memory_back(self, rows: RowRange) -> None:
        """Let the system have the memory of rows that nobody names; what is read there is zero."""
        for tensor in (self.lora_a, self.lora_b):
            for layer in tensor:
                give_back(layer[rows.start : rows.end])

    def holes_from_the_end(self, movable: Iterable[RowRange]) -> Iterator[tuple[RowRange, int]]:
        """Yield (taken rows, start of a hole below that holds them), the last rows first."""
        for rows in sorted(movable, key=lambda rows: rows.start, reverse=True):
            hole = self.find_free(rows.num_rows)
            if hole is not None and hole.start < rows.start:
                yield rows, hole.start

    def gaps_from_the_front(self, movable: Iterable[RowRange]) -> Iterator[tuple[RowRange, int]]:
        """Yield (taken rows, end of the rows before them), where there is a gap between."""
        can_move, end = set(movable), 0
        for rows in list(self.used):
            if rows in can_move and rows.start > end:
                yield rows, end
                end += rows.num_rows
            else:
                end = rows.end
