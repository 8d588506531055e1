"""Finding an adapter's files before anything is sent."""

from pathlib import Path

import pytest
from quickchange_client.adapter_folder import AdapterFolder
from quickchange_client.errors import FolderInvalid


def test_the_files_are_found(adapter_folder: Path) -> None:
    found = AdapterFolder.find(adapter_folder)
    assert found.config.name == "adapter_config.json"
    assert found.weights.name == "adapter_model.safetensors"
    assert found.task is None


def test_a_task_goes_along(adapter_folder: Path) -> None:
    (adapter_folder / "task.json").write_text("{}")
    assert AdapterFolder.find(str(adapter_folder)).task == adapter_folder / "task.json"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderInvalid, match="nowhere"):
        AdapterFolder.find(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter_folder: Path, name: str) -> None:
    (adapter_folder / name).unlink()
    with pytest.raises(FolderInvalid, match=name):
        AdapterFolder.find(adapter_folder)


def test_pickled_weights_are_not_sent(adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(FolderInvalid, match="never uploaded"):
        AdapterFolder.find(adapter_folder)


def test_the_subfolder_that_was_meant_is_named(adapter_folder: Path) -> None:
    with pytest.raises(FolderInvalid, match=r"did you mean .*'adapter'"):
        AdapterFolder.find(adapter_folder.parent)
