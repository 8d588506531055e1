"""What a store in a folder asks of the file system, one method for each way of writing.

A rename is atomic, but neither the file's bytes nor its new name are on the disk before the file
and the folder were synced. Who calls decides on the order; a test that passes another `Disk` sees
it, or makes a call fail. Knows nothing of blobs.
"""

import os
from pathlib import Path
from typing import BinaryIO


class Disk:
    """The operating system's calls, unchanged. Every method may raise OSError."""

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing."""
        return path.open("xb")

    def write(self, file: BinaryIO, chunk: bytes) -> None:
        """Append bytes."""
        file.write(chunk)

    def sync_file(self, file: BinaryIO) -> None:
        """Bring a file's bytes to the disk."""
        file.flush()
        os.fsync(file.fileno())

    def make_folder(self, folder: Path) -> None:
        """Make a folder, unless it is there."""
        folder.mkdir(exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of what had that name."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file.

        Raises: FileNotFoundError.
        """
        path.unlink()

    def sync_folder(self, folder: Path) -> None:
        """Bring a folder's entries to the disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
