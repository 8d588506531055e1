"""Large tensors of zeros that take memory only where something was written."""

import contextlib
import ctypes
import math
import mmap

import numpy as np
import torch
from torch import Tensor

_libc = ctypes.CDLL(None) if hasattr(mmap, "MADV_HUGEPAGE") else None


def lazy_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Return zeros. On a CPU their pages come with the first write, as huge ones where there are.

    Touching a gigabyte takes seconds, and a cache or pool may never be full. The system gives pages
    of zeros, and takes all of them back when the tensor goes.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    is_cpu = device is None or device.type == "cpu"
    if not is_cpu or not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: shared memory gets huge pages almost nowhere, and a fork would write to ours.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages refuses
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def give_back(part: Tensor) -> None:
    """Let the system have the memory of a contiguous part of lazy zeros: it reads as zeros again.

    Only whole pages go; what else is on the first and last one stays as it is. On a device, and
    where there are no lazy zeros, nothing happens.
    """
    if _libc is None or part.device.type != "cpu" or not part.is_contiguous():
        return
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        # A refusal leaves the memory as it was: taken, and free for the next one.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def touch(part: Tensor) -> None:
    """Have the system give memory for a contiguous part of lazy zeros, all of which is still zero.

    In place, on a CPU: a zero is written to each page.
    """
    part.view(-1).view(torch.uint8)[:: mmap.PAGESIZE] = 0


def resident_bytes(tensor: Tensor) -> int:
    """Return how much of a CPU tensor is in memory now; all of it where the system cannot tell."""
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first = start - start % page
    num_pages = -(-(start + tensor.nbytes - first) // page)
    is_resident = np.zeros(num_pages, dtype=np.uint8)
    address, length = ctypes.c_void_p(first), ctypes.c_size_t(num_pages * page)
    mincore = getattr(_libc, "mincore", None)
    if mincore is None or mincore(address, length, ctypes.c_void_p(is_resident.ctypes.data)):
        return tensor.nbytes
    return min(int((is_resident & 1).sum()) * page, tensor.nbytes)
