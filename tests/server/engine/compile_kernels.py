"""Compile every kernel for GPUs, on a machine without one, and say what it takes. Run as a script.

The interpreter accepts what the compiler refuses, and cannot compute in bfloat16. Prints, as JSON,
shared memory, registers and stack (where registers are spilled to) of each kernel, in bytes but for
the registers; the widest load from global memory; and the bytes of all loads of that width which
do not wait: those of a pipelined loop, before its first turn and in each.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from quickchange_adapters.ops import triton_deltas, triton_product, triton_shrink
from quickchange_server.engine import (
    triton_attention,
    triton_attention_kernels,
    triton_pointwise,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
CHAINED_FROM = 90
LARGE = ("product, deep",)  # launched where its shared memory is found alone
WARP, WIDEST = 32, 16
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DELTAS = {"KIND": 1, "TILE": 16}
HEADS = {"BLOCK_SIZE": 16, "NUM_KV": 8, "GROUPS": 4, "POSITION_TILE": 64}
WIDTHS = {  # of a base of 8 billion: parts, input, output
    "qkv": (3, 4096, 6144),
    "output": (1, 4096, 4096),
    "gate_up": (2, 4096, 28672),
    "down": (1, 14336, 4096),
}
Variant = tuple[triton.JITFunction, dict[str, int | bool], dict[str, int]]


def attention(dim: int, row_tile: int, *, has_extras: bool) -> dict[str, int | bool]:
    """Constants of one variant of the attention kernels."""
    sizes = {"KEY_DIM": dim, "VALUE_DIM": dim, "KEY_TILE": 128, "VALUE_TILE": 128}
    flags = {"HAS_CAP": has_extras, "HAS_WINDOW": has_extras}
    return {**HEADS, **sizes, **flags, "ROW_TILE": row_tile}


def deltas(role: str) -> dict[str, Variant]:
    """Both kernels of one projection group."""
    parts, width, out = WIDTHS[role]
    pieces = -(-width // triton_shrink.PIECE_COLUMNS)
    shared = {**DELTAS, "NUM_PARTS": parts, "NUM_PIECES": pieces}
    shrink = {**shared, "WIDTH": width, "BLOCK_IN": triton_shrink.MAX_INPUT_TILE}
    shrink["PIECE"] = triton_shrink.PIECE_COLUMNS
    expand = {**shared, "OUT": out, "BLOCK_OUT": triton_deltas.MAX_OUTPUT_TILE, "ALIGNMENT": 16}
    return {
        f"shrink {role}": (triton_shrink._shrink, shrink, {}),
        f"expand {role}": (triton_deltas._expand, {**expand, "IS_APART": False}, {}),
        f"expand {role} apart": (triton_deltas._expand, {**expand, "IS_APART": True}, {}),
    }


def product(num_stages: int) -> Variant:
    """The product of few rows."""
    constants = triton_product.TILING.constants(
        6144, torch.empty(0, dtype=torch.bfloat16), is_alone=False
    )
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"WIDTH": 4096, "NUM_COLUMNS": 6144, "HAS_BIAS": True}
    return triton_product._product, constants, {**options, "num_stages": num_stages}


def variants() -> dict[str, Variant]:
    """Every kernel as a base of 8 billion launches it, and attention with all it can do."""
    kernels, pointwise = triton_attention_kernels, triton_pointwise
    joined = {**HEADS, "VALUE_DIM": 128, "VALUE_TILE": 128, "ROW_TILE": 4, "PIECE_TILE": 8}
    joined = {name: joined[name] for name in joined if name not in ("BLOCK_SIZE", "POSITION_TILE")}
    rotate = {"NUM_HEADS": 32, "NUM_KV": 8, "DIM": 128, "HALF_TILE": 64, "HAS_NORM": True}
    norm = {"WIDTH": 4096, "TILE": 4096, "HAS_UPDATE": True}
    gated = {"WIDTH": 14336, "TILE": pointwise.GATED_TILE, "IS_GELU": False}
    for each in (rotate, norm, gated):
        each["HAS_DELTAS"] = True
    pieces = {"num_stages": 3, "num_warps": triton_attention.CHAINED_PIECE_WARPS}
    plain, rich = attention(128, 16, has_extras=False), attention(96, 64, has_extras=True)
    long, odd = attention(128, 64, has_extras=False), attention(96, 16, has_extras=True)
    return {
        "product": product(triton_product.TILING.num_stages),
        "product, deep": product(triton_product.TILING.deep_stages),
        **{name: each for role in WIDTHS for name, each in deltas(role).items()},
        "pieces": (kernels.attend_pieces, plain, pieces),
        "pieces, window and cap": (kernels.attend_pieces, odd, pieces),
        "join": (kernels.join_pieces, joined, {}),
        "tiles": (kernels.attend_tiles, long, {"num_stages": 2}),
        "tiles, window and cap": (kernels.attend_tiles, rich, {"num_stages": 2}),
        "rotate": (pointwise._rotate_and_store, rotate, {"num_warps": 1}),
        "norm": (pointwise._add_and_norm, norm, {"num_warps": pointwise.MAX_NORM_WARPS}),
        "gated": (pointwise._gated, gated, {}),
    }


POINTERS = {"table": "*i32", "tiles": "*i32", "slots": "*i64"}
WIDE = ("hidden", "deltas", "partial_mixed", "partial_stats")
FLOATS = ("scaling", "softcap", "epsilon")
INTEGERS = ("window", "num_rows", "x_stride", "y_stride", "head_stride", "token_stride")


def type_of(kernel: triton.JITFunction, name: str, *, is_apart: bool) -> str:
    """Say a parameter's type as the launcher would, with weights in bfloat16."""
    if name in INTEGERS:
        return "i32"
    is_norm = kernel is triton_pointwise._add_and_norm  # what it calls hidden is not the sums
    if name in WIDE and not (is_norm and name == "hidden"):
        return "*fp32"
    if name == "y" and is_apart:
        return "*fp32"
    return "fp32" if name in FLOATS else POINTERS.get(name, "*bf16")


