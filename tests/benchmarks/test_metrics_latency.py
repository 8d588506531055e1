"""Scrapes beside streams, against a ready-made server and a real catalog."""

from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url

from benchmarks.metrics_latency import RUNNING, Scrapes, latency_table, register


def test_what_is_registered_is_in_the_catalog_that_the_server_opens(tmp_path: Path) -> None:
    register(tmp_path / "store", 5, "bench")
    catalog = Catalog(sqlite_url(tmp_path / "store/catalog.sqlite"))
    found = catalog.changes_since({}).changed
    catalog.close()
    assert sorted(record.name for record in found) == [f"registered-0000{n}" for n in range(5)]
    assert len({version.digest for record in found for version in record.versions}) == 5


def test_the_table_has_the_scrapes_percentiles() -> None:
    seconds = tuple(0.001 * number for number in range(1, 101))
    table = latency_table([Scrapes("200 streams", "/metrics", seconds, 2048, 30)])
    row = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert row[:3] == ["200 streams", "/metrics", "100"]
    assert row[3:] == ["50.5", "99.0", "100.0", "2", "30"]


def test_how_many_run_is_read_from_the_text() -> None:
    found = RUNNING.search("# TYPE x gauge\nquickchange_requests_running 7.0\nother 1\n")
    assert found is not None
    assert float(found[1]) == pytest.approx(7)
