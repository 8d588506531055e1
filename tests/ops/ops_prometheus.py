"""Dashboard and alerts against a real Prometheus that scrapes a server under load."""

import math
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.machine import ROOT
from tests.conftest import MakeAdapter
from tests.ops.environments import NotHere, debian_package
from tests.ops.prometheus_server import RULES, PrometheusServer
from tests.server.server_process import Server
from tools.dashboard import dashboard
from tools.dashboard_panels import ROWS
from tools.dashboard_queries import Panel

LOAD_S = 20.0
SEEN_S = 60.0
NUM_CLIENTS = 4
PANELS = [panel for row in ROWS for panel in row.panels]
MAY_BE_EMPTY = {"Merged by traffic"}
"""Panels that wait for what this load does not do."""


@pytest.fixture(scope="session")
def binaries() -> Path:
    try:
        return debian_package("prometheus", "prometheus")
    except NotHere as reason:
        pytest.skip(f"no Prometheus: {reason}")


@dataclass
class Site:
    """A server that was under load, and the Prometheus that watched."""

    server: Server
    prometheus: PrometheusServer


@pytest.fixture(scope="session")
def site(
    binaries: Path,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ops")
    server = Server(["--model", str(tiny_base), "--served-model-name", "tiny"], folder)
    try:
        server.wait_ready()
        prometheus = PrometheusServer(binaries, server.url.removeprefix("http://"), folder)
        try:
            prometheus.wait_ready()
            prometheus.wait_scraped()
            run_load(server, make_adapter)
            yield Site(server, prometheus)
        finally:
            prometheus.stop()
    finally:
        server.process.kill()
        server.process.wait()


def run_load(server: Server, make_adapter: MakeAdapter) -> None:
    """Upload, have one refused, and ask for the base and two adapters for a while."""
    for name, folder in (("ada", make_adapter(seed=1)), ("bob", make_adapter(seed=2, r=4))):
        assert upload(server, name, folder) == 201
    assert upload(server, "none", make_adapter(seed=1, std=0.0)) == 400
    end_s = time.monotonic() + LOAD_S

    def ask(client: int) -> None:
        while time.monotonic() < end_s:
            model = ("tiny", "ada", "bob")[client % 3]
            answer = server.generate(model, max_tokens=24, ignore_eos=True)
            assert answer.status_code == 200
        # Counters that were there before their first increase show a rate; these came with it.
        assert upload(server, f"late-{client}", make_adapter(seed=1)) == 201
        assert upload(server, "none", make_adapter(seed=1, std=0.0)) == 400

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        list(clients.map(ask, range(NUM_CLIENTS)))
    time.sleep(1.5)  # the last of it is scraped


def upload(server: Server, name: str, folder: Path) -> int:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    url = f"{server.url}/v1/adapters"
    return httpx.post(url, data={"name": name}, files=files, timeout=60).status_code


def filled_in(expr: str) -> str:
    """Return an expression as Grafana sends it."""
    for variable, value in (("$__rate_interval", "10s"), ("$instance", ".*"), ("$adapter", ".*")):
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


def test_only_panels_that_say_so_may_be_empty() -> None:
    assert {panel.title for panel in PANELS if panel.empty_until} >= MAY_BE_EMPTY


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_the_panel_shows_data(site: Site, panel: Panel) -> None:
    for query in panel.queries:
        series = site.prometheus.series(filled_in(query.expr), LOAD_S)
        assert series or panel.title in MAY_BE_EMPTY, query.expr
        values = [value for each in series for value in each]
        assert not series or any(not math.isnan(value) for value in values), query.expr


def test_panels_that_tell_of_the_load_are_not_all_zero(site: Site) -> None:
    told = ("Requests per second", "Token throughput", "Hottest adapters", "Bytes by adapter")
    for panel in (each for each in PANELS if each.title in told):
        for query in panel.queries:
            series = site.prometheus.series(filled_in(query.expr), LOAD_S)
            assert any(value > 0 for each in series for value in each), query.expr


def test_the_variables_find_the_server_and_its_adapters(site: Site) -> None:
    queries = {each["name"]: each.get("definition") for each in dashboard()["templating"]["list"]}
    assert set(queries) == {"datasource", "instance", "adapter"}
    found: dict[str, Any] = {}
    for name in ("instance", "adapter"):
        selector, _, label = queries[name].removeprefix("label_values(")[:-1].rpartition(", ")
        matching = {"match[]": filled_in(selector)}
        found[name] = site.prometheus.get(f"label/{label}/values", **matching)
    assert found["instance"] == [site.server.url.removeprefix("http://")]
    assert {"ada", "bob"} <= set(found["adapter"])


def test_every_alert_is_evaluated_and_none_fires_on_a_well_server(site: Site) -> None:
    alerts = site.prometheus.alerts()
    assert len(alerts) > 10
    assert {name: rule["lastError"] for name, rule in alerts.items() if "lastError" in rule} == {}
    assert {rule["health"] for rule in alerts.values()} == {"ok"}
    assert {name for name, rule in alerts.items() if rule["state"] == "firing"} == set()


def test_rules_are_sound_and_fire_when_they_should(binaries: Path) -> None:
    promtool, cases = str(binaries / "promtool"), ROOT / "tests/ops/quickchange.rules.test.yaml"
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(cases)]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_metrics_are_as_prometheus_wants_them(site: Site, binaries: Path) -> None:
    """Its linter finds nothing, but for names that are not ours to choose."""
    text = httpx.get(f"{site.server.url}/metrics").text
    ours = "".join(line for line in text.splitlines(keepends=True) if "vllm:" not in line)
    command = [str(binaries / "promtool"), "check", "metrics"]
    done = subprocess.run(command, input=ours, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_server_that_is_gone_is_an_alert(site: Site) -> None:
    """The last one: it ends the server."""
    assert site.server.stop() == 0
    deadline_s = time.monotonic() + SEEN_S
    while site.prometheus.alerts()["QuickchangeDown"]["state"] == "inactive":
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
