"""The base's products for few rows, for GPUs: they are as fast as the matrix can be read.

    y[rows, columns] = x[rows] @ W[columns].T + bias

One program owns some columns and reads their rows of W once, several pieces ahead; sums are
float32. Import it only where Triton is.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_adapters.ops.linear_weight import PlainWeight
from quickchange_adapters.ops.triton_chain import (
    is_chained,
    launch_options,
    let_next_start,
    wait_for_inputs,
)

MAX_ROWS = 16
"""What one tile holds; with more rows, x is read more often than W, and others are faster."""
MANY_ROUNDS = 4
LEAST_SHARED_BYTES = 64 << 10
"""What every GPU has that Triton compiles for."""
Constants = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: columns of a program, columns of W at a time, pieces ahead.

    `deep_stages`: pieces ahead where one program has a multiprocessor's memory to itself.
    """

    columns: int = 32
    inner: int = 256
    num_stages: int = 5
    deep_stages: int = 6
    num_warps: int = 4

    def num_programs(self, num_columns: int) -> int:
        """Return how many programs a product of so many columns takes."""
        return -(-num_columns // self.columns)

    def constants(self, num_columns: int, like: Tensor, *, is_alone: bool) -> Constants:
        """Return what the kernel is launched with. Sums are the same with any number of stages.

        On an H100 one program a multiprocessor was faster, unless other kernels run beside it, or
        a second round of programs would leave most multiprocessors idle.
        """
        num_processors, shared_bytes = _sizes(like.device)
        rounds = self.num_programs(num_columns) / num_processors
        inner = self.inner * 2 // max(2, like.element_size())
        stage_bytes = (self.columns + MAX_ROWS) * inner * like.element_size()
        is_deep = is_alone and not 1 < rounds < MANY_ROUNDS
        wanted = self.deep_stages if is_deep else self.num_stages
        return {
            "ROW_TILE": MAX_ROWS,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_INNER": inner,
            "num_warps": self.num_warps,
            "num_stages": min(wanted, 1 + shared_bytes // stage_bytes),
            **launch_options(is_on=is_chained(like.device)),
        }


TILING = Tiling()


@lru_cache
def _sizes(device: torch.device) -> tuple[int, int]:
    """Return how many multiprocessors there are, and the most shared memory of a program."""
    if device.type != "cuda":
        return 1, LEAST_SHARED_BYTES
    found = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(found, "shared_memory_per_block_optin", LEAST_SHARED_BYTES)
    return int(found.multi_processor_count), int(shared_bytes)


class SkinnyWeight(PlainWeight):
    """W as an ordinary tensor, with a product of its own for few rows.

    `max_rows`: for so many rows it is used; 0: never.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.contiguous())
        self.max_rows = MAX_ROWS

    def takes(self, x: Tensor) -> bool:
        """Whether x [rows, in] has so few rows."""
        return x.shape[0] <= self.max_rows and x.stride(1) == 1

    def apply(self, x: Tensor, bias: Tensor | None, *, is_alone: bool = True) -> Tensor:
        """Return x @ W.T + bias. `is_alone`: no other kernel is to run at the same time."""
        if not self.takes(x):
            return super().apply(x, bias)
        return product(x, self._weight, bias, is_alone=is_alone)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, is_alone: bool = True) -> Tensor:
    """Return x @ W.T + bias for x [rows, in] of at most `MAX_ROWS` rows and W [out, in]."""
    num_rows, width = x.shape
    num_columns = weight.shape[0]
    assert num_rows <= MAX_ROWS
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    _product[(TILING.num_programs(num_columns),)](
        x, weight, weight if bias is None else bias, out, num_rows, x.stride(0),
        WIDTH=width, NUM_COLUMNS=num_columns, HAS_BIAS=bias is not None,
        **TILING.constants(num_columns, x, is_alone=is_alone),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _product(
    x: tl.tensor,  # [rows, WIDTH]
    weight: tl.tensor,  # [NUM_COLUMNS, WIDTH]
    bias: tl.tensor,  # [NUM_COLUMNS]
    out: tl.tensor,  # [rows, NUM_COLUMNS]
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (blocks of columns)."""
    let_next_start(IS_CHAINED)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < NUM_COLUMNS
    rows = tl.arange(0, ROW_TILE)
    is_row = rows < num_rows
    inner = tl.arange(0, BLOCK_INNER)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    w_rows = weight + columns.to(tl.int64)[None, :] * WIDTH
    total = tl.zeros([ROW_TILE, BLOCK_COLUMNS], dtype=tl.float32)
    if HAS_BIAS:
        own_bias = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    wait_for_inputs(IS_CHAINED)
    for start in range(0, WIDTH, BLOCK_INNER):
        at = start + inner
        is_inner = at < WIDTH
        tile_x = tl.load(x_rows + at[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        tile_w = tl.load(
            w_rows + at[:, None], mask=is_column[None, :] & is_inner[:, None], other=0.0
        )
        total = tl.dot(tile_x, tile_w, total, input_precision="ieee")
    if HAS_BIAS:
        total += own_bias[None, :]
    target = out + rows[:, None] * NUM_COLUMNS + columns[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
