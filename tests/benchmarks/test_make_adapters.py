"""Adapters for benchmarks: PEFT and the server's own checks take them, and they matter."""

from pathlib import Path

import pytest
import torch
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.loading import load_weights

from benchmarks.make_adapters import LINEARS, AdapterShape, linear_shapes, write_adapters

SHAPE = AdapterShape(rank=4, dtype="float32")


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(tiny_base, tmp_path_factory.mktemp("bench"), 2, SHAPE)


def test_peft_loads_them_and_each_moves_the_logits_differently(
    tiny_base: Path, folders: list[Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32).eval()
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        logits = [base(tokens).logits]
        model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="first")
        model.load_adapter(str(folders[1]), adapter_name="second")
        for name in ("first", "second"):
            model.set_adapter(name)
            logits.append(model.eval()(tokens).logits)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (logits[i] - logits[j]).abs().max() > 1e-3


def test_the_servers_checks_take_them(tiny_base: Path, folders: list[Path]) -> None:
    shapes = linear_shapes(tiny_base, LINEARS)
    modules = {path: ModuleSpec("linear", shape[1], shape[0]) for path, shape in shapes.items()}
    spec = BaseSpec("tiny", "0" * 64, "llama", 2, modules)
    config, weights = folders[0] / "adapter_config.json", folders[0] / "adapter_model.safetensors"
    loaded = load_weights(config, weights, spec, "digest", torch.float32)
    assert loaded.pairs.keys() == modules.keys()
    assert loaded.max_rank == 4
    assert all(pair.lora_b.abs().max() > 0 for pair in loaded.pairs.values())


def test_equal_seeds_give_equal_bytes_and_others_do_not(
    tiny_base: Path, folders: list[Path], tmp_path: Path
) -> None:
    again = write_adapters(tiny_base, tmp_path, 2, SHAPE)

    def weights(folder: Path) -> bytes:
        return (folder / "adapter_model.safetensors").read_bytes()

    assert [weights(folder) for folder in again] == [weights(folder) for folder in folders]
    assert weights(folders[0]) != weights(folders[1])


def test_targets_and_dtype_are_taken(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shape = AdapterShape(rank=2, targets=("q_proj", "v_proj"))
    (folder,) = write_adapters(tiny_base, tmp_path, 1, shape)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all("q_proj" in name or "v_proj" in name for name in tensors)


def test_a_base_without_the_targets_is_refused_by_name(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors weights of c_attn"):
        linear_shapes(tiny_base, ("q_proj", "c_attn"))
