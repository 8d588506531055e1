"""Copies under a ceiling: fetched once, kept while they are read, believed only if right."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from quickchange_adapters.disk_cache import DiskCache
from quickchange_adapters.errors import BlobMissing, BlobTooLarge, StoreFull, StoreUnavailable

KIB = 1 << 10


class Source:
    """Blobs in memory: 1 KiB each, by a letter. `gate` holds reads back, `wrong` spoils them."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.suspects: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.wrong = 0
        self.is_down = False
        self._data: dict[str, bytes] = {}

    def add(self, letter: str, num_bytes: int = KIB) -> str:
        data = letter.encode() * num_bytes
        sha256 = hashlib.sha256(data).hexdigest()
        self._data[sha256] = data
        return sha256

    def size(self, sha256: str) -> int:
        if self.is_down:
            raise StoreUnavailable("the source is down")
        if sha256 not in self._data:
            raise BlobMissing(sha256)
        return len(self._data[sha256])

    def read(self, sha256: str, num_bytes: int) -> Iterator[bytes]:
        self.reads.append(sha256)
        data = self._data[sha256][:num_bytes]
        if self.wrong:
            self.wrong -= 1
            data = b"?" * num_bytes
        yield data[:100]
        assert self.gate.wait(30)
        yield data[100:]

    def suspect(self, sha256: str) -> None:
        self.suspects.append(sha256)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(tmp_path: Path, source: Source) -> Iterator[DiskCache]:
    cache = DiskCache(tmp_path / "cache", 3 * KIB, source, room_s=0.1)
    yield cache
    cache.close()


def read(cache: DiskCache, sha256: str) -> bytes:
    with cache.lease(sha256) as path:
        return path.read_bytes()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("blobs/??/*")}


def incoming(folder: Path) -> list[Path]:
    return list((folder / "incoming").iterdir())


def test_a_blob_is_fetched_once_and_read_from_the_disk(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    assert not cache.holds(a)
    assert read(cache, a) == read(cache, a) == b"a" * KIB
    assert source.reads == [a]
    assert cache.holds(a)
    assert (cache.num_bytes, files(tmp_path / "cache")) == (KIB, {a})


def test_many_that_want_one_blob_wait_for_one_fetch(cache: DiskCache, source: Source) -> None:
    a = source.add("a")
    source.gate.clear()
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(read, cache, a) for _ in range(8)]
        time.sleep(0.05)
        assert not cache.holds(a)
        source.gate.set()
        assert [each.result(30) for each in waiting] == [b"a" * KIB] * 8
    assert source.reads == [a]


def test_the_least_recently_used_goes_first(cache: DiskCache, source: Source) -> None:
    a, b, c, d = (source.add(letter) for letter in "abcd")
    for sha256 in (a, b, c, a, d):
        read(cache, sha256)
    assert [cache.holds(each) for each in (a, b, c, d)] == [True, False, True, True]
    assert cache.num_bytes == 3 * KIB


def test_what_is_being_read_stays(cache: DiskCache, source: Source) -> None:
    a, b, c, d = (source.add(letter) for letter in "abcd")
    with cache.lease(a) as path, cache.lease(b):
        for sha256 in (c, d, c, d):
            read(cache, sha256)
        assert path.read_bytes() == b"a" * KIB
        with (
            cache.lease(c),
            pytest.raises(StoreUnavailable, match="--store-cache-bytes"),
            cache.lease(d),
        ):
            pass
    assert read(cache, d) == b"d" * KIB
    assert cache.num_bytes <= 3 * KIB


def test_a_fetch_waits_for_room(tmp_path: Path, source: Source) -> None:
    cache = DiskCache(tmp_path / "cache", KIB, source)
    a, b = source.add("a"), source.add("b")
    with ThreadPoolExecutor(1) as threads:
        with cache.lease(a):
            waiting = threads.submit(read, cache, b)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(30) == b"b" * KIB
    assert not cache.holds(a)
    cache.close()


