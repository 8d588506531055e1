"""A real Prometheus that scrapes a server and evaluates the alerts."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import ROOT

RULES = ROOT / "helm/quickchange/rules/quickchange.rules.yaml"
START_S = 60
Json = dict[str, Any]


class PrometheusServer:
    """Scrapes `target` (HOST:PORT) twice a second."""

    def __init__(self, binaries: Path, target: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = folder / "prometheus.yml"
        config.write_text(json.dumps(_config(target)))  # JSON is YAML
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [
                str(binaries / "prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait_ready(self) -> None:
        """Wait until it answers."""
        for _ in range(START_S * 10):
            assert self._process.poll() is None, Path(self._log.name).read_text()
            try:
                if httpx.get(f"{self.url}/-/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise TimeoutError(Path(self._log.name).read_text())

    def wait_scraped(self) -> None:
        """Wait until it has seen the server once."""
        for _ in range(START_S * 10):
            if self.get("query", query="quickchange_build_info")["result"]:
                return
            time.sleep(0.1)
        raise TimeoutError("the server was not scraped")

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._log.close()

    def get(self, path: str, **params: Any) -> Any:
        """Return the data of an answer of its API; an error is shown with its reason."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", f"{params}: {answer.get('error')}"
        return answer["data"]

    def series(self, expr: str, seconds: float) -> list[list[float]]:
        """Return the values of each series of an expression over the last seconds."""
        now = time.time()
        data = self.get("query_range", query=expr, start=now - seconds, end=now, step=1)
        return [[float(value) for _, value in series["values"]] for series in data["result"]]

    def alerts(self) -> dict[str, Json]:
        """Return each alert's rule, with its health and state."""
        groups = self.get("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}


def _config(target: str) -> Json:
    return {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "quickchange", "static_configs": [{"targets": [target]}]}],
    }
