"""What the engine is told at start, as one frozen object. Byte values are resolved numbers."""

from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and places of one engine.

    Attributes:
        served_name: the base's name in `model`.
        known_as: what others call the same model, such as its id on the Hub.
        device: `cpu` or `cuda[:n]`.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        kv_cache_bytes: ceiling of the KV blocks over all layers.
        kv_block_size: tokens per block.
        max_model_len: most tokens of prompt and answer together; None: the model's own limit.
        max_batch_rows: most requests in one step.
        max_step_tokens: most tokens in one step, so that long prompts are prefilled in chunks.
        max_queue: most requests that wait; more are refused with 429.
        adapter_device_bytes: ceiling of the device pool of adapters.
        adapter_host_bytes: ceiling of the host copies of adapters.
        merged_bytes: ceiling of all merged copies together; None: as large as the base.
        max_lora_rank: largest rank that is served.
        num_threads: threads of the engine's products; None: as torch would have it.
        kernels: `triton`, `native`, `plain`, or `auto`: Triton's on a GPU, the native library's on
            a CPU where it can run the base, else plain ones.
        amx: whether the native library may compute products by AMX, where the CPU has it.
        quantize: `int8`: the base's matrices in int8, with a scale for each output.
        native_folder: where the native library is kept; None: in the user's cache.
        group_merged: whether a merged adapter's rows may run in steps of their own (on a CPU).
        auto_merge: whether it is counted what merged copies would bring.
        fused_layers: whether blocks of Llama's shape run as fused kernels, where Triton's run.
        skinny_products: whether few rows take a product of Triton's, where its kernels run.
        cuda_graphs: whether decode steps are captured and replayed, where Triton's kernels run.
        steps_ahead: whether a captured step may be launched before the last one's tokens are known.
    """

    served_name: str = "base"
    known_as: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "auto"
    kv_cache_bytes: int = GIB
    kv_block_size: int = 16
    max_model_len: int | None = None
    max_batch_rows: int = 32
    max_step_tokens: int = 256
    max_queue: int = 256
    adapter_device_bytes: int = GIB // 2
    adapter_host_bytes: int = GIB
    merged_bytes: int | None = None
    max_lora_rank: int = 256
    num_threads: int | None = None
    kernels: str = "auto"
    amx: bool = True
    quantize: str | None = None
    native_folder: Path | None = None
    group_merged: bool = True
    auto_merge: bool = False
    fused_layers: bool = True
    skinny_products: bool = True
    cuda_graphs: bool = True
    steps_ahead: bool = True
