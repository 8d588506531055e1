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
