"""Writes a model as a Hugging Face folder: weights, configs, tokenizer; all of it or nothing."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quickchange_server.errors import CannotWrite
from quickchange_server.new_folder import new_folder

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
)
SPARE_BYTES = 64 << 20
POLL_S = 0.1
OnBytes = Callable[[int, int], None]
"""Called with how many bytes are written, and how many there will be."""


def write_folder(
    model: Any, base: Path, folder: Path, task: Path | None, on_bytes: OnBytes, *, is_forced: bool
) -> int:
    """Write a model with the base's other files, and the adapter's task; return its bytes.

    Raises: CannotWrite.
    """
    needed = num_weight_bytes(model)
    _check_room(folder, needed)
    with new_folder(folder, is_forced=is_forced) as unfinished:
        _save(model, unfinished, needed, on_bytes)
        for file in base.iterdir():
            if _is_copied(file) and not (unfinished / file.name).exists():
                shutil.copyfile(file, unfinished / file.name)
        if task is not None:
            shutil.copyfile(task, unfinished / task.name)
        return _size_of(unfinished)


def num_weight_bytes(model: Any) -> int:
    """Return the bytes of a model's tensors, those that are tied once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def _check_room(folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise CannotWrite(f"{folder} cannot be written: {error.strerror}") from error
    if free < needed + SPARE_BYTES:
        raise CannotWrite(
            f"{folder} needs {needed >> 20} MiB and some, and the disk has {free >> 20} MiB free: "
            "make room, or choose another place"
        )


def _save(model: Any, folder: Path, needed: int, on_bytes: OnBytes) -> None:
    """Save the weights and configs, and tell how far it is meanwhile."""
    is_saved = threading.Event()

    def watch() -> None:
        while not is_saved.wait(POLL_S):
            on_bytes(min(_size_of(folder), needed), needed)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        model.save_pretrained(str(folder))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        is_saved.set()
        watcher.join()
    on_bytes(needed, needed)


def _is_copied(file: Path) -> bool:
    """Whether a file of the base belongs to a merged model too: all but weights and their index."""
    is_index = file.name.endswith(".index.json")
    is_weight = file.suffix in WEIGHT_SUFFIXES or is_index
    return file.is_file() and not is_weight and not file.name.startswith(".")


def _size_of(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed in this moment
            continue
    return total
