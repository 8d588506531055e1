"""Copies into device memory on a stream of their own. On a CPU a copy is done when it returns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CopyStream:
    """Orders copies with the computing stream by events. The computing thread waits for neither."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]

    def fence(self) -> torch.cuda.Event | None:
        """Return the end of what is queued now, on the computing thread; None on a CPU.

        What is queued before it may still read the rows that a copy behind it replaces.
        """
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._stream.device))  # type: ignore[no-untyped-call]
        return event

    @contextmanager
    def copying(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """Copy on any thread, behind a fence; when the block is left the copies are done."""
        if self._stream is None:
            yield
            return
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def share(self, *tensors: Tensor) -> None:
        """Say on the computing thread that it reads tensors which were made while copying."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._stream.device))
