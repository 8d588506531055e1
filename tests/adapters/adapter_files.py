"""Adapters made by hand, byte by byte, without torch and without PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec

Array = npt.NDArray[Any]

PARTS = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "down_proj": (128, 64)}
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def small_spec(num_layers: int = 2) -> BaseSpec:
    """Return a base with four linears a layer, an embedding and a head."""
    modules = {
        f"model.layers.{layer}.{'mlp' if part == 'down_proj' else 'self_attn'}.{part}": ModuleSpec(
            "linear", *shape
        )
        for layer in range(num_layers)
        for part, shape in PARTS.items()
    }
    modules["model.embed_tokens"] = ModuleSpec("embedding", 384, 64)
    modules["lm_head"] = ModuleSpec("lm_head", 64, 384)
    return BaseSpec("tiny", "ba5e" * 16, "llama", num_layers, modules)


def config_values(**changes: Any) -> dict[str, Any]:
    """Return a config as PEFT writes it, with changes."""
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/somewhere/tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    values.update(changes)
    return values


def pair(module: str, spec: BaseSpec, rank: int = 4, seed: int = 0) -> dict[str, Array]:
    """Return a module's random pair under PEFT's names, in float32."""
    random = np.random.default_rng(seed)
    shape = spec.modules[module]
    prefix = f"base_model.model.{module}"
    a = random.standard_normal((rank, shape.in_features))
    b = random.standard_normal((shape.out_features, rank))
    return {
        f"{prefix}.lora_A.weight": a.astype(np.float32),
        f"{prefix}.lora_B.weight": b.astype(np.float32),
    }


def q_pairs(spec: BaseSpec, rank: int = 4) -> dict[str, Array]:
    """Return pairs for every q_proj of a base."""
    tensors: dict[str, Array] = {}
    for seed, module in enumerate(m for m in spec.modules if m.endswith("q_proj")):
        tensors |= pair(module, spec, rank, seed)
    return tensors


def header_of(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Return the header's object for tensors that lie one after the other; uint16 is bfloat16."""
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    return header


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """Return a file: the header's length, the header (text as it is, else as JSON), the data."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def weights_bytes(tensors: Mapping[str, Array]) -> bytes:
    """Return a whole weights file."""
    return safetensors_bytes(header_of(tensors), b"".join(a.tobytes() for a in tensors.values()))


def write_adapter(
    folder: Path, tensors: Mapping[str, Array] | bytes, config: Mapping[str, Any] | bytes
) -> tuple[Path, Path]:
    """Write an adapter's two files; bytes are written as they are. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    paths[0].write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    paths[1].write_bytes(tensors if isinstance(tensors, bytes) else weights_bytes(tensors))
    return paths
