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

import triton
from quickchange_adapters.ops import triton_deltas, triton_product
from quickchange_server.engine import triton_attention_kernels, triton_pointwise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
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
    pieces = -(-width // triton_deltas.PIECE_COLUMNS)
    shared = {**DELTAS, "NUM_PARTS": parts, "NUM_PIECES": pieces}
    shrink = {**shared, "IN": width, "BLOCK_IN": triton_deltas.MAX_INPUT_TILE}
    shrink["PIECE"] = triton_deltas.PIECE_COLUMNS
    expand = {**shared, "OUT": out, "BLOCK_OUT": triton_deltas.MAX_OUTPUT_TILE, "ALIGNMENT": 16}
    return {
        f"shrink {role}": (triton_deltas._shrink, shrink, {}),
        f"expand {role}": (triton_deltas._expand, expand, {}),
    }


def product() -> dict[str, int | bool]:
    """Constants of the product of few rows."""
    columns, inner = triton_product.BLOCK_COLUMNS, triton_product.BLOCK_INNER
    blocks = {"BLOCK_COLUMNS": columns, "BLOCK_INNER": inner, "ROW_TILE": triton_product.MAX_ROWS}
    return {**blocks, "WIDTH": 4096, "NUM_COLUMNS": 6144, "HAS_BIAS": True}


def variants() -> dict[str, Variant]:
    """Every kernel as a base of 8 billion launches it, and attention with all it can do."""
    kernels, pointwise = triton_attention_kernels, triton_pointwise
    joined = {**HEADS, "VALUE_DIM": 128, "VALUE_TILE": 128, "ROW_TILE": 4}
    joined = {name: joined[name] for name in joined if name not in ("BLOCK_SIZE", "POSITION_TILE")}
    rotate = {"NUM_HEADS": 32, "NUM_KV": 8, "DIM": 128, "HALF_TILE": 64, "HAS_NORM": True}
    norm = {"WIDTH": 4096, "TILE": 4096, "HAS_UPDATE": True}
    gated = {"WIDTH": 14336, "TILE": pointwise.GATED_TILE, "IS_GELU": False}
    plain, rich = attention(128, 16, has_extras=False), attention(96, 64, has_extras=True)
    long, odd = attention(128, 64, has_extras=False), attention(96, 16, has_extras=True)
    options = {"num_warps": triton_product.NUM_WARPS, "num_stages": triton_product.NUM_STAGES}
    return {
        "product": (triton_product._product, product(), options),
        **{name: each for role in WIDTHS for name, each in deltas(role).items()},
        "pieces": (kernels.attend_pieces, plain, {"num_stages": 3}),
        "pieces, window and cap": (kernels.attend_pieces, odd, {"num_stages": 3}),
        "join": (kernels.join_pieces, joined, {}),
        "tiles": (kernels.attend_tiles, long, {"num_stages": 2}),
        "tiles, window and cap": (kernels.attend_tiles, rich, {"num_stages": 2}),
        "rotate": (pointwise._rotate_and_store, rotate, {"num_warps": 1}),
        "norm": (pointwise._add_and_norm, norm, {"num_warps": pointwise.MAX_NORM_WARPS}),
        "gated": (pointwise._gated, gated, {}),
    }


POINTERS = {"table": "*i32", "tiles": "*i32", "slots": "*i64"}
WIDE = ("hidden", "partial_mixed", "partial_stats")
FLOATS = ("scaling", "softcap", "epsilon")
INTEGERS = ("window", "num_rows", "x_stride", "y_stride", "head_stride", "token_stride")


def type_of(kernel: triton.JITFunction, name: str) -> str:
    """Say a parameter's type as the launcher would, with weights in bfloat16."""
    if name in INTEGERS:
        return "i32"
    if name in WIDE and kernel is not triton_pointwise._add_and_norm:
        return "*fp32"
    return "fp32" if name in FLOATS else POINTERS.get(name, "*bf16")


def compile_one(variant: Variant, capability: int) -> dict[str, int]:
    """Compile down to machine code; return what it takes."""
    kernel, constants, options = variant
    names = kernel.arg_names
    signature = {
        each: "constexpr" if each in constants else type_of(kernel, each) for each in names
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
    }
    json.dump(found, sys.stdout)
