"""The audit log is bounded, and who reads it page by page does not notice."""

import pytest
from quickchange_adapters import event_log
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.catalog_schema import events, gone_events
from quickchange_adapters.event_log import DAY_S, EventRule
from sqlalchemy import func, select

from tests.adapters.conftest import Clock
from tests.adapters.test_catalog import publish

RULE = EventRule(max_age_s=10 * DAY_S, max_per_name=6, min_kept=3)


def change(catalog: Catalog, name: str, number: int, tenant: str = "default") -> None:
    """Add so many events to a name."""
    more = {"tenant": tenant, "visibility": "private"}
    version = publish(catalog, name, f"{tenant} {name}", **more).version
    for place in range(number - 1):
        catalog.set_alias(f"a{place}", version)


def places(catalog: Catalog, name: str, tenant: str = "default") -> list[int]:
    part = catalog.event_log.read(name, tenant)
    return list(range(part.first_place, part.first_place + len(part.events)))


def num_rows(catalog: Catalog) -> int:
    with catalog.database.reading() as connection:
        return connection.scalar(select(func.count(events.c.id))) or 0


def test_what_is_beyond_the_number_goes_for_each_name_alone(catalog: Catalog) -> None:
    change(catalog, "busy", 10)
    change(catalog, "busy", 2, tenant="other")
    change(catalog, "calm", 6)
    before = catalog.list_events("busy")
    assert catalog.event_log.prune(RULE) == 4
    assert places(catalog, "busy") == [5, 6, 7, 8, 9, 10]
    assert catalog.list_events("busy") == before[4:]
    assert places(catalog, "busy", "other") == [1, 2]
    assert places(catalog, "calm") == [1, 2, 3, 4, 5, 6]
    assert catalog.event_log.prune(RULE) == 0


def test_what_is_old_goes_but_for_the_newest_of_a_name_that_exists(
    catalog: Catalog, clock: Clock
) -> None:
    change(catalog, "lives", 5)
    change(catalog, "deleted", 5)
    catalog.begin_delete_adapter("deleted")
    clock.now += 10 * DAY_S + 1
    change(catalog, "young", 5)
    assert catalog.event_log.prune(EventRule(None, 6, 3)) == 1  # of the deleted one's seven
    assert catalog.event_log.prune(RULE) == 2 + 6
    assert places(catalog, "lives") == [3, 4, 5]
    assert places(catalog, "deleted") == []
    assert places(catalog, "young") == [1, 2, 3, 4, 5]
    change(catalog, "deleted", 1)
    assert catalog.event_log.read("deleted", "default").first_place == 8


def test_clocks_that_differ_make_no_holes(catalog: Catalog, clock: Clock) -> None:
    clock.now += 20 * DAY_S
    change(catalog, "a", 1)
    clock.now -= 20 * DAY_S
    version = catalog.resolve("a")
    assert version is not None
    for place in range(5):
        catalog.set_alias(f"a{place}", version)
    clock.now += 15 * DAY_S
    assert catalog.event_log.prune(RULE) == 0  # the old ones follow one that stays
    assert places(catalog, "a") == [1, 2, 3, 4, 5, 6]


def test_who_reads_page_by_page_sees_each_event_once_while_events_go(catalog: Catalog) -> None:
    change(catalog, "a", 10)
    log = catalog.list_events("a")
    first = catalog.event_log.read("a", "default", 0, 4)
    catalog.event_log.prune(RULE)
    second = catalog.event_log.read("a", "default", 4, 4)
    catalog.event_log.prune(EventRule(None, 3, 3))
    third = catalog.event_log.read("a", "default", 8, 4)
    assert [first.first_place, second.first_place, third.first_place] == [1, 5, 9]
    assert [*first.events, *second.events, *third.events] == log
    late = catalog.event_log.read("a", "default", 2, 4)
    assert (late.first_place, late.events) == (8, log[7:])


@pytest.mark.parametrize("size", [0, 1, 7, 30])
def test_the_log_is_looked_through_in_parts(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """One query over all of a large log would pass the time that a statement may take."""
    names = ["a", "b", "c", "d"]
    for number, name in enumerate(names):
        change(catalog, name, 5 + number)
    change(catalog, "b", 9, tenant="other")
    monkeypatch.setattr(event_log, "PART", size)
    with catalog.database.reading() as connection:
        last = event_log._end_of_part(connection, ("default", "a"))
        assert last == {0: ("default", "b"), 1: ("default", "b"), 7: ("default", "c")}.get(size)
        query = event_log._outlived(RULE, 0.0, ("default", "a"), ("default", "c"))
        assert len(connection.scalars(query).all()) == 1  # of c
    assert catalog.event_log.prune(RULE) == 1 + 2 + 3
    assert [len(places(catalog, name)) for name in names] == [5, 6, 6, 6]
    assert places(catalog, "b", "other") == [4, 5, 6, 7, 8, 9]


def test_it_goes_in_small_steps_and_two_servers_may_do_it_at_once(
    catalog: Catalog, catalog_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(catalog, "a", 12)
    monkeypatch.setattr(event_log, "BATCH", 2)
    monkeypatch.setattr(event_log, "MAX_PRUNED", 4)
    other = Catalog(catalog_url, clock)
    assert catalog.event_log.prune(RULE) == 4
    with catalog.database.reading() as connection:
        ids = connection.scalars(event_log._outlived(RULE, clock())).all()
    assert len(ids) == 2
    assert other.event_log.prune(RULE) == 2
    assert catalog.event_log._remove(ids) == 0  # the other one was faster, and has counted them
    assert places(catalog, "a") == [7, 8, 9, 10, 11, 12]
    assert num_rows(catalog) == 6
    other.close()


def test_an_older_catalog_gets_what_it_lacks(catalog: Catalog, catalog_url: str) -> None:
    change(catalog, "a", 8)
    with catalog.database.writing() as connection:
        gone_events.drop(connection)
    catalog.close()
    again = Catalog(catalog_url)
    assert again.event_log.prune(EventRule(None, 6, 3)) == 2
    assert places(again, "a") == [3, 4, 5, 6, 7, 8]
    again.close()
