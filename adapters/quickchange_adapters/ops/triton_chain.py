"""Kernels that start while the one before them ends (programmatic dependent launch, from sm_90 on).

A chained kernel may be there before the kernels in front of it are done. Until `wait_for_inputs` it
touches nothing that a kernel makes: weights and the step's tables alone, which nobody writes while
kernels run. Every program of it must wait, also one that has nothing to do: a kernel that ended
without would let the next one believe that all before it are done. So the order of what is written
is the order of the launches, as ever.

Source: CUDA C++ Programming Guide, programmatic dependent launch; PTX ISA, griddepcontrol.
Import it only where Triton is.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_CAPABILITY = (9, 0)


@lru_cache
def is_chained(device: torch.device) -> bool:
    """Whether kernels on this device are chained. Asked for at every launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def launch_options(*, is_on: bool) -> dict[str, Any]:
    """Return what a chained kernel is launched with, its constant included."""
    return {"IS_CHAINED": True, "launch_pdl": True} if is_on else {"IS_CHAINED": False}


@triton.jit  # type: ignore[untyped-decorator]
def let_next_start(IS_CHAINED: tl.constexpr) -> None:
    """Allow the next kernel to be launched once all programs of this one are there."""
    if IS_CHAINED:
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_inputs(IS_CHAINED: tl.constexpr) -> None:
    """Wait until all that was launched before has been done and is seen."""
    if IS_CHAINED:
        gdc_wait()
