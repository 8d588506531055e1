"""The body of an upload: right bytes, right length, read from disk while it goes out."""

from email import message_from_bytes
from pathlib import Path

import pytest
from quickchange_client.multipart import BLOCK_BYTES, AsyncMultipartBody, FilePart, MultipartBody


@pytest.fixture
def files(tmp_path: Path) -> tuple[FilePart, ...]:
    small, large = tmp_path / "small.json", tmp_path / "large.safetensors"
    small.write_bytes(b"{}")
    large.write_bytes(b"\r\n--x" * BLOCK_BYTES)
    return (
        FilePart("config", small, "application/json"),
        FilePart("model", large, "application/octet-stream"),
    )


def parse(body: MultipartBody) -> dict[str, bytes]:
    """Read a body with the standard library's parser."""
    head = f"Content-Type: {body.headers['Content-Type']}\r\n\r\n".encode()
    message = message_from_bytes(head + b"".join(body))
    parts = {}
    for part in message.get_payload():
        assert not isinstance(part, str)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        parts[str(name)] = content
    return parts


def test_fields_and_files_arrive_as_they_are(files: tuple[FilePart, ...]) -> None:
    parts = parse(MultipartBody({"name": "sentiment", "alias": "défaut"}, files))
    assert parts["name"] == b"sentiment"
    assert parts["alias"].decode() == "défaut"
    assert parts["config"] == b"{}"
    assert parts["model"] == files[1].path.read_bytes()


def test_the_length_is_known_beforehand_and_right(files: tuple[FilePart, ...]) -> None:
    body = MultipartBody({"name": "é"}, files)
    assert int(body.headers["Content-Length"]) == len(b"".join(body))


def test_it_can_be_sent_twice(files: tuple[FilePart, ...]) -> None:
    body = MultipartBody({"name": "x"}, files)
    assert b"".join(body) == b"".join(body)


def test_no_block_holds_a_whole_file(files: tuple[FilePart, ...]) -> None:
    assert files[1].path.stat().st_size > 4 * BLOCK_BYTES
    assert max(map(len, MultipartBody({}, files))) <= BLOCK_BYTES


def test_progress_grows_to_the_whole(files: tuple[FilePart, ...]) -> None:
    seen: list[tuple[int, int]] = []
    body = MultipartBody({"name": "x"}, files, lambda sent, total: seen.append((sent, total)))
    num_bytes = len(b"".join(body))
    assert [sent for sent, _ in seen] == sorted({sent for sent, _ in seen})
    assert seen[-1] == (num_bytes, num_bytes)
    assert {total for _, total in seen} == {num_bytes}


async def test_async_sends_the_same(files: tuple[FilePart, ...]) -> None:
    seen: list[int] = []
    body = MultipartBody({"name": "x"}, files, lambda sent, total: seen.append(sent))
    blocks = [block async for block in AsyncMultipartBody(body)]
    assert b"".join(blocks) == b"".join(body.blocks())
    assert seen[-1] == body.num_bytes
