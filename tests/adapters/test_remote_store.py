"""A store elsewhere with copies here: the same promises as a folder, and outages between."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.disk_cache import DiskCache
from quickchange_adapters.errors import (
    BlobDamaged,
    BlobMissing,
    BlobTooLarge,
    StoreRefused,
    StoreUnavailable,
)
from quickchange_adapters.object_blobs import ObjectBlobs, Patience
from quickchange_adapters.publication import finish_deletion, publish_upload
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, FileRecord, NewVersion
from quickchange_adapters.remote_store import RemoteStore
from quickchange_adapters.store import StagedFile
from quickchange_adapters.store_check import StoreCheck

from tests.s3_server import FaultyProxy, S3Server

PATIENCE = Patience(
    max_attempts=3, pause_s=0.01, give_up_s=60, connect_s=30, reply_s=60, delete_s=60
)
DATA = bytes(range(256)) * 200
SHA256 = hashlib.sha256(DATA).hexdigest()
CEILING = 1 << 20


def open_store(url: str, folder: Path) -> RemoteStore:
    blobs = ObjectBlobs(url, PATIENCE)
    return RemoteStore(blobs, DiskCache(folder, CEILING, blobs))


@pytest.fixture
def url(s3_server: S3Server, s3_proxy: FaultyProxy) -> str:
    return f"s3://{s3_server.create_bucket()}/adapters"


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[RemoteStore]:
    store = open_store(url, tmp_path / "cache")
    yield store
    store.close()


@pytest.fixture
def other(url: str, tmp_path: Path) -> Iterator[RemoteStore]:
    """The same store as another machine sees it: with a cache of its own."""
    store = open_store(url, tmp_path / "other")
    yield store
    store.close()


def stage(store: RemoteStore, data: bytes = DATA) -> StagedFile:
    with store.stage(1 << 30) as writer:
        writer.write(data)
        return writer.finish()


def read(store: RemoteStore, sha256: str = SHA256) -> bytes:
    with store.lease(sha256) as path:
        return path.read_bytes()


def incoming(folder: Path) -> list[Path]:
    return list((folder / "incoming").iterdir())


def test_what_was_put_here_is_read_there(
    store: RemoteStore, other: RemoteStore, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    with pytest.raises(BlobMissing), store.lease(SHA256):
        pass
    store.put(stage(store))
    assert incoming(tmp_path / "cache") == []
    num_gets = s3_proxy.seen["GET"]
    assert (store.is_on_disk(SHA256), other.is_on_disk(SHA256)) == (True, False)
    assert read(store) == DATA
    assert s3_proxy.seen["GET"] == num_gets
    assert read(other) == read(other) == DATA
    assert s3_proxy.seen["GET"] == num_gets + 1
    assert other.is_on_disk(SHA256)
    assert [blob.sha256 for blob in other.list()] == [SHA256]


def test_a_delete_says_what_the_store_and_this_machine_got_back(
    store: RemoteStore, other: RemoteStore
) -> None:
    store.put(stage(store))
    read(other)
    assert store.evict(SHA256) == len(DATA)
    assert store.evict(SHA256) == 0
    assert store.delete(SHA256) == len(DATA)
    assert store.delete(SHA256) == 0
    assert list(store.list()) == []
    with pytest.raises(BlobMissing), store.lease(SHA256):
        pass


def test_an_upload_that_breaks_leaves_nothing_here_or_there(
    store: RemoteStore, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    s3_proxy.fail("PUT", "half_request", times=20)
    staged = stage(store)
    with pytest.raises(StoreUnavailable):
        store.put(staged)
    assert not store.is_up
    store.discard(staged)
    s3_proxy.heal()
    assert list(store.list()) == []
    assert store.is_up
    assert incoming(tmp_path / "cache") == []
    assert not store.is_on_disk(SHA256)


def test_what_is_on_the_disk_is_served_while_the_store_is_away(
    store: RemoteStore, s3_proxy: FaultyProxy
) -> None:
    store.put(stage(store))
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        s3_proxy.fail(method, "503", times=50)
    assert read(store) == DATA
    for call in (
        lambda: store.put(stage(store, b"other")),
        lambda: read(store, "0" * 64),
        lambda: store.delete(SHA256),
        lambda: list(store.list()),
        store.check_writable,
    ):
        with pytest.raises(StoreUnavailable, match="the object store does not answer") as caught:
            call()
        assert "127.0.0.1" not in str(caught.value)


def damage(s3_server: S3Server, url: str, sha256: str, num_bytes: int) -> None:
    s3_server.write(f"{url.removeprefix('s3://')}/blobs/{sha256[:2]}/{sha256}", b"?" * num_bytes)


def test_bytes_that_came_wrong_are_fetched_again(
    store: RemoteStore, other: RemoteStore, s3_proxy: FaultyProxy
) -> None:
    store.put(stage(store))
    num_gets = s3_proxy.seen["GET"]
    s3_proxy.fail("GET", "wrong_bytes")
    assert read(other) == DATA
    assert s3_proxy.seen["GET"] == num_gets + 2


def test_a_damaged_blob_is_never_read_and_the_same_upload_heals_it(
    store: RemoteStore, s3_server: S3Server, url: str, tmp_path: Path
) -> None:
    store.put(stage(store))
    store.evict(SHA256)
    damage(s3_server, url, SHA256, len(DATA))
    for _ in range(2):
        with pytest.raises(BlobDamaged, match=SHA256):
            read(store)
    assert incoming(tmp_path / "cache") == []
    store.put(stage(store))
    store.evict(SHA256)
    assert read(store) == DATA


def test_an_upload_above_the_caches_ceiling_is_too_large(
    store: RemoteStore, tmp_path: Path
) -> None:
    with store.stage(1 << 30) as writer, pytest.raises(BlobTooLarge) as caught:
        writer.write(bytes(CEILING + 1))
    assert caught.value.max_bytes == CEILING
    assert incoming(tmp_path / "cache") == []


def test_a_place_that_is_not_ours_is_refused_at_once(s3_proxy: FaultyProxy, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/adapters", tmp_path / "cache")
    with pytest.raises(StoreRefused, match="no such bucket"):
        store.check_writable()
    store.close()


def test_fsck_finds_what_is_lost_or_damaged(
    store: RemoteStore, other: RemoteStore, s3_server: S3Server, url: str, tmp_path: Path
) -> None:
    catalog = Catalog(sqlite_url(tmp_path / "catalog.db"))
    for name, data in (("a", b"first"), ("b", b"second"), ("c", b"third")):
        publish(catalog, store, name, data)
    assert StoreCheck(other, catalog).run().findings == ()
    lost, damaged = (hashlib.sha256(data).hexdigest() for data in (b"first", b"second"))
    store.delete(lost)
    damage(s3_server, url, damaged, len(b"second"))
    found = {each.code: each.where for each in StoreCheck(other, catalog).run().findings}
    assert found == {"blob_missing": lost, "blob_damaged": damaged}
    assert not list((tmp_path / "other" / "blobs").glob("??/*"))
    catalog.close()


def publish(catalog: Catalog, store: RemoteStore, name: str, data: bytes) -> str:
    staged = [stage(store, b"config of " + data), stage(store, data)]
    files = tuple(
        FileRecord(file, each.sha256, each.num_bytes)
        for file, each in zip((CONFIG_FILE, WEIGHTS_FILE), staged, strict=True)
    )
    new = NewVersion(name, files, "tiny", "b" * 64, (4,), ("q_proj",), {}, upload_id=name)
    publish_upload(catalog, store, new, staged)
    return staged[1].sha256


UPLOADER = """
import sys
from pathlib import Path
from quickchange_adapters.catalog import Catalog, sqlite_url
from tests.adapters.test_remote_store import finish_deletion, open_store, publish

