"""What PyTorch holds of a GPU, and for it; CUDA's context and libraries come on top."""

import torch


def held_bytes(device: torch.device) -> dict[str, int]:
    """Return bytes in tensors on a GPU, bytes taken from it, and page-locked bytes on the host.

    The last two count what PyTorch keeps for the next allocation; page-locked blocks are rounded up
    to powers of two. From any thread. Nothing for a CPU, whose memory is the process's.
    """
    if device.type != "cuda":
        return {}
    return {
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
        "host_pinned": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0),
    }
