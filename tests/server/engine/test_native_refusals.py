"""What the native library is not given, and what it says when there is not enough of something."""

import dataclasses
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from quickchange_adapters.native.build import library_path
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.native_step import StepInput, native_refusal
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase

from tests.conftest import save_tiny_base
from tests.server.engine.conftest import make_engine
from tests.server.engine.native import needs_native

pytestmark = needs_native


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_tiny_base(folder, "llama", head_dim=32)
    return folder


def test_a_step_without_memory_is_an_error_and_the_next_one_runs(base: Path) -> None:
    """Threads allocate nothing among themselves: what one throws there would end the process."""
    num_positions = 1 << 23
    client = make_engine(base, dtype="bfloat16", kernels="native", num_threads=1)
    native = client._engine.runner.native
    assert native is not None
    far = torch.zeros(num_positions, 16, dtype=torch.bfloat16)  # untouched: takes no memory
    native._model.cosines = native._model.sines = far.data_ptr()
    blocks = [1] * (num_positions // 16)

    def run(position: int) -> None:
        embeds = client._base_model.embed(torch.zeros(4, dtype=torch.long))
        native.run(StepInput(embeds, [position] * 4, [0] * 4, blocks, wanted=[0]), None)

    run(1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), before[1]))
    try:
        with pytest.raises(MemoryError):
            run(num_positions - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    run(1)


def test_a_text_model_within_another_is_not_taken_for_one() -> None:
    text = SimpleNamespace(model_type="qwen2")
    outer = SimpleNamespace(model_type="got_ocr2", get_text_config=lambda: text)
    refusal = native_refusal(SimpleNamespace(config=outer), 16)
    assert refusal is not None
    assert "got_ocr2" in refusal


def test_the_library_is_kept_where_the_settings_say(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "native"
    folder.mkdir(mode=0o700)
    shutil.copy(library_path(), folder)
    settings = EngineSettings(dtype="bfloat16", native_folder=folder)
    assert load_base(base, settings).native is not None
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    foreign.chmod(0o777)
    refused = load_base(base, dataclasses.replace(settings, native_folder=foreign))
    assert refused.native is None
    assert refused.native_refusal is not None
    assert "can be written by others" in refused.native_refusal


def test_kv_blocks_that_the_library_cannot_read_take_the_plain_paths(base: Path) -> None:
    settings = EngineSettings(dtype="bfloat16", kv_block_size=24)
    plain = load_base(base, settings)
    assert plain.native is None
    assert plain.native_refusal == "KV blocks of 24 positions are no multiples of 16"
    with pytest.raises(UnsupportedBase, match="KV blocks of 24"):
        load_base(base, dataclasses.replace(settings, kernels="native"))


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [({"head_dim": 16}, "bfloat16"), ({"head_dim": 32}, "float32"), ({"head_dim": 32}, "float16")],
)
def test_a_base_that_the_library_cannot_run_takes_the_plain_paths(
    tmp_path: Path, overrides: dict[str, Any], dtype: str
) -> None:
    folder = save_tiny_base(tmp_path, "llama", **overrides)
    assert load_base(folder, EngineSettings(dtype=dtype)).native is None
    with pytest.raises(UnsupportedBase, match="native kernels"):
        load_base(folder, EngineSettings(dtype=dtype, kernels="native"))
