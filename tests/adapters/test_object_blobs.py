"""Blobs in an object store: what fails for a while, what fails for good, and what is never half."""

import hashlib
import time
from pathlib import Path

import pytest
from quickchange_adapters.errors import BlobMissing, StoreUnavailable
from quickchange_adapters.object_blobs import ObjectBlobs, Patience

from tests.s3_server import Fault, FaultyProxy, S3Server

SHORT = Patience(max_attempts=4, pause_s=0.01, give_up_s=60, connect_s=30, reply_s=60, delete_s=60)
PART_BYTES = 5 << 20  # S3 takes no smaller ones
DATA = bytes(range(256)) * 1200
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def blobs(s3_server: S3Server, s3_proxy: FaultyProxy) -> ObjectBlobs:
    return ObjectBlobs(f"s3://{s3_server.create_bucket()}/some/prefix/", SHORT, PART_BYTES)


def put(blobs: ObjectBlobs, file: Path) -> None:
    blobs.put(SHA256, file, len(DATA))


def read(blobs: ObjectBlobs, sha256: str = SHA256) -> bytes:
    return b"".join(blobs.read(sha256, blobs.size(sha256)))


def names(blobs: ObjectBlobs) -> list[str]:
    return [blob.sha256 for blob in blobs.list()]


def test_what_was_put_is_there_until_it_is_deleted(blobs: ObjectBlobs, file: Path) -> None:
    blobs.check()
    put(blobs, file)
    assert read(blobs) == DATA
    (found,) = blobs.list()
    assert (found.sha256, found.num_bytes) == (SHA256, len(DATA))
    assert found.modified_at is not None
    assert abs(found.modified_at - time.time()) < 3600
    assert blobs.delete(SHA256) == len(DATA)
    assert blobs.delete(SHA256) == 0
    assert names(blobs) == []
    for gone in (lambda: blobs.size(SHA256), lambda: list(blobs.read(SHA256, 10))):
        with pytest.raises(BlobMissing):
            gone()


def test_a_blob_is_one_put_and_a_repeat_is_none(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy
) -> None:
    put(blobs, file)
    put(blobs, file)
    assert s3_proxy.seen["PUT"] == 1
    blobs.suspect(SHA256)
    put(blobs, file)
    assert s3_proxy.seen["PUT"] == 2


