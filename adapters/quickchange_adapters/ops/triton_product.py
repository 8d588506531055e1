"""The base's products for few rows, for GPUs: they are as fast as the matrix can be read.

    y[rows, columns] = x[rows] @ W[columns].T + bias

One program owns some columns and reads their rows of W once, several pieces ahead; sums are
float32. Import it only where Triton is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

MAX_ROWS = 16
"""What one tile holds; with more rows, x is read more often than W, and others are faster."""
BLOCK_COLUMNS, BLOCK_INNER, NUM_STAGES, NUM_WARPS = 32, 256, 4, 4


class SkinnyWeight:
    """W as an ordinary tensor, with a product of its own for few rows; implements `LinearWeight`.

    `max_rows`: for so many rows it is used; 0: never.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.contiguous()
        self.max_rows = MAX_ROWS

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self._weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias."""
        if x.shape[0] > self.max_rows or x.stride(1) != 1:
            return functional.linear(x, self._weight, bias)
        return product(x, self._weight, bias)

    def dense(self) -> Tensor:
        """Return W itself."""
        return self._weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias for x [rows, in] of at most `MAX_ROWS` rows and W [out, in]."""
    num_rows, width = x.shape
    num_columns = weight.shape[0]
    assert num_rows <= MAX_ROWS
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    _product[(triton.cdiv(num_columns, BLOCK_COLUMNS),)](
        x, weight, weight if bias is None else bias, out, num_rows, x.stride(0),
        WIDTH=width, NUM_COLUMNS=num_columns, HAS_BIAS=bias is not None,
        ROW_TILE=MAX_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_INNER=BLOCK_INNER,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
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
) -> None:
    """Grid (blocks of columns)."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < NUM_COLUMNS
    rows = tl.arange(0, ROW_TILE)
    is_row = rows < num_rows
    inner = tl.arange(0, BLOCK_INNER)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    w_rows = weight + columns.to(tl.int64)[None, :] * WIDTH
    total = tl.zeros([ROW_TILE, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_INNER):
        at = start + inner
        is_inner = at < WIDTH
        tile_x = tl.load(x_rows + at[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        tile_w = tl.load(
            w_rows + at[:, None], mask=is_column[None, :] & is_inner[:, None], other=0.0
        )
        total = tl.dot(tile_x, tile_w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None] * NUM_COLUMNS + columns[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
