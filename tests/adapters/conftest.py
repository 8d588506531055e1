"""A catalog on each kind of database, with a clock that the test moves."""

from collections.abc import Iterator

import pytest
from quickchange_adapters.catalog import Catalog


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(catalog_url: str, clock: Clock) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url, clock)
    yield catalog
    catalog.close()
