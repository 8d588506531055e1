"""`export`: what PEFT's `merge_and_unload` gives, in a folder that is there whole or not at all."""

import asyncio
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_server.api.app import create_app
from quickchange_server.cli import app
from quickchange_server.errors import CannotWrite
from quickchange_server.merged_folder import write_folder
from quickchange_server.merged_model import load_model
from quickchange_server.new_folder import new_folder
from typer.testing import CliRunner, Result

from tests.conftest import LLAMA_LINEARS, MakeAdapter, save_peft_adapter, save_tiny_base
from tests.server.real_services import real_services
from tests.server.socket_server import serve_on_socket
from tests.server.test_api_adapters import push

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
PROMPT = torch.tensor([[5, 9, 30, 77, 120, 6]])


def export(adapter: Path | str, out: Path, base: Path, *words: str) -> Result:
    return runner.invoke(
        app, ["export", str(adapter), "--merged", str(out), "--model", str(base), *words]
    )


def exported(adapter: Path, out: Path, base: Path, *words: str) -> Any:
    """Export, and load what came out as anybody would."""
    from transformers import AutoModelForCausalLM

    done = export(adapter, out, base, *words)
    assert done.exit_code == 0, done.output
    return AutoModelForCausalLM.from_pretrained(str(out), dtype="auto").eval()


def merged_by_peft(adapter: Path, base: Path, dtype: torch.dtype = torch.float32) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(PROMPT).logits
    return logits


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": list(LLAMA_LINEARS), "use_rslora": True},
    {"r": 16, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"o_proj": 3}},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_tensors_and_logits_are_those_of_merge_and_unload(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = make_adapter(**config)
    ours, theirs = (
        exported(adapter, tmp_path / "out", tiny_base),
        merged_by_peft(adapter, tiny_base),
    )
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=1e-4, rtol=0)
    unmerged = load_model(tiny_base, "auto")
    assert (logits_of(ours) - logits_of(unmerged)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "phi3"])
def test_other_families_too(tmp_path: Path, model_type: str) -> None:
    """GPT-2 keeps its weights the other way round, some of them square; Qwen2 has biases."""
    base = save_tiny_base(tmp_path / "base", model_type)
    adapter = save_peft_adapter(tmp_path / "adapter", base, r=4, target_modules="all-linear")
    ours, theirs = exported(adapter, tmp_path / "out", base), merged_by_peft(adapter, base)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=1e-4, rtol=0)


def test_biases_of_an_adapter_are_in_the_folder(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "qwen2")
    config: dict[str, Any] = {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}
    adapter = save_peft_adapter(tmp_path / "adapter", base, **config)
    ours, theirs = exported(adapter, tmp_path / "out", base), merged_by_peft(adapter, base)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), atol=1e-4, rtol=0)