def test_a_blob_above_the_ceiling_is_refused_and_so_is_its_upload(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    read(cache, source.add("a"))
    with (
        pytest.raises(StoreUnavailable, match="raise --store-cache-bytes"),
        cache.lease(source.add("b", 3 * KIB + 1)),
    ):
        pass
    assert cache.num_bytes == KIB
    with cache.stage(1 << 30) as writer, pytest.raises(BlobTooLarge):
        writer.write(bytes(3 * KIB + 1))
    assert incoming(tmp_path / "cache") == []


def test_bytes_that_came_wrong_are_fetched_again_once(cache: DiskCache, source: Source) -> None:
    a = source.add("a")
    source.wrong = 1
    assert read(cache, a) == b"a" * KIB
    assert source.reads == [a, a]
    assert source.suspects == []


def test_bytes_that_come_wrong_twice_are_never_read(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    source.wrong = 2
    with pytest.raises(StoreUnavailable, match=f"blob {a} is damaged"), cache.lease(a):
        pass
    assert source.suspects == [a]
    assert (cache.num_bytes, files(tmp_path / "cache")) == (0, set())
    assert incoming(tmp_path / "cache") == []
    assert read(cache, a) == b"a" * KIB


def test_a_fetch_that_fails_leaves_nothing_and_may_be_repeated(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    source.is_down = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="down"), cache.lease(a):
            pass
    with pytest.raises(StoreUnavailable), cache.lease("0" * 64):
        pass
    source.is_down = False
    with pytest.raises(BlobMissing), cache.lease("0" * 64):
        pass
    assert cache.num_bytes == 0
    assert read(cache, a) == b"a" * KIB


def test_a_dropped_copy_goes_when_its_last_reader_does(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    read(cache, a)
    with cache.lease(a) as path:
        assert cache.drop(a) == 0
        assert path.read_bytes() == b"a" * KIB
    assert (cache.num_bytes, files(tmp_path / "cache")) == (0, set())
    read(cache, a)
    assert cache.drop(a) == KIB
    assert cache.drop(a) == 0
    assert files(tmp_path / "cache") == set()


def test_an_upload_is_adopted_without_a_fetch(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    for _ in range(2):
        with cache.stage(1 << 20) as writer:
            writer.write(b"a" * KIB)
            cache.adopt(writer.finish())
    assert read(cache, a) == b"a" * KIB
    assert source.reads == []
    assert incoming(tmp_path / "cache") == []
    assert cache.num_bytes == KIB


def test_a_file_that_somebody_removed_is_fetched_again(
    cache: DiskCache, source: Source, tmp_path: Path
) -> None:
    a = source.add("a")
    with cache.lease(a) as path:
        pass
    path.unlink()
    assert read(cache, a) == b"a" * KIB
    assert cache.num_bytes == KIB


def test_what_an_earlier_process_left_counts_and_is_believed_once_read_through(
    tmp_path: Path, source: Source
) -> None:
    a, b, c = (source.add(letter) for letter in "abc")
    first = DiskCache(tmp_path / "cache", 3 * KIB, source)
    for sha256, age_s in ((a, 30), (b, 20), (c, 10)):
        with first.lease(sha256) as path:
            os.utime(path, (time.time() - age_s,) * 2)
        if sha256 == b:
            path.write_bytes(b"x" * KIB)
            os.utime(path, (time.time() - age_s,) * 2)
    first.stage(10)  # left behind, as by a kill
    first.close()
    again = DiskCache(tmp_path / "cache", 2 * KIB, source)
    assert incoming(tmp_path / "cache") == []
    assert (again.num_bytes, files(tmp_path / "cache")) == (2 * KIB, {b, c})
    source.reads.clear()
    assert read(again, c) == b"c" * KIB
    assert source.reads == []
    assert read(again, b) == b"b" * KIB
    assert source.reads == [b]
    again.close()


def test_two_processes_have_a_folder_each(tmp_path: Path, source: Source) -> None:
    first = DiskCache(tmp_path / "cache", KIB, source)
    second = DiskCache(tmp_path / "cache", KIB, source)
    a = source.add("a")
    assert read(first, a) == read(second, a) == b"a" * KIB
    assert (files(tmp_path / "cache"), files(tmp_path / "cache.1")) == ({a}, {a})
    first.close()
    third = DiskCache(tmp_path / "cache", KIB, source)
    assert third.holds(a)
    second.close()
    third.close()


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path, source: Source) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cache cannot be opened"):
        DiskCache(tmp_path / "file" / "cache", KIB, source)


def test_any_order_of_leases_from_many_threads_keeps_the_ceiling(
    tmp_path: Path, source: Source
) -> None:
    cache = DiskCache(tmp_path / "cache", 4 * KIB, source)
    all_of_them = [source.add(chr(97 + n)) for n in range(9)]

    def work(seed: int) -> None:
        for n in range(40):
            index = (seed * 7 + n * (seed + 3)) % 9
            with cache.lease(all_of_them[index]) as path:
                assert path.read_bytes() == chr(97 + index).encode() * KIB
            if n % 11 == seed:
                cache.drop(all_of_them[index])
            assert cache.num_bytes <= 4 * KIB

    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(work, seed) for seed in range(4)]:
            each.result(60)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").glob("blobs/??/*"))
    assert on_disk == cache.num_bytes <= 4 * KIB
    cache.close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from quickchange_adapters.disk_cache import DiskCache
from quickchange_adapters.errors import StoreFull
from tests.adapters.test_disk_cache import Source, read

source = Source()
small, large = source.add("a"), source.add("b", 200_000)
cache = DiskCache(Path(sys.argv[1]), 1 << 20, source)
read(cache, small)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    read(cache, large)
except StoreFull as error:
    print(error)
print(len(read(cache, small)), cache.num_bytes)
"""


def test_a_disk_that_takes_no_more_loses_nothing(tmp_path: Path) -> None:
    # The limit stands in for a full disk: writes beyond it fail.
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the disk of the store's cache is full", "1024 1024"]
    assert incoming(tmp_path / "cache") == []
    assert issubclass(StoreFull, StoreUnavailable)
