"""Two services on one store and one catalog, and a catalog that goes away for a while."""

import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.records import FileRecord
from quickchange_server.errors import Unavailable

from tests.server.service_world import World, meaning, seen


class FailingCatalog(Catalog):
    """A catalog that does not answer while it is down; counts how often it is asked."""

    is_down = False
    num_asked = 0

    def revision(self) -> int:
        self.num_asked += 1
        self._check()
        return super().revision()

    def reserve(self, upload_id: str, files: Iterable[FileRecord]) -> None:
        self._check()
        super().reserve(upload_id, files)

    def _check(self) -> None:
        if self.is_down:
            with self.database.reading() as connection:
                connection.exec_driver_sql("SELECT * FROM nowhere")


@pytest.fixture
async def worlds(tmp_path: Path, catalog_url: str) -> AsyncIterator[tuple[World, World]]:
    """Two servers that share their disk; the second's catalog can be taken away."""
    pair = (
        World(tmp_path / "store", catalog_url=catalog_url),
        World(tmp_path / "store", catalog_url=catalog_url, open_catalog=FailingCatalog),
    )
    for world in pair:
        await world.start()
    yield pair
    for world in pair:
        await world.service.stop()


async def test_another_process_s_changes_are_seen(worlds: tuple[World, World]) -> None:
    here, there = worlds
    await here.upload("a", 0)
    took = {"upload": await seen(lambda: meaning(there, "a") == 1)}
    await here.upload("a", 1)
    await here.service.set_alias("a", "default", 2)
    took["alias"] = await seen(lambda: meaning(there, "a") == 2)
    await here.service.delete_version("a", 1)
    took["delete version"] = await seen(lambda: meaning(there, "a:1") is None)
    assert meaning(there, "a") == 2
    await there.service.delete_adapter("a")
    took["delete adapter"] = await seen(lambda: meaning(here, "a") is None)
    print({what: f"{seconds:.2f} s" for what, seconds in took.items()})


async def test_both_may_change_the_same_name(worlds: tuple[World, World]) -> None:
    here, there = worlds
    assert await here.upload("a", 0) == 1
    assert await there.upload("a", 1, alias="default") == 2
    assert await here.upload("a", 2, alias="canary") == 3
    await seen(lambda: meaning(here, "a") == 2 and meaning(there, "a@canary") == 3)
    first, second = await here.service.get("a"), await there.service.get("a")
    assert (first.aliases, first.etag) == (second.aliases, second.etag)
    await here.service.delete_adapter("a")
    assert await there.upload("a", 3) == 4  # numbers are never given again, whoever gave them
    await seen(lambda: meaning(here, "a") == 4)


async def test_an_outage_is_said_once_and_ends_without_a_restart(
    worlds: tuple[World, World], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = worlds
    await here.upload("a")
    await seen(lambda: meaning(there, "a") == 1)
    catalog = there.catalog
    assert isinstance(catalog, FailingCatalog)
    with caplog.at_level(logging.WARNING):
        catalog.is_down, catalog.num_asked = True, 0
        await here.upload("b")
        await seen(lambda: catalog.num_asked >= 3)
        assert (meaning(there, "a"), meaning(there, "b")) == (1, None)
        await there.service.acquire(there.service.resolve("a"))
        with pytest.raises(Unavailable) as refused:
            await there.upload("c")
        assert refused.value.code == "store_unavailable"
        catalog.is_down = False
        await seen(lambda: meaning(there, "b") == 1)
    said = [record.message for record in caplog.records if "catalog" in record.message]
    assert len(said) == 2
    assert "the catalog does not answer" in said[0]
    assert "the catalog answers again" in said[1]


async def test_what_any_process_deletes_is_told_once(worlds: tuple[World, World]) -> None:
    here, there = worlds
    gone: list[str] = []
    there.service.on_adapter_gone(gone.append)
    await here.upload("a")
    await there.upload("b", 1)
    await seen(lambda: meaning(there, "a") == meaning(here, "b") == 1)
    await here.service.delete_adapter("a")
    await seen(lambda: gone == ["a"])
    await there.service.delete_adapter("b")
    await here.upload("c")
    await seen(lambda: meaning(there, "c") == 1)
    assert gone == ["a", "b"]


async def test_pictures_are_renewed_although_another_cannot_be(
    worlds: tuple[World, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = worlds
    num_renewed = 0

    async def renew() -> None:
        nonlocal num_renewed
        num_renewed += 1

    def changes_since(known: object) -> None:
        raise ValueError("a row that nobody can read")

    there.service.on_catalog_change(renew)
    with monkeypatch.context() as patch:
        patch.setattr(there.catalog, "changes_since", changes_since)
        await here.upload("a")
        await seen(lambda: num_renewed >= 2)  # again and again, until all of it works
        assert meaning(there, "a") is None
    await seen(lambda: meaning(there, "a") == 1)


async def test_other_pictures_are_renewed_with_the_same_look(worlds: tuple[World, World]) -> None:
    here, there = worlds
    failures = [RuntimeError("once")]
    num_renewed = 0

    async def renew() -> None:
        nonlocal num_renewed
        if failures:
            raise failures.pop()
        num_renewed += 1

    there.service.on_catalog_change(renew)
    await here.upload("a")
    await seen(lambda: num_renewed == 1)  # though it failed at first
    await here.upload("b")
    await seen(lambda: num_renewed == 2)
