"""How large a base is, read from its folder before anything is loaded. Torch-free.

Knows the file formats (config.json, safetensors headers) and nothing of what memory there is.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_server.engine.attention_tiles import MAX_PIECES
from quickchange_server.errors import BaseUnavailable

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class BaseFootprint:
    """Bytes that follow from a base's shapes in its serving dtype.

    Attributes:
        weight_bytes: all weights, once.
        kv_bytes_per_token: keys and values of one token over all layers.
        adapter_bytes_per_rank: one rank of an adapter on every linear of every block.
        max_model_len: the model's own limit in tokens.
        gpu_bytes_per_row: what a GPU's decode step keeps for each row beside its KV: float32 logits
            and what drawing makes of them, sums of a context's pieces, deltas.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    adapter_bytes_per_rank: int
    max_model_len: int
    gpu_bytes_per_row: int = 0


def read_footprint(folder: Path, dtype: str = "auto") -> BaseFootprint:
    """Read a base's footprint from its Hugging Face folder.

    Raises: BaseUnavailable when the folder is not a causal language model in safetensors.
    """
    config = _read_config(folder)
    wanted = _serving_dtype(config, dtype)
    shapes = [shape for file in _weight_files(folder) for shape in _read_shapes(file).items()]
    numbers = sum(math.prod(shape) for _, shape in shapes)
    per_rank = sum(sum(shape) for name, shape in shapes if _is_block_linear(name, shape))
    return BaseFootprint(
        weight_bytes=numbers * DTYPE_BYTES[wanted],
        kv_bytes_per_token=_kv_numbers_per_token(config) * DTYPE_BYTES[wanted],
        adapter_bytes_per_rank=per_rank * DTYPE_BYTES[wanted],
        max_model_len=int(config.get("max_position_embeddings") or 2048),
        gpu_bytes_per_row=4 * _numbers_per_row(config),
    )


def _numbers_per_row(config: dict[str, Any]) -> int:
    """Return how many float32 numbers of one row a GPU's decode step keeps, about."""
    width, heads = (int(config.get(key) or 0) for key in ("hidden_size", "num_attention_heads"))
    head_dim = int(config.get("head_dim") or width // max(heads, 1))
    inner, vocabulary = (int(config.get(key) or 0) for key in ("intermediate_size", "vocab_size"))
    return 4 * vocabulary + MAX_PIECES * heads * (head_dim + 2) + 2 * inner + 8 * width


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseUnavailable(
            f"the base folder {folder} has no config.json; give a Hugging Face model folder"
        ) from error
    except (OSError, ValueError) as error:
        raise BaseUnavailable(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "num_hidden_layers" not in config:
        raise BaseUnavailable(f"{folder / 'config.json'} is not that of a language model")
    return config


def _serving_dtype(config: dict[str, Any], dtype: str) -> str:
    """Return the dtype to serve in; a checkpoint that names none is float32."""
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    return dtype if dtype != "auto" else own if own in DTYPE_BYTES else "float32"


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseUnavailable(
            f"the base folder {folder} has no .safetensors file; convert it first"
        )
    return files


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Return tensor names and shapes from a safetensors header."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseUnavailable(f"{file} is not a safetensors file: {error}") from error


def _is_block_linear(name: str, shape: list[int]) -> bool:
    return len(shape) == 2 and ".layers." in name and name.endswith(".weight")


def _kv_numbers_per_token(config: dict[str, Any]) -> int:
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    return 2 * int(config["num_hidden_layers"]) * num_kv_heads * head_dim
