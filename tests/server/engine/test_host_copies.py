"""Host memory under its ceiling: who goes, who stays, who waits, and who is refused."""

import pytest
from quickchange_adapters.host_adapter import HostAdapter
from quickchange_server.engine.host_copies import HostCopies

from tests.adapters.test_pool import adapter_of

SIZE = adapter_of("any", 8).num_bytes


class Scene:
    """Copies with room for so many adapters of rank 8, and who is used or pinned."""

    def __init__(self, num_places: int, keep_s: float = 0.0) -> None:
        self.used: set[str] = set()
        self.fixed: set[str] = set()
        self.copies = HostCopies(
            num_places * SIZE,
            lambda digest: digest not in self.used,
            lambda digest: digest in self.fixed,
            lambda digest: self.copies.pop(digest),
            keep_s,
        )

    def add(self, name: str, rank: int = 8) -> bool:
        """Whether it is there at once."""
        return self.copies.add(adapter_of(name, rank)).done()


def test_the_least_recently_used_idle_copy_makes_room() -> None:
    scene = Scene(3)
    assert all([scene.add("a"), scene.add("b"), scene.add("c")])
    scene.copies.touch("a")
    scene.used.add("b")
    assert scene.add("d")
    assert list(scene.copies) == ["b", "a", "d"]
    assert scene.copies.num_bytes == 3 * SIZE
    assert scene.copies.num_evictions == 1


def test_nothing_goes_in_vain() -> None:
    scene = Scene(3)
    for name in "abc":
        scene.add(name)
    scene.used.add("a")
    scene.used.add("b")
    assert not scene.add("large", rank=16)
    assert list(scene.copies) == ["a", "b", "c"]


def test_what_finds_no_room_waits_for_those_in_use_first_come_first_served() -> None:
    scene = Scene(2)
    for name in "ab":
        scene.add(name)
        scene.used.add(name)
    large = scene.copies.add(adapter_of("large", 16))
    small = scene.copies.add(adapter_of("small", 8))
    scene.used.discard("a")
    scene.copies.admit()
    assert not large.done()
    assert not small.done()  # it would fit, and would starve the larger one
    scene.used = {"large"}  # from the moment when it is there
    scene.copies.admit()
    assert large.done()
    assert not small.done()
    scene.used.clear()
    scene.copies.admit()
    assert list(scene.copies) == ["small"]


def test_who_left_waits_no_more_and_blocks_nobody() -> None:
    scene = Scene(1)
    scene.add("a")
    scene.used.add("a")
    gone = scene.copies.add(adapter_of("gone", 8))
    stays = scene.copies.add(adapter_of("stays", 8))
    assert gone.cancel()
    scene.used.clear()
    scene.copies.admit()
    assert stays.done()
    assert "gone" not in scene.copies


def test_what_pins_leave_no_room_for_is_refused_with_the_numbers() -> None:
    scene = Scene(2)
    scene.add("a")
    scene.fixed.add("a")
    with pytest.raises(MemoryError, match=f"of {2 * SIZE} {SIZE} are of adapters that are pinned"):
        scene.add("large", rank=16)
    scene.add("b")
    scene.used.add("b")
    waiting = scene.copies.add(adapter_of("c", 8))
    scene.fixed.add("b")  # pinned while it waits
    scene.copies.admit()
    with pytest.raises(MemoryError, match="unpin"):
        waiting.result(0)


def test_what_came_is_kept_until_it_was_used_but_not_for_ever() -> None:
    scene = Scene(1, keep_s=60)
    assert scene.add("a")
    assert not scene.add("b")
    scene.copies.touch("a")
    scene.copies.admit()
    assert list(scene.copies) == ["b"]
    short = Scene(1, keep_s=1e-9)
    assert short.add("a")
    assert short.add("b")


