"""The decoder of server-sent events."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quickchange_client.sse import SseDecoder


def decode(*blocks: bytes) -> list[str]:
    decoder = SseDecoder()
    return [data for block in blocks for data in decoder.feed(block)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_line_ends_are_read(end: bytes) -> None:
    stream = b"data: one" + end + end + b"data: two" + end + end + b"data: open" + end
    assert decode(stream) == ["one", "two"]


def test_only_data_counts() -> None:
    stream = b": ping\n\nevent: x\nid: 7\nretry: 10\n\ndata: yes\nevent: y\n\ndatum: no\n\n"
    assert decode(stream) == ["yes"]


def test_lines_of_one_event_are_joined_and_one_space_is_taken() -> None:
    assert decode(b"data:a\ndata:  b\ndata\ndata:c:d\n\n") == ["a\n b\n\nc:d"]


def test_an_unfinished_event_is_dropped() -> None:
    assert decode(b"data: whole\n\ndata: half\n") == ["whole"]


def test_a_byte_order_mark_is_skipped_even_when_cut() -> None:
    assert decode(b"\xef", b"\xbb\xbfdata: x\n\n") == ["x"]
    assert decode(b"\xef\xbb\xbfdata: x\n\n") == ["x"]


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=5)


@given(texts=texts, cuts=st.sets(st.integers(0, 400)), end=st.sampled_from(["\n", "\r\n"]))
def test_events_survive_any_cut_of_the_bytes(texts: list[str], cuts: set[int], end: str) -> None:
    """Also U+2028, U+0085 and half characters: only CR and LF end a line."""
    events = [json.dumps(text, ensure_ascii=False) for text in texts]
    stream = "".join(f"data: {event}{end}{end}" for event in events).encode()
    places = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    blocks = [stream[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert decode(*blocks) == events
