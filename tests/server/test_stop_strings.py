import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_server.stop_strings import StopStringFilter

SMALL = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def cut_plainly(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut where a stop string first becomes complete; of several there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], StopStringFilter]:
    stop_filter = StopStringFilter(stops)
    return [stop_filter.push(piece) for piece in pieces], stop_filter


@settings(max_examples=500, deadline=None)
@given(text=SMALL, stops=STOPS, data=st.data())
def test_any_pieces_give_the_plain_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    marks = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)]
    parts, stop_filter = run(stops, pieces)
    expected, is_stopped = cut_plainly(text, stops)
    assert "".join(parts) + stop_filter.flush() == expected
    assert (stop_filter.matched is not None) == is_stopped


@settings(max_examples=300, deadline=None)
@given(text=SMALL, stops=STOPS)
def test_shown_text_never_holds_part_of_the_stop_that_ends_it(text: str, stops: list[str]) -> None:
    parts, _ = run(stops, list(text))
    expected, is_stopped = cut_plainly(text, stops)
    assert expected.startswith("".join(parts))
    if is_stopped:
        assert "".join(parts) == expected


def test_half_a_stop_string_waits_and_is_released() -> None:
    parts, stop_filter = run(["STOP"], ["say ST", "AND"])
    assert parts == ["say ", "STAND"]
    assert stop_filter.flush() == ""


def test_held_text_comes_out_at_the_end() -> None:
    parts, stop_filter = run(["\n\n"], ["line\n"])
    assert parts == ["line"]
    assert stop_filter.flush() == "\n"


def test_nothing_after_a_match() -> None:
    parts, stop_filter = run(["x"], ["ax", "b"])
    assert parts == ["a", ""]
    assert stop_filter.matched == "x"


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stop_strings_pass_everything(stops: list[str]) -> None:
    assert run(stops, ["a", "b"])[0] == ["a", "b"]
