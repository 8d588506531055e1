"""The audit log: who did what to which name. Only its beginning ever goes, by age and by number.

An event's place in its name's log, counted from 1, never changes: how many went before is kept. So
whoever reads page by page misses nothing and sees nothing twice while events go.

| an event | goes |
|---|---|
| of the newest `min_kept` of a name that exists | never |
| beyond the newest `max_per_name` of its name | with the next `prune` |
| older than `max_age_s` | with the next `prune` |

Methods block. Knows no clock but the one it is given.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    Connection,
    Select,
    and_,
    case,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    true,
    tuple_,
    update,
)

from quickchange_adapters.catalog_database import CatalogDatabase
from quickchange_adapters.catalog_schema import adapters, events, gone_events
from quickchange_adapters.names import is_adapter_name
from quickchange_adapters.records import EventRecord

MAX_PRUNED = 50_000
"""Events that one `prune` removes at most."""
BATCH = 500
"""Events that go in one transaction: no other writer waits for long."""
PART = 20_000
"""Events that one query looks through, and those of one name more: none takes long."""
DAY_S = 86400.0
Name = tuple[str, str]
"""A tenant, and a name of its."""
_OF_NAME = (events.c.tenant, events.c.name)


@dataclass(frozen=True, slots=True)
class EventRule:
    """How long events stay. `max_age_s` None: for ever."""

    max_age_s: float | None = 400 * DAY_S
    max_per_name: int = 10_000
    min_kept: int = 100


DEFAULT_RULE = EventRule()


@dataclass(frozen=True, slots=True)
class LogPart:
    """A part of a name's log, oldest first; `first_place` is where it begins, from 1."""

    first_place: int
    events: Sequence[EventRecord]


class EventLog:
    """Reads and shortens the log. Every method raises StoreUnavailable."""

    def __init__(self, database: CatalogDatabase, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def read(self, name: str, tenant: str, after: int = 0, limit: int | None = None) -> LogPart:
        """Return events of a name behind the place `after`; a deleted name keeps its log."""
        if not is_adapter_name(name):
            return LogPart(1, ())
        with self._database.reading() as connection:
            num_gone = _num_gone(connection, tenant, name)
            query = (
                select(*(column for column in events.c if column.name != "id"))
                .where(events.c.tenant == tenant, events.c.name == name)
                .order_by(events.c.id)
                .offset(max(after - num_gone, 0))
                .limit(limit)
            )
            found = [EventRecord(**row) for row in connection.execute(query).mappings()]
        return LogPart(max(after, num_gone) + 1, found)

    def prune(self, rule: EventRule) -> int:
        """Remove what has outlived a rule, in small steps, and return how many events went.

        Several servers may do so at once.
        """
        num_removed = 0
        after: Name | None = ("", "")
        while after is not None and num_removed < MAX_PRUNED:
            with self._database.reading() as connection:
                last = _end_of_part(connection, after)
                query = _outlived(rule, self._clock(), after, last)
                ids = connection.scalars(query.limit(MAX_PRUNED - num_removed)).all()
            batches = (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
            num_removed += sum(map(self._remove, batches))
            after = last
        return num_removed

    def _remove(self, ids: Sequence[int]) -> int:
        """Remove those of these events that nobody else has removed meanwhile."""
        are_meant = events.c.id.in_(ids)
        with self._database.writing() as connection:
            rows = connection.execute(select(events.c.tenant, events.c.name).where(are_meant))
            removed = Counter((row.tenant, row.name) for row in rows)
            connection.execute(delete(events).where(are_meant))
            for (tenant, name), number in removed.items():
                _count_gone(connection, tenant, name, number)
        return removed.total()


def _end_of_part(connection: Connection, after: Name) -> Name | None:
    """Return the last of the next names that have PART events together; None: all are left."""
    names = select(*_OF_NAME).where(tuple_(*_OF_NAME) > after).order_by(*_OF_NAME)
    row = connection.execute(names.offset(PART).limit(1)).first()
    return None if row is None else (row.tenant, row.name)


def _outlived(
    rule: EventRule, now: float, after: Name = ("", ""), last: Name | None = None
) -> Select[int]:
    """Return the query for what a rule lets go, oldest first: of each name a beginning.

    It looks at the names behind `after`, up to `last`.
    """
    is_meant = and_(
        tuple_(*_OF_NAME) > after, true() if last is None else tuple_(*_OF_NAME) <= last
    )
    is_living = and_(
        adapters.c.tenant == events.c.tenant,
        adapters.c.name == events.c.name,
        adapters.c.deleted_at.is_(None),
    )
    place = func.row_number().over(partition_by=_OF_NAME, order_by=events.c.id.desc())
    ranked = (
        select(events.c.id, *_OF_NAME, events.c.at, place.label("place"), adapters.c.id.label("a"))
        .outerjoin(adapters, is_living)
        .where(is_meant)
        .subquery()
    ).c
    is_old = false() if rule.max_age_s is None else ranked.at < now - rule.max_age_s
    may_go = or_(is_old, ranked.place > rule.max_per_name)
    is_needed = and_(ranked.a.is_not(None), ranked.place <= rule.min_kept)
    kept_id = case((or_(~may_go, is_needed), ranked.id))
    first_kept = func.min(kept_id).over(partition_by=[ranked.tenant, ranked.name])
    found = select(ranked.id, first_kept.label("first_kept")).subquery().c
    # clocks of several servers differ: what follows something that stays, stays
    is_before = or_(found.first_kept.is_(None), found.id < found.first_kept)
    return select(found.id).where(is_before).order_by(found.id)


def _num_gone(connection: Connection, tenant: str, name: str) -> int:
    is_named = (gone_events.c.tenant == tenant, gone_events.c.name == name)
    return connection.scalar(select(gone_events.c.num_gone).where(*is_named)) or 0


def _count_gone(connection: Connection, tenant: str, name: str, number: int) -> None:
    is_named = (gone_events.c.tenant == tenant, gone_events.c.name == name)
    known = connection.scalar(select(gone_events.c.num_gone).where(*is_named))
    if known is None:
        row = {"tenant": tenant, "name": name, "num_gone": number}
        connection.execute(insert(gone_events).values(**row))
    else:
        connection.execute(update(gone_events).where(*is_named).values(num_gone=known + number))
