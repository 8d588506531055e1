"""Random adapters by the hundred: few sets of numbers under many names.

On the device each name has rows of its own, so what a step reads is what it would read of as many
different adapters. In host memory they share, so that making them takes seconds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from quickchange_adapters.host_adapter import HostAdapter, HostGroup, pin_adapter
from quickchange_adapters.layout import AdapterLayout, GroupShape

from benchmarks.gpu_engine import GpuEngine

MIXED_RANKS = (40, 8, 64, 24, 48, 16, 56, 32)
ATTENTION = ("q_proj", "o_proj")
"""First linears of the groups that adapters of attention alone have."""


def template(
    layout: AdapterLayout, rank: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> HostAdapter:
    """Make an adapter on every linear of the blocks, pinned on a GPU."""
    generator = torch.Generator(device).manual_seed(seed)
    groups = {kind: _group(shape, rank, dtype, generator) for kind, shape in layout.groups.items()}
    adapter = HostAdapter("template", groups)
    return pin_adapter(adapter) if device.type == "cuda" else adapter


def _group(
    shape: GroupShape, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> HostGroup:
    def drawn(deviation: float, *size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=generator.device, dtype=dtype)
        return (values * deviation).cpu()

    a_size = shape.num_layers, rank, shape.num_parts, shape.in_features
    lora_a = drawn(shape.in_features**-0.5, *a_size)
    lora_b = drawn(0.1 * rank**-0.5, shape.num_layers, rank, shape.out_features)
    return HostGroup(lora_a, lora_b)


def add_named(engine: GpuEngine, adapters: Sequence[HostAdapter], first: int, count: int) -> None:
    """Register `adapter-first` and so on; they take the adapters in turn."""
    for index in range(count):
        name = f"adapter-{first + index}"
        engine.add_packed(replace(adapters[index % len(adapters)], digest=name))


def attention_only(adapter: HostAdapter) -> HostAdapter:
    """Return an adapter of q, k, v and o alone."""
    kept = {k: g for k, g in adapter.groups.items() if any(name in k for name in ATTENTION)}
    return replace(adapter, groups=kept)
