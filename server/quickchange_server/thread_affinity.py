"""Which cores this process's threads may use, and how often they take turns. Torch-free.

With OMP_PROC_BIND set, importing torch binds the thread that imports it to one core, and every
thread it starts inherits that: the event loop would share the engine's core. So the mask is saved
before torch is imported, and put back in the thread that runs the event loop and starts the
others; the OpenMP runtime binds the engine's thread by itself at its first parallel region.
"""

import os
import sys

SWITCH_INTERVAL_S = 1e-4
_saved_mask: set[int] | None = None


def prepare_threads() -> None:
    """Save the affinity mask, and let a waiting thread run soon. Call before importing torch.

    Large tensors are put on huge pages, where the system has them: weights are read from end to
    end in every step.
    """
    global _saved_mask
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own name
    if os.environ.get("OMP_PROC_BIND") and hasattr(os, "sched_getaffinity"):
        _saved_mask = os.sched_getaffinity(0)


def restore_affinity() -> None:
    """Give the calling thread the saved mask; nothing happens when none was saved."""
    if _saved_mask is not None:
        os.sched_setaffinity(0, _saved_mask)
