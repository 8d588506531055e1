"""Copies into device memory on a stream of their own. On a CPU a copy is done when it returns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CopyStream:
    """Orders copies with the computing stream by events; the host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Queue copies beside the computation; what is computed later finds them done.

        They start when what was queued before has ended: it may still read the rows they replace.
        """
        if self._stream is None:
            yield
            return
        computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(computing)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            computing.wait_stream(self._stream)
