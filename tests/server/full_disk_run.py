"""Uploads onto a real file system that has room for so many pages and no more.

Run as root, or as root of a namespace of its own, in a process without torch:

    unshare --user --map-root-user --mount python -m tests.server.full_disk_run FOLDER

Mounts a small file system in memory on FOLDER, and prints as JSON what the uploads were told, and
what a start says once the file system is read-only.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from quickchange_adapters.errors import StoreFull
from quickchange_adapters.store_check import StoreCheck
from quickchange_server.config import ServerConfig
from quickchange_server.errors import CannotStart
from quickchange_server.storage import open_storage

from tests.adapters.crash_model import NUM_CONTENTS, Model, Operation, shown_by
from tests.adapters.crash_run import World, blobs_of

SIZE = "2m"
PAGE_BYTES = 4096
MAX_FREE_PAGES = 32


def mount(folder: Path, *options: str) -> None:
    words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    subprocess.run(words, check=True)


def fill(folder: Path, free_pages: int) -> Path:
    """Leave that much room and no more; return the file that takes the rest."""
    ballast = folder / "ballast"
    free = os.statvfs(folder)
    num_bytes = free.f_bavail * free.f_frsize - free_pages * PAGE_BYTES
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
    return ballast


def try_upload(root: Path, free_pages: int) -> str | None:
    """Upload with that much room, and again with enough; return what the first was told."""
    world, model = World(root), Model()
    kept = Operation("upload", "ada", 0)
    world.do(kept)
    model.apply(kept)
    ballast = fill(root.parent, free_pages)
    new, told = Operation("upload", "bob", 1 + free_pages % (NUM_CONTENTS - 1)), None
    try:
        world.do(new)
    except StoreFull as error:
        told = str(error)
    check(world, model if told else model.after(new))
    ballast.unlink()
    world.do(new)
    check(world, model.after(new))
    world.catalog.close()
    return told


def check(world: World, model: Model) -> None:
    """Hold that what is shown is whole, and that nothing is left beside it but leftovers."""
    adapters = world.catalog.list_adapters()
    assert shown_by(adapters) == model.shown()
    assert list((world.root / "incoming").iterdir()) == []
    report = StoreCheck(world.store, world.catalog).run()
    assert {finding.code for finding in report.findings} <= {"blob_unused"}, report
    assert blobs_of(adapters) <= {blob.sha256 for blob in world.store.list()}


def uploads(folder: Path) -> Iterator[str | None]:
    for free_pages in range(MAX_FREE_PAGES):
        root = folder / "store"
        yield try_upload(root, free_pages)
        shutil.rmtree(root)


def start_read_only(folder: Path) -> str:
    """Return what a start says about a store that was made read-only."""
    World(folder / "store").catalog.close()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        open_storage(ServerConfig(store=folder / "store"))
    except CannotStart as error:
        return str(error)
    return "it started"


def main(folder: Path) -> dict[str, object]:
    """Do all of it."""
    mount(folder, f"size={SIZE}")
    try:
        told = list(uploads(folder))
        return {"told": told, "read_only": start_read_only(folder)}
    finally:
        subprocess.run(["umount", str(folder)], check=False)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
