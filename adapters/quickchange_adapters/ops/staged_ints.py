"""Integers at a fixed address on a device, replaced from the host with one transfer.

What a kernel looks up by address (tables of row blocks, of KV blocks) changes every step, while a
captured step goes on reading where it read when it was captured.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


class StagedInts:
    """A device tensor of integers and its pinned copy on the host; on a CPU one tensor is both."""

    def __init__(
        self, capacity: int, device: torch.device, dtype: torch.dtype = torch.int32
    ) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(capacity, dtype=dtype, pin_memory=is_cuda)
        self._numbers = self._host.numpy()  # filled from an array: far faster than from a list
        self._code = "q" if dtype == torch.long else "i"
        self.values: Tensor = torch.zeros_like(self._host, device=device) if is_cuda else self._host
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    @property
    def capacity(self) -> int:
        """Most integers at a time."""
        return self._host.shape[0]

    def upload(self, numbers: Sequence[int]) -> None:
        """Replace the first integers; kernels queued later read these, those before the old."""
        count = len(numbers)
        assert count <= self.capacity, f"{count} integers where {self.capacity} fit"
        if self._copied is not None:
            self._copied.synchronize()  # the last transfer may not have read the host's copy yet
        self._numbers[:count] = array(self._code, numbers)
        if self._copied is not None:
            self.values[:count].copy_(self._host[:count], non_blocking=True)
            self._copied.record()
