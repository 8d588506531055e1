"""Bytes under their sha256: durable once put, gone once deleted, and nothing between."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quickchange_adapters.errors import BlobMissing, BlobTooLarge, StoreUnavailable
from quickchange_adapters.store import LocalStore, StagedFile

DATA = b"0123456789" * 100
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def stage(store: LocalStore, data: bytes = DATA) -> StagedFile:
    with store.stage(1 << 20) as writer:
        for start in range(0, len(data), 7):
            writer.write(data[start : start + 7])
        return writer.finish()


def incoming(store: LocalStore, tmp_path: Path) -> list[Path]:
    return list((tmp_path / "store" / "incoming").iterdir())


def test_put_bytes_are_read_back_under_their_digest(store: LocalStore, tmp_path: Path) -> None:
    staged = stage(store)
    assert (staged.sha256, staged.num_bytes) == (SHA256, len(DATA))
    with pytest.raises(BlobMissing):
        store.path(SHA256)
    store.put(staged)
    assert store.path(SHA256).read_bytes() == DATA
    assert store.path(SHA256) == tmp_path / "store" / "blobs" / SHA256[:2] / SHA256
    assert incoming(store, tmp_path) == []
    assert LocalStore(tmp_path / "store").path(SHA256).read_bytes() == DATA


def test_the_same_bytes_are_kept_once(store: LocalStore, tmp_path: Path) -> None:
    first, second = stage(store), stage(store)
    store.put(first)
    store.put(second)
    store.put(second)
    assert [(blob.sha256, blob.num_bytes) for blob in store.list()] == [(SHA256, len(DATA))]
    assert incoming(store, tmp_path) == []


def test_delete_says_how_much_it_freed(store: LocalStore) -> None:
    store.put(stage(store))
    assert store.delete(SHA256) == len(DATA)
    assert store.delete(SHA256) == 0
    assert list(store.list()) == []
    with pytest.raises(BlobMissing):
        store.path(SHA256)


def test_too_many_bytes_leave_nothing(store: LocalStore, tmp_path: Path) -> None:
    with store.stage(10) as writer:
        writer.write(b"x" * 10)
        assert len(incoming(store, tmp_path)) == 1
        with pytest.raises(BlobTooLarge):
            writer.write(b"x")
    assert incoming(store, tmp_path) == []


def test_a_writer_that_was_left_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    with store.stage(10) as writer:
        writer.write(b"half")
    assert incoming(store, tmp_path) == []


def test_discard_may_be_repeated(store: LocalStore, tmp_path: Path) -> None:
    staged = stage(store)
    store.discard(staged)
    store.discard(staged)
    assert incoming(store, tmp_path) == []


def test_the_sweep_takes_what_is_old_and_spares_what_is_new(
    store: LocalStore, tmp_path: Path
) -> None:
    held, old, new = (stage(store, text) for text in (b"held", b"old", b"new"))
    for each in (held, old):
        os.utime(each.path, (time.time() - 3600,) * 2)
    assert old.file is not None
    old.file.close()  # as when its process has ended
    assert store.list_incoming(older_than_s=1800) == (old.path,)
    assert store.sweep_incoming(older_than_s=1800) == 1
    assert set(incoming(store, tmp_path)) == {held.path, new.path}


def test_putting_bytes_again_heals_a_damaged_blob(store: LocalStore, tmp_path: Path) -> None:
    store.put(stage(store))
    for damage in (DATA[:-1], DATA[:-1] + b"?", b""):
        store.path(SHA256).write_bytes(damage)
        store.put(stage(store))
        assert store.path(SHA256).read_bytes() == DATA
    store.path(SHA256).write_bytes(b"evidence")
    assert store.set_aside(SHA256).read_bytes() == b"evidence"
    with pytest.raises(BlobMissing):
        store.path(SHA256)
    store.put(stage(store))
    assert store.path(SHA256).read_bytes() == DATA


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "AB" * 32, SHA256 + "\n", SHA256[:-1]])
def test_only_a_digest_is_a_name(store: LocalStore, name: str) -> None:
    with pytest.raises(BlobMissing):
        store.path(name)
    with pytest.raises(BlobMissing):
        store.delete(name)


def test_a_place_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreUnavailable) as caught:
        LocalStore(tmp_path / "file" / "store")
    assert str(tmp_path) not in str(caught.value)


def test_a_put_whose_bytes_are_gone_is_an_error(store: LocalStore) -> None:
    staged = stage(store)
    staged.path.unlink()
    with pytest.raises(StoreUnavailable):
        store.put(staged)
    assert list(store.list()) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.store import LocalStore

store = LocalStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for num_chunks in (1, 20):
    try:
        with store.stage(1 << 20) as writer:
            for _ in range(num_chunks):
                writer.write(bytes(5000))
            writer.finish()
    except StoreUnavailable as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    # The limit stands in for a full disk: writes beyond it fail, at once or when flushed.
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["an upload cannot be written: File too large"] * 2
    assert incoming(store, tmp_path) == []
