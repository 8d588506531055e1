"""Headers of safetensors files: good ones against safetensors itself, bad ones by name."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_adapters.header import HeaderRefused, read_array, read_header, to_float32
from safetensors.torch import save_file

from tests.adapters.adapter_files import safetensors_bytes

MIB = 1 << 20


def refusal(path: Path, data: bytes) -> HeaderRefused:
    path.write_bytes(data)
    with pytest.raises(HeaderRefused) as caught:
        read_header(path, MIB)
    return caught.value


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7, 2).to(dtype)}
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path, MIB)
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            found = header.tensors[name]
            assert found.shape == tuple(tensor.shape)
            values = to_float32(read_array(file, found), found.dtype)
            assert np.array_equal(values, tensor.float().numpy())


def test_bfloat16_is_exact_for_every_bit_pattern() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(to_float32(bits, "BF16"), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["pickle", "torch", "zip", "empty", "text", "gguf", "short"])
def test_other_formats_are_not_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights"
    if name == "torch":
        torch.save({"a": torch.ones(2)}, path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("adapter_model.safetensors", b"x")
    data = {
        "pickle": pickle.dumps({"a": list(range(100))}),
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "gguf": b"GGUF" + bytes(60),
        "short": b"\x02\0\0",
    }.get(name)
    error = refusal(path, path.read_bytes() if data is None else data)
    assert error.code == "weights_not_safetensors"


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(dtype="F64", offsets=(0, 32))},
        {"a": entry(dtype="I8", offsets=(0, 4))},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=(2, 3))},
        {"a": entry(shape=(2, -2))},
        {"a": entry(shape=(2.0, 2))},
        {"a": entry(shape=(True, 4))},
        {"a": entry(shape=(1 << 62, 1 << 62))},
        {"a": entry(shape=[1] * 9, offsets=(0, 4))},
        {"a": entry(shape="22")},
        {"a": entry(offsets=(0, 16, 16))},
        {"a": entry(offsets=(16, 0))},
        {"a": entry(offsets=(-16, 0))},
        {"a": entry(offsets=(16, 32))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(8, 24))},
        {"a": entry(), "b": entry(offsets=(20, 36))},
        {"a": {**entry(), "more": 1}},
        {"a": {"dtype": "F32"}},
        {"a": []},
        {"a": entry(), "__metadata__": {"a": 1}},
        {"a": entry(), "__metadata__": []},
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "{",
        '{"a":' * 50_000,
        "{" + " " * MIB + "}",
    ],
)
def test_malformed_headers_are_invalid(tmp_path: Path, header: object) -> None:
    error = refusal(tmp_path / "weights", safetensors_bytes(header, bytes(16)))
    assert error.code == "weights_invalid"


@pytest.mark.parametrize("num_bytes", [0, 15, 17, 1000])
def test_missing_and_trailing_bytes_are_invalid(tmp_path: Path, num_bytes: int) -> None:
    data = safetensors_bytes({"a": entry()}, bytes(num_bytes))
    assert refusal(tmp_path / "weights", data).code == "weights_invalid"


@pytest.mark.parametrize("length", [200, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_is_invalid(tmp_path: Path, length: int) -> None:
    data = length.to_bytes(8, "little") + b'{"a": 1}' + bytes(50)
    assert refusal(tmp_path / "weights", data).code == "weights_invalid"


def test_a_file_that_shrank_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(safetensors_bytes({"a": entry()}, bytes(16)))
    found = read_header(path, MIB).tensors["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with path.open("rb") as file, pytest.raises(HeaderRefused):
        read_array(file, found)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=120))
def test_no_bytes_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    refusal(path, data)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    data = bytearray(safetensors_bytes({"a": entry(), "b": entry(offsets=(16, 32))}, bytes(32)))
    data[place % len(data)] = byte
    path.write_bytes(data)
    try:
        header = read_header(path, MIB)
    except HeaderRefused:
        return
    assert all(tensor.end <= len(data) for tensor in header.tensors.values())
