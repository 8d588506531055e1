"""What a path may name: folders under the roots, whatever links and races say."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from quickchange_server.errors import CannotStart, InvalidRequest, NotFound
from quickchange_server.lora_roots import FolderFile, LoraRoots
from quickchange_server.serving import check_lora_roots

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_folder(folder: Path, mark: str = "mine", task: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f"config {mark}")
    (folder / WEIGHTS).write_text(f"weights {mark}")
    if task is not None:
        (folder / "task.json").write_text(task)
    return folder


async def bytes_of(file: FolderFile) -> bytes:
    return b"".join([chunk async for chunk in file.chunks()])


async def contents(roots: LoraRoots, path: str) -> dict[str, str]:
    files = roots.open_adapter(path)
    try:
        return {str(name): (await bytes_of(file)).decode() for name, file in files.items()}
    finally:
        for file in files.values():
            file.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "root" / "ada").parent


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "outside" / "secret", "theirs")


@pytest.mark.parametrize("spell", [str, lambda path: path.name, lambda path: f"{path}/../ada/"])
async def test_a_folder_is_named_from_the_root_or_whole(
    root: Path, spell: Callable[[Path], str]
) -> None:
    found = await contents(LoraRoots([root]), spell(root / "ada"))
    assert found == {CONFIG: "config mine", WEIGHTS: "weights mine"}


async def test_the_task_comes_along_and_others_do_not(root: Path) -> None:
    folder = make_folder(root / "bob", task="{}")
    (folder / "adapter_model.bin").write_text("pickle")
    assert set(await contents(LoraRoots([root]), "bob")) == {CONFIG, WEIGHTS, "task.json"}


async def test_each_root_is_looked_at_in_turn(root: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other" / "bob", "other").parent
    roots = LoraRoots([root, other])
    assert (await contents(roots, "bob"))[CONFIG] == "config other"
    assert (await contents(roots, str(root / "ada")))[CONFIG] == "config mine"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("form", ["{path}", "../outside/{name}", "ada/../../outside/{name}"])
def test_a_path_outside_is_refused_be_it_there_or_not(
    root: Path, outside: Path, form: str, there: bool
) -> None:
    target = outside if there else outside.with_name("nothing")
    path = form.format(path=target, name=target.name)
    with pytest.raises(InvalidRequest) as refused:
        LoraRoots([root]).open_adapter(path)
    assert refused.value.message.replace(path, "PATH").count("PATH") == 1
    assert "outside" not in refused.value.message.replace(repr(path), "")


def test_links_that_lead_outside_are_refused(root: Path, outside: Path) -> None:
    roots = LoraRoots([root])
    (root / "link").symlink_to(outside)
    with pytest.raises(InvalidRequest):
        roots.open_adapter("link")
    (root / "ada" / WEIGHTS).unlink()
    (root / "ada" / WEIGHTS).symlink_to(outside / WEIGHTS)
    with pytest.raises(NotFound):
        roots.open_adapter("ada")


async def test_links_inside_are_followed_as_a_hub_s_cache_needs(root: Path) -> None:
    blobs = make_folder(root / "blobs", "blob")
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (root / "latest").symlink_to(snapshot)
    found = await contents(LoraRoots([root]), "latest")
    assert found == {name: (blobs / name).read_text() for name in (CONFIG, WEIGHTS)}


def test_a_link_that_is_put_there_after_the_look_is_not_followed(root: Path, outside: Path) -> None:
    folder = root / "ada"

    def look_then_swap(path: Path) -> str:
        found = os.path.realpath(path)
        if path.name == WEIGHTS:
            folder.rename(root / "away")
            folder.symlink_to(outside)
        return found

    with pytest.raises(NotFound):
        LoraRoots([root], look_then_swap).open_adapter("ada")
    assert (folder / WEIGHTS).read_text() == "weights theirs"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_regular_file_is_not_waited_for(root: Path, name: str) -> None:
    (root / "ada" / name).unlink()
    os.mkfifo(root / "ada" / name)
    with pytest.raises(NotFound):
        LoraRoots([root]).open_adapter("ada")


@pytest.mark.parametrize("path", ["nobody", "ada/" + CONFIG, "x" * 300, "loop"])
def test_what_is_no_adapter_is_not_found(root: Path, path: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(NotFound, match="No adapter found"):
        LoraRoots([root]).open_adapter(path)


def test_a_path_with_a_nul_is_outside(root: Path) -> None:
    with pytest.raises(InvalidRequest):
        LoraRoots([root]).open_adapter("ada\0")


def test_a_failed_open_leaves_no_descriptor(root: Path) -> None:
    (root / "ada" / WEIGHTS).unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotFound):
        LoraRoots([root]).open_adapter("ada")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_root_that_is_no_folder_ends_the_start(root: Path) -> None:
    check_lora_roots([root])
    with pytest.raises(CannotStart, match="there is no such folder"):
        check_lora_roots([root, root / "ada" / CONFIG])


async def test_one_name_is_loaded_by_one_caller_at_a_time() -> None:
    roots = LoraRoots()
    async with roots.loading("a", "x"):
        assert roots.loading("a", "x").locked()
        assert not roots.loading("b", "x").locked()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(roots.loading("a", "x").acquire(), 0.01)
