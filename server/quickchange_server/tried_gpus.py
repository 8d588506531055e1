"""Which GPUs the server was run on; the start says so where it is on another one."""

import torch

TRIED = "H100 and H200"
TRIED_CAPABILITY = (9, 0)


def untried_note(device: str) -> str | None:
    """Return what is to be said of a GPU, `cuda:N`; None: it is of a kind that was run on."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return untried_text(name, capability, is_nvidia=torch.version.hip is None)


def untried_text(name: str, capability: tuple[int, int], *, is_nvidia: bool = True) -> str | None:
    """Return the note for a GPU of this name and compute capability, if there is one."""
    if is_nvidia and capability == TRIED_CAPABILITY:
        return None
    shown = f" (compute capability {capability[0]}.{capability[1]})" if is_nvidia else ""
    return (
        f"GPU: {name}{shown}: Quickchange was not run on this kind yet, only on NVIDIA's {TRIED}; "
        "compare its answers with `--kernels plain`, which takes PyTorch's kernels"
    )
