"""Upload forms made by hand, whole or with one fault; bytes, so that nothing mends them."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.adapters.adapter_files import (
    Array,
    config_values,
    q_pairs,
    safetensors_bytes,
    small_spec,
    weights_bytes,
)

SPEC = small_spec()
BOUNDARY = "XXhgTzXX"
KIND = f"multipart/form-data; boundary={BOUNDARY}"
END = f"--{BOUNDARY}--\r\n".encode()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"
GOOD_CONFIG = json.dumps(config_values()).encode()
GOOD_WEIGHTS = weights_bytes(q_pairs(SPEC))


def part(name: str, data: bytes, headers: str = "") -> bytes:
    """Return one part of a form."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n{headers}\r\n'
    return head.encode() + data + b"\r\n"


def form(
    config: bytes = GOOD_CONFIG, weights: bytes = GOOD_WEIGHTS, name: str = "bad", **fields: bytes
) -> bytes:
    """Return a whole form; every fault is in what it is given."""
    parts = {"name": name.encode(), "adapter_config": config, "adapter_model": weights, **fields}
    return b"".join(part(*each) for each in parts.items()) + END


def configured(**changes: Any) -> bytes:
    """Return a form whose config has changes."""
    return form(config=json.dumps(config_values(**changes)).encode())


def weighing(changes: Mapping[str, Array | None], **config: Any) -> bytes:
    """Return a form whose tensors have changes; None takes one away."""
    tensors = {**q_pairs(SPEC), **changes}
    kept = {name: array for name, array in tensors.items() if array is not None}
    return form(json.dumps(config_values(**config)).encode(), weights_bytes(kept))


def headed(header: object, data: bytes = b"") -> bytes:
    """Return a form with a weights file of this header."""
    return form(weights=safetensors_bytes(header, data))


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    """Return one tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def ones(*shape: int) -> Array:
    """Return a tensor of ones."""
    return np.ones(shape, np.float32)


def holding(value: float, name: str = f"{Q0}.lora_A.weight", dtype: Any = np.float32) -> bytes:
    """Return a form with one bad value among good ones."""
    array = np.ones((4, 64) if "lora_A" in name else (64, 4), dtype)
    array[1, 2] = value
    return weighing({name: array})


def renamed(rename: Callable[[str], str]) -> bytes:
    """Return a form whose tensors have other names."""
    return weighing({**dict.fromkeys(q_pairs(SPEC)), **renamed_pairs(rename)})


def renamed_pairs(rename: Callable[[str], str]) -> dict[str, Array]:
    """Return good pairs under other names."""
    return {rename(name): array for name, array in q_pairs(SPEC).items()}


def of_width(width: int) -> bytes:
    """Return a form trained on a base of another width."""
    pairs = {}
    for prefix in (Q0, Q1):
        pairs[f"{prefix}.lora_A.weight"] = ones(4, width)
        pairs[f"{prefix}.lora_B.weight"] = ones(width, 4)
    return weighing(pairs)


def zipped() -> bytes:
    """Return what torch.save writes, in outline."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def tarred() -> bytes:
    """Return an archive that would like to be unpacked elsewhere."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../evil"))
    return buffer.getvalue()