def test_a_stop_leaves_nobody_waiting() -> None:
    scene = Scene(1)
    scene.add("a")
    scene.used.add("a")
    waiting = scene.copies.add(adapter_of("b", 8))
    scene.copies.stop(RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        waiting.result(0)


def test_a_repeat_is_there_at_once_however_full_it_is() -> None:
    scene = Scene(1)
    scene.add("a")
    scene.used.add("a")
    again: HostAdapter = adapter_of("a", 8)
    assert scene.copies.add(again).done()
    assert scene.copies.num_bytes == SIZE


def sizes(names: str) -> dict[str, int]:
    return dict.fromkeys(names, SIZE)


def test_who_wants_several_has_room_for_all_or_holds_nothing() -> None:
    scene = Scene(3)
    scene.add("x")
    scene.used.add("x")
    first = scene.copies.book("first", sizes("ab"))
    second = scene.copies.book("second", sizes("cd"))
    assert first.done()
    assert not second.done()
    assert scene.add("a")
    scene.used.add("a")
    scene.copies.end_booking("first")
    assert not second.done()  # one place is free, and it takes none of it alone
    scene.used.clear()
    scene.copies.admit()
    assert second.done()
    assert scene.add("c")
    assert scene.add("d")
    assert set(scene.copies) <= {"x", "a", "c", "d"}
    assert scene.copies.num_bytes <= 3 * SIZE


def test_booked_copies_stay_and_booked_room_is_nobody_elses() -> None:
    scene = Scene(2)
    scene.add("a")
    assert scene.copies.book("mix", sizes("ab")).done()
    assert not scene.copies.has_free_room(adapter_of("c", 8))
    assert not scene.copies.book_free("one", sizes("c"))
    assert not scene.add("c")
    assert scene.add("b")
    assert list(scene.copies) == ["a", "b"]
    scene.copies.end_booking("mix")
    assert list(scene.copies) == ["b", "c"]


def test_what_needs_no_more_room_passes_those_who_wait_for_it() -> None:
    """Else a mix would wait for a load, which waits behind somebody who waits for the mix."""
    scene = Scene(2)
    scene.add("x")
    scene.used.add("x")
    mix = scene.copies.book("mix", sizes("ab"))
    large = scene.copies.book("large", {"large": 2 * SIZE})
    load = scene.copies.book("load of a", sizes("a"))
    copy = scene.copies.add(adapter_of("b", 8))
    scene.used.clear()
    scene.copies.admit()
    assert mix.done()
    assert load.done()
    assert copy.done()
    assert not large.done()
    for owner in ("mix", "load of a"):
        scene.copies.end_booking(owner)
    assert large.done()


def test_a_booking_that_was_given_up_leaves_nothing_behind() -> None:
    scene = Scene(2)
    scene.add("x")
    scene.used.add("x")
    waiting = scene.copies.book("mix", sizes("ab"))
    behind = scene.copies.book("one", sizes("c"))
    scene.copies.end_booking("mix")
    assert waiting.cancelled()
    assert behind.done()
    scene.copies.end_booking("one")
    scene.copies.end_booking("one")
    assert scene.copies.book_free("all", sizes("c"))
    scene.copies.end_booking("all")
    scene.used.clear()
    assert scene.copies.book("two", sizes("ab")).done()


def test_an_unload_of_a_booked_copy_keeps_its_room() -> None:
    scene = Scene(2)
    scene.add("a")
    assert scene.copies.book("mix", sizes("ab")).done()
    scene.copies.pop("a")
    assert not scene.copies.book("others", sizes("cd")).done()
    assert scene.add("a")
    assert scene.add("b")
    assert scene.copies.num_bytes == 2 * SIZE


def test_bookings_that_pins_leave_no_room_for_are_refused() -> None:
    scene = Scene(2)
    scene.add("a")
    scene.fixed.add("a")
    assert scene.copies.book("with it", sizes("ab")).done()
    with pytest.raises(MemoryError, match="2 adapters together need"):
        scene.copies.book("without it", sizes("bc"))
