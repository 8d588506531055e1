"""Write random, non-zero LoRA adapters for a base folder, in the form PEFT's save_pretrained has.

Needs the shapes in the base's safetensors headers, not the model; PEFT is not needed. A is drawn as
PEFT starts it, B so that an update moves its layer's output by a few per cent, as after training.

    python benchmarks/make_adapters.py BASE_FOLDER OUTPUT_FOLDER --count 8
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import adapter_name

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_STD = 0.02


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an adapter is like: its rank, the last path parts it targets, its dtype."""

    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    dtype: str = "bfloat16"


def linear_shapes(base: Path, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return module path -> (out, in) of the targeted linears, read from the base's headers.

    Raises: ValueError when the folder holds no such weights.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                module = key.removesuffix(".weight")
                if module != key and module.rpartition(".")[2] in targets:
                    shapes[module] = tuple(weights.get_slice(key).get_shape())
    missing = set(targets) - {module.rpartition(".")[2] for module in shapes}
    if missing:
        raise ValueError(
            f"{base.name!r} has no safetensors weights of {', '.join(sorted(missing))}"
        )
    return shapes


def write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], shape: AdapterShape, seed: int
) -> None:
    """Write one adapter; equal seeds give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    tensors = {}
    for module, (num_out, num_in) in shapes.items():
        bound = 1 / math.sqrt(num_in)
        lora_a = torch.empty(shape.rank, num_in).uniform_(-bound, bound, generator=generator)
        lora_b = torch.empty(num_out, shape.rank).normal_(0, B_STD, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")


def write_adapters(base: Path, output: Path, count: int, shape: AdapterShape) -> list[Path]:
    """Write so many adapters, each in a folder named like it; return the folders."""
    shapes = linear_shapes(base, shape.targets)
    folders = [output / adapter_name(index) for index in range(count)]
    for seed, folder in enumerate(folders):
        write_adapter(folder, shapes, shape, seed)
    return folders


def _config(shape: AdapterShape) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(shape.targets),
        "inference_mode": True,
    }


def main() -> None:
    """Write the adapters that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "base", type=Path, help="folder of the base, as `quickchange base path` says"
    )
    parser.add_argument("output", type=Path, help="folder that gets a folder for each adapter")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=",".join(LINEARS), help="last path parts, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    shape = AdapterShape(options.rank, tuple(options.targets.split(",")), options.dtype)
    try:
        folders = write_adapters(options.base, options.output, options.count, shape)
    except ValueError as error:
        parser.error(str(error))
    num_bytes = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    print(f"{len(folders)} adapters, {num_bytes / 2**20:.1f} MiB in {options.output}")


if __name__ == "__main__":
    main()
