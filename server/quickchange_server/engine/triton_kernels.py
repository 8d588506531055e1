"""What computes a step on a GPU in place of the plain paths. Import it only where Triton is."""

from collections.abc import Sequence

from quickchange_adapters.ops.linear_weight import PlainWeight
from quickchange_adapters.ops.triton_deltas import TritonDeltas
from quickchange_adapters.ops.triton_product import SkinnyWeight
from quickchange_adapters.pool import AdapterPool

from quickchange_server.engine.attention import KvShape, KvStorage
from quickchange_server.engine.attention_tiles import HEADER_INTS, max_row_ints
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.cuda_graphs import (
    Capture,
    DecodeGraphs,
    DecodeInputs,
    DeviceCapture,
    Forward,
    compute_again,
)
from quickchange_server.engine.triton_attention import TritonAttention


def use_skinny_products(base: BaseModel) -> None:
    """Give the base's plain matrices, in place, a product of their own for few rows."""
    for group in base.groups.values():
        if isinstance(group.weight, PlainWeight):
            group.weight = SkinnyWeight(group.weight.dense())
    if base.head is not None and isinstance(base.head.resident, PlainWeight):
        base.head.resident = SkinnyWeight(base.head.resident.dense())


class TritonKernels:
    """Attention and deltas of any step, and captured decode steps.

    `max_rows`, `max_tokens`: of a step; `max_model_len`: most tokens of a request.
    On a CPU, where Triton's interpreter runs the kernels, captured steps are computed again.
    """

    def __init__(
        self,
        pool: AdapterPool,
        storage: KvStorage,
        shapes: Sequence[KvShape],
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
    ) -> None:
        self.deltas = TritonDeltas(pool, max_rows, max_tokens)
        self._pool, self._storage, self._shapes = pool, storage, shapes
        self._max_rows, self._max_model_len = max_rows, max_model_len
        self.attention = self._attention(max_rows * max_row_ints(0))

    def decode_graphs(self, forward: Forward) -> DecodeGraphs:
        """Make the captured steps of a model; nothing that they read ever moves."""
        block_size, device = self._storage.block_size, self._pool.device
        num_blocks = min(-(-self._max_model_len // block_size), self._storage.num_blocks)
        attention = self._attention(HEADER_INTS + self._max_rows * max_row_ints(num_blocks))
        attention.reserve(self._max_rows)
        inputs = DecodeInputs(attention, self._max_rows, block_size, device)
        capture: Capture = DeviceCapture() if device.type == "cuda" else compute_again
        return DecodeGraphs(forward, inputs, self.deltas, self._max_rows, capture)

    def _attention(self, capacity: int) -> TritonAttention:
        parts = self._shapes, self._storage.block_size, capacity, self._pool.device
        return TritonAttention(*parts)