def compile_one(variant: Variant, capability: int) -> dict[str, int]:
    """Compile down to machine code; return what it takes."""
    kernel, constants, options = variant
    names = kernel.arg_names
    if "IS_CHAINED" in names:
        constants = {**constants, "IS_CHAINED": capability >= CHAINED_FROM}
    if capability < CHAINED_FROM and kernel is triton_attention_kernels.attend_pieces:
        options = {**options, "num_warps": triton_attention.PIECE_WARPS}
    is_apart = bool(constants.get("IS_APART"))
    signature = {
        name: "constexpr" if name in constants else type_of(kernel, name, is_apart=is_apart)
        for name in names
    }
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs={
            (i,): aligned
            for i, each in enumerate(names)
            if signature[each].startswith("*") or each in INTEGERS
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    ptx, usage = compiled.asm["ptx"], resource_usage(compiled.asm["cubin"])
    copies = [int(each, 16) for each in re.findall(r"cp\.async\.c[ga]\.\S+ .*?, 0x(\w+)", ptx)]
    loads = [4 * int(each or 1) for each in re.findall(r"ld\.global(?:\.v(\d))?\.b32", ptx)]
    threads = WARP * int(compiled.metadata.num_warps)
    return {
        "shared": int(compiled.metadata.shared),
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "threads": threads,
        "widest_load_bytes": max(copies + loads),
        "bytes_in_flight": threads * sum(each for each in copies if each == WIDEST),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Read registers and stack off the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


if __name__ == "__main__":
    found = {
        f"{name}, sm_{capability}": compile_one(each, capability)
        for capability in CAPABILITIES
        for name, each in variants().items()
        if capability >= CHAINED_FROM or name not in LARGE
    }
    json.dump(found, sys.stdout)
