"""What PyTorch holds of a GPU, whatever for; CUDA's context and libraries come on top."""

import torch


def held_bytes(device: torch.device) -> dict[str, int]:
    """Return bytes in tensors, and bytes taken from the device, with cached ones.

    From any thread. Nothing for a CPU, whose memory is the process's.
    """
    if device.type != "cuda":
        return {}
    return {
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved": torch.cuda.memory_reserved(device),
    }