def test_a_bias_that_no_such_model_can_hold_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(lora_bias=True, target_modules=["q_proj"])
    done = export(adapter, tmp_path / "out", tiny_base)
    assert (done.exit_code, "models of this family have none there" in done.stderr) == (1, True)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_head_and_embedding_are_parted_where_one_of_them_changes(
    tiny_base: Path, tmp_path: Path, target: str
) -> None:
    """The model answers as the adapter does unmerged: the other one stays the base's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = save_peft_adapter(tmp_path / "adapter", tiny_base, target_modules=[target])
    ours = exported(adapter, tmp_path / "out", tiny_base)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(base, str(adapter)).eval()
    torch.testing.assert_close(logits_of(ours), logits_of(unmerged), atol=1e-4, rtol=0)


def test_a_half_precision_base_is_rounded_once(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(r=8)
    ours = exported(adapter, tmp_path / "out", tiny_base, "--dtype", "bfloat16")
    exact = merged_by_peft(adapter, tiny_base, torch.float32).state_dict()
    base = load_model(tiny_base, "bfloat16").state_dict()
    whole = load_model(tiny_base, "float32").state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        delta = exact[name] - whole[name]
        torch.testing.assert_close(
            tensor, (base[name].float() + delta).bfloat16(), atol=0, rtol=8e-3
        )


def test_the_folder_is_whole_and_nothing_of_ours_is_needed(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    adapter = shutil.copytree(make_adapter(r=4), tmp_path / "adapter")
    (adapter / "task.json").write_text('{"max_tokens": 4}')
    out = tmp_path / "out"
    exported(adapter, out, tiny_base)
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(left_in(out))
    assert {"tokenizer.json", "tokenizer_config.json", "task.json"} <= set(left_in(out))
    ours, base = (AutoTokenizer.from_pretrained(str(folder)) for folder in (out, tiny_base))
    assert ours("naïve café")["input_ids"] == base("naïve café")["input_ids"]
    assert ours.chat_template == base.chat_template
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert left_in(tmp_path) == ["adapter", "out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_what_exists_is_replaced_only_when_that_is_asked_for_and_it_is_a_model(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, out = make_adapter(r=4), tmp_path / "out"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    assert export(adapter, out, tiny_base).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    again = export(make_adapter(r=8), out, tiny_base)
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    assert (out / "model.safetensors").read_bytes() == before
    assert export(make_adapter(r=8), out, tiny_base, "--force").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != before
    never = export(adapter, precious, tiny_base, "--force")
    assert (never.exit_code, "not even --force" in never.stderr) == (1, True)
    assert (precious / "thesis.tex").read_text() == "years"
    assert left_in(tmp_path) == ["out", "precious"]


def test_a_disk_that_fills_while_it_is_written_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(CannotWrite, match="No space left on device"),
        new_folder(out, is_forced=True) as unfinished,
    ):
        fill(unfinished)
    assert left_in(tmp_path) == ["out"]
    assert left_in(out) == ["config.json"]


def test_a_stop_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out") as unfinished:
            (unfinished / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert left_in(tmp_path) == []


def test_a_file_that_cannot_grow_further_is_one_sentence_and_leaves_nothing(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        done = export(make_adapter(r=4), tmp_path / "out", tiny_base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (done.exit_code, "cannot be written: " in done.stderr) == (1, True)
    assert left_in(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    tiny_base: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_base, "auto")
    model.register_buffer("far", torch.empty(1 << 48, device="meta"))
    with pytest.raises(CannotWrite, match="MiB free"):
        write_folder(model, tiny_base, tmp_path / "out", None, lambda *_: None, is_forced=False)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "does not fit"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "pickles are not read"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: shutil.rmtree(folder), "no server answers"),
    ],
)
def test_what_is_no_adapter_is_one_sentence(
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    sentence: str,
) -> None:
    adapter = shutil.copytree(make_adapter(r=4), tmp_path / "adapter")
    spoil(adapter)
    done = export(adapter, tmp_path / "out", tiny_base, "--url", "http://127.0.0.1:9")
    assert (done.exit_code, sentence in done.stderr) == (1, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    done = export(make_adapter(r=4), tmp_path / "out", base)
    assert (done.exit_code, "quantised" in done.stderr) == (1, True)


async def test_an_adapter_is_fetched_from_a_running_server_by_any_of_its_names(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    first, second = make_adapter(seed=1), make_adapter(seed=2)
    app = create_app(real_services(tiny_base, tmp_path))
    async with serve_on_socket(app) as client:
        for folder in (first, second):
            assert (await push(client, folder)).status_code == 201
        url = str(client.base_url)
        for name in ("ada", "ada:2", "nobody", "tiny"):
            out = tmp_path / name.replace(":", "-")
            done = await asyncio.to_thread(export, name, out, tiny_base, "--url", url)
            assert (done.exit_code, name) == (0 if "ada" in name else 1, name), done.output
            assert out.exists() == ("ada" in name)
    assert "is the base" in done.stderr
    for name, folder in (("ada", first), ("ada-2", second)):
        theirs = merged_by_peft(folder, tiny_base)
        torch.testing.assert_close(
            logits_of(load_model(tmp_path / name, "auto")), logits_of(theirs), atol=1e-4, rtol=0
        )


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from quickchange_server.export_command import export; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    help_text = runner.invoke(app, ["export", "--help"]).output
    assert "quickchange export sentiment --merged" in help_text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