root, start = Path(sys.argv[1]), int(sys.argv[3])
store, catalog = open_store(sys.argv[2], root / "cache"), Catalog(sqlite_url(root / "catalog.db"))
print("ready", flush=True)
for n in range(start, start + 1000):
    print("put", n, publish(catalog, store, f"a{n}", f"{n} ".encode() * 5000), flush=True)
    if n % 3 == 2:
        finish_deletion(catalog, store, catalog.begin_delete_adapter(f"a{n - 1}"))
        print("gone", n - 1, flush=True)
"""


def run_and_kill(root: Path, url: str, start: int, num_lines: int, delay_s: float) -> list[str]:
    command = [sys.executable, "-c", UPLOADER, str(root), url, str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(num_lines + 1)]
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    return [line.strip() for line in lines]


def test_what_was_acknowledged_survives_sigkill_and_nothing_is_half_there(
    url: str, tmp_path: Path
) -> None:
    kept: dict[int, str] = {}
    start = 0
    for round_number, num_lines in enumerate((2, 6, 8)):
        for line in run_and_kill(tmp_path, url, start, num_lines, round_number * 0.005):
            word, *rest = line.split()
            if word == "put":
                kept[int(rest[0])] = rest[1]
                start = 3 * (int(rest[0]) // 3) + 6
            elif word == "gone":
                del kept[int(rest[0])]
    store = open_store(url, tmp_path / "cache")
    assert incoming(tmp_path / "cache") == []
    catalog = Catalog(sqlite_url(tmp_path / "catalog.db"), lambda: time.time() + 1e6)
    finish_deletion(catalog, store, catalog.list_deleting())
    found = {adapter.name: adapter.versions[0] for adapter in catalog.list_adapters()}
    assert len(kept) >= 8
    # What was being deleted when the process died may be gone without having been said so.
    missing = [n for n in kept if f"a{n}" not in found]
    assert all(n % 3 == 1 for n in missing)
    assert len(missing) <= 4
    named = {file.sha256 for version in found.values() for file in version.files}
    for sha256 in named:
        assert hashlib.sha256(read(store, sha256)).hexdigest() == sha256
    assert {blob.sha256 for blob in store.list()} == named
    catalog.close()
    store.close()
