"""A disk that does what it is told, and knows what a power cut would leave of it."""

from pathlib import Path
from typing import BinaryIO

from quickchange_adapters.disk import Disk


class RecordingDisk(Disk):
    """Notes each call after it was done, and keeps two pictures of the folders.

    A name is in `on_disk` once its folder was synced after it was made or changed; a file's bytes
    are safe once the file was synced after its last write. `calls` has names relative to `root`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, ...]] = []
        self.names: dict[Path, str] = {}
        self.on_disk: dict[Path, str] = {}
        self.unsafe: set[str] = set()

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        self._note("create", path)
        self.names[path] = str(path)
        self.unsafe.add(str(path))
        return file

    def write(self, file: BinaryIO, chunk: bytes) -> None:
        super().write(file, chunk)
        self._note("write", Path(file.name))
        self.unsafe.add(file.name)

    def sync_file(self, file: BinaryIO) -> None:
        super().sync_file(file)
        self._note("sync_file", Path(file.name))
        self.unsafe.discard(file.name)

    def make_folder(self, folder: Path) -> None:
        super().make_folder(folder)
        self._note("make_folder", folder)
        self.names[folder] = "folder"

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note("rename", source, target)
        self.names[target] = self.names.pop(source)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note("remove", path)
        del self.names[path]

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self._note("sync_folder", folder)
        kept = {path: file for path, file in self.on_disk.items() if path.parent != folder}
        self.on_disk = kept | {p: file for p, file in self.names.items() if p.parent == folder}

    def survives(self, path: Path) -> bool:
        """Whether a power cut now would leave this file whole, reached from the root's parent."""
        file = self.on_disk.get(path)
        folders = [each for each in path.parents if each.is_relative_to(self.root)]
        return (
            file is not None
            and file not in self.unsafe
            and all(self.on_disk.get(folder) == "folder" for folder in folders)
        )

    def _note(self, call: str, *paths: Path) -> None:
        self.calls.append((call, *(str(path.relative_to(self.root.parent)) for path in paths)))
