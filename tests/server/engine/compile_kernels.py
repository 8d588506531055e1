"""Compile every kernel for GPUs of two generations, on a machine without one. Run as a script.

The interpreter accepts what the compiler refuses, and cannot compute in bfloat16.
"""

import json
import sys

import triton
from quickchange_adapters.ops import triton_deltas
from quickchange_server.engine import triton_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
DELTAS = {"KIND": 1, "NUM_PARTS": 3, "TILE": 16}
HEADS = {"BLOCK_SIZE": 16, "NUM_KV": 8, "GROUPS": 4, "POSITION_TILE": 64}


def attention(dim: int, row_tile: int, *, has_extras: bool) -> dict[str, int | bool]:
    """Constants of one variant of the attention kernel."""
    sizes = {"KEY_DIM": dim, "VALUE_DIM": dim, "KEY_TILE": 128, "VALUE_TILE": 128}
    flags = {"HAS_CAP": has_extras, "HAS_WINDOW": has_extras}
    return {**HEADS, **sizes, **flags, "ROW_TILE": row_tile}


VARIANTS = {
    "shrink": (triton_deltas._shrink, {**DELTAS, "IN": 4096, "BLOCK_IN": 128}),
    "expand": (triton_deltas._expand, {**DELTAS, "OUT": 6144, "BLOCK_OUT": 128}),
    "decode": (triton_attention._attend, attention(128, 16, has_extras=False)),
    "chunk": (triton_attention._attend, attention(96, 64, has_extras=True)),
}
POINTERS = {"table": "*i32", "tiles": "*i32", "hidden": "*fp32"}
FLOATS = ("scaling", "softcap")


def type_of(name: str) -> str:
    """Say a parameter's type as the launcher would, with weights in bfloat16."""
    if name.endswith("_stride") or name == "window":
        return "i32"
    return "fp32" if name in FLOATS else POINTERS.get(name, "*bf16")


def compile_one(name: str, capability: int) -> int:
    """Compile down to machine code; return the bytes of shared memory it takes."""
    kernel, constants = VARIANTS[name]
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else type_of(each) for each in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs={(i,): aligned for i, each in enumerate(names) if signature[each].startswith("*")},
    )
    options = {"num_stages": 2} if kernel is triton_attention._attend else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    shared = {f"{n} sm_{c}": compile_one(n, c) for c in CAPABILITIES for n in VARIANTS}
    json.dump(shared, sys.stdout)