def test_a_blob_of_another_size_is_replaced(blobs: ObjectBlobs, file: Path, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(DATA[:100])
    blobs.put(SHA256, tmp_path / "half", 100)
    put(blobs, file)
    assert read(blobs) == DATA


def test_a_large_blob_goes_up_in_parts_and_comes_back_whole(
    blobs: ObjectBlobs, tmp_path: Path, s3_proxy: FaultyProxy
) -> None:
    data = bytes(2 * PART_BYTES) + b"end"
    (tmp_path / "large").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(sha256, tmp_path / "large", len(data))
    assert s3_proxy.seen["PUT"] == 3
    assert hashlib.sha256(read(blobs, sha256)).hexdigest() == sha256


@pytest.mark.parametrize("fault", ["drop", "half_request", "500", "503"])
def test_an_upload_that_breaks_is_tried_again(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy, fault: Fault
) -> None:
    s3_proxy.fail("PUT", fault, times=2)
    put(blobs, file)
    assert s3_proxy.seen["PUT"] >= 3
    assert read(blobs) == DATA


@pytest.mark.parametrize("fault", ["drop", "half_request", "503"])
def test_an_upload_that_breaks_for_good_leaves_nothing(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy, fault: Fault
) -> None:
    s3_proxy.fail("PUT", fault, times=20)
    with pytest.raises(StoreUnavailable, match="the object store does not answer"):
        put(blobs, file)
    # The HTTP client asks once more by itself when a connection closed without a reply.
    assert SHORT.max_attempts <= s3_proxy.seen["PUT"] <= 2 * SHORT.max_attempts
    s3_proxy.heal()
    assert names(blobs) == []


def test_parts_that_break_for_good_leave_nothing(
    blobs: ObjectBlobs, tmp_path: Path, s3_proxy: FaultyProxy
) -> None:
    (tmp_path / "large").write_bytes(bytes(2 * PART_BYTES + 1))
    s3_proxy.fail("PUT", "half_request", times=20)
    with pytest.raises(StoreUnavailable):
        blobs.put(SHA256, tmp_path / "large", 2 * PART_BYTES + 1)
    s3_proxy.heal()
    assert names(blobs) == []


@pytest.mark.parametrize("fault", ["drop", "half_reply", "500", "503"])
def test_a_download_that_breaks_is_tried_again(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy, fault: Fault
) -> None:
    put(blobs, file)
    s3_proxy.fail("GET", fault, times=2)
    assert b"".join(blobs.read(SHA256, len(DATA))) == DATA
    assert s3_proxy.seen["GET"] == 3 + s3_proxy.seen["HEAD"]


def test_a_server_that_says_nothing_is_given_up(s3_proxy: FaultyProxy) -> None:
    blobs = ObjectBlobs("s3://bucket", Patience(max_attempts=2, pause_s=0.01, reply_s=1.5))
    s3_proxy.fail("HEAD", "hang", times=9)
    with pytest.raises(StoreUnavailable, match="does not answer: .*Timeout"):
        blobs.size(SHA256)
    assert s3_proxy.seen["HEAD"] >= 1


def test_a_delete_is_tried_once_and_may_be_repeated(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy
) -> None:
    put(blobs, file)
    s3_proxy.fail("DELETE", "503")
    with pytest.raises(StoreUnavailable):
        blobs.delete(SHA256)
    assert s3_proxy.seen["DELETE"] == 1
    assert blobs.delete(SHA256) == len(DATA)


def test_a_refusal_is_not_tried_again(
    blobs: ObjectBlobs, file: Path, s3_proxy: FaultyProxy
) -> None:
    s3_proxy.fail("PUT", "403")
    with pytest.raises(StoreUnavailable, match="refuses access"):
        put(blobs, file)
    assert s3_proxy.seen["PUT"] == 1


def test_a_bucket_that_is_not_there_is_said(s3_proxy: FaultyProxy, file: Path) -> None:
    blobs = ObjectBlobs("s3://no-such-bucket/prefix", SHORT)
    for call in (blobs.check, lambda: put(blobs, file)):
        with pytest.raises(StoreUnavailable, match="no such bucket"):
            call()


def test_objects_of_others_are_left_alone(
    s3_server: S3Server, s3_proxy: FaultyProxy, file: Path
) -> None:
    bucket = s3_server.create_bucket()
    mine, other = (ObjectBlobs(f"s3://{bucket}{path}", SHORT) for path in ("", "/deeper"))
    put(other, file)
    assert names(mine) == []
    assert mine.delete(SHA256) == 0
    put(mine, file)
    assert mine.delete(SHA256) == len(DATA)
    assert read(other) == DATA


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "AB" * 32, SHA256 + "\n", SHA256[:-1]])
def test_only_a_digest_is_a_name(blobs: ObjectBlobs, file: Path, name: str) -> None:
    for call in (
        lambda: blobs.size(name),
        lambda: blobs.delete(name),
        lambda: blobs.put(name, file, 1),
        lambda: list(blobs.read(name, 1)),
    ):
        with pytest.raises(BlobMissing):
            call()


def test_what_is_not_known_or_not_installed_is_said() -> None:
    with pytest.raises(StoreUnavailable, match="nonsense:// is not known"):
        ObjectBlobs("nonsense://bucket")
    with pytest.raises(StoreUnavailable, match="gs:// needs a package .*gcsfs"):
        ObjectBlobs("gs://bucket/prefix")


def test_another_kind_of_store_is_used_through_fsspec(file: Path) -> None:
    blobs = ObjectBlobs("memory://test-object-blobs/prefix")
    blobs.check()
    assert names(blobs) == []
    put(blobs, file)
    assert (read(blobs), names(blobs)) == (DATA, [SHA256])
    assert blobs.delete(SHA256) == len(DATA)
