"""What the chart and the examples start is started: servers, `helm test`, the training Job.

Commands, arguments, settings and variables are those of the rendered objects. Only places are
others: folders, addresses and ports of this machine instead of a container's.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from quickchange_server.cli import app
from typer.testing import CliRunner

from benchmarks.machine import ROOT
from tests.adapters.training.training_world import ROWS, write_rows
from tests.clients.real_server import COMMAND, free_port
from tests.conftest import MakeAdapter
from tests.helm.conftest import Engine
from tests.helm.rendered import Json, config_text, only
from tests.server.server_process import Server

EXAMPLES = ROOT / "helm" / "examples"
KEY = "k" * 32
HEADERS = {"authorization": f"Bearer {KEY}"}
RECIPE = """\
base = "{base}"
[data]
train = "train.jsonl"
[task]
prompt = "<{{input}}>"
max_tokens = 8
[training]
batch_rows = 4
epochs = 1
"""


@dataclass(frozen=True)
class Site:
    """A server as the chart starts it."""

    server: Server
    admin_url: str
    answer: Json

    def placed(self, text: str) -> str:
        """Return a text of the chart with the addresses of this machine."""
        addresses = {
            "http://qc-quickchange-admin:9000": self.admin_url,
            "http://qc-quickchange.prod.svc:8000": self.server.url,
            "http://qc-quickchange:8000": self.server.url,
        }
        for there, here in addresses.items():
            text = text.replace(there, here)
        assert "qc-quickchange" not in text
        return text


def key_file(folder: Path) -> Path:
    file = folder / "admin-key"
    file.write_text(KEY)
    file.chmod(0o440)
    return file


@pytest.fixture(scope="module")
def site(
    scenarios: dict[str, Json], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("chart")
    answer = scenarios["train"]
    settings = folder / "quickchange.toml"
    settings.write_text(config_text(answer))
    (container,) = only(answer, "Deployment")["spec"]["template"]["spec"]["containers"]
    command, *words = container["args"]
    assert command == "serve"
    admin_port = free_port()
    here = ["--model", str(tiny_base), "--host", "127.0.0.1", "--admin-port", str(admin_port)]
    here += ["--admin-key-file", str(key_file(folder))]
    words = [word.replace("/etc/quickchange/settings", str(folder)) for word in words]
    server = Server([*words, *here], folder)
    try:
        yield Site(server.wait_ready(), f"http://127.0.0.1:{admin_port}", answer)
    finally:
        server.process.kill()
        server.process.wait()


def test_the_probes_and_metrics_are_answered_without_a_key(site: Site) -> None:
    (container,) = only(site.answer, "Deployment")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert httpx.get(f"{site.admin_url}{path}").status_code == 200
    assert httpx.get(f"{site.admin_url}/metrics").status_code == 200
    assert httpx.get(f"{site.server.url}/metrics").status_code == 401
    assert httpx.get(f"{site.server.url}/metrics", headers=HEADERS).status_code == 200


def python_of(container: Json) -> str:
    assert container["command"] == ["python", "-c"]
    (code,) = container["args"]
    return str(code)


def test_helm_test_passes_on_a_server_that_is_ready_and_on_no_other(site: Site) -> None:
    (container,) = only(site.answer, "Pod")["spec"]["containers"]
    code = site.placed(python_of(container))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"version"' in done.stdout
    nobody = code.replace(site.admin_url, f"http://127.0.0.1:{free_port()}")
    assert subprocess.run([sys.executable, "-c", nobody], capture_output=True).returncode != 0


def test_the_train_job_waits_for_the_server_trains_and_pushes(
    site: Site, tiny_base: Path, tmp_path: Path
) -> None:
    spec = only(site.answer, "Job")["spec"]["template"]["spec"]
    assert spec["restartPolicy"] == "OnFailure"
    wait = site.placed(python_of(spec["initContainers"][0]))
    assert subprocess.run([sys.executable, "-c", wait], capture_output=True).returncode == 0
    (container,) = spec["containers"]
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    words = [
        re.sub("^/(recipe|work)/", f"{tmp_path}/", site.placed(word)) for word in container["args"]
    ]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert given == {"LORA_RANK": "16", "LORA_ALPHA": "32"}
    done = subprocess.run(
        [COMMAND, *words],
        env=os.environ | given | {"QUICKCHANGE_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "adapter/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    adapter = httpx.get(f"{site.server.url}/v1/adapters/verdict", headers=HEADERS).json()
    assert set(adapter["aliases"]) == {"candidate", "default"}
    assert adapter["versions"][0]["rank"] == 16


def loaded(name: str) -> list[Json]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def pod_of(spec: Json) -> Json:
    metadata = {"name": "example", "namespace": "prod"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def placed(words: list[str], places: dict[str, str]) -> list[str]:
    """Return arguments with a container's places replaced; each must be there."""
    for there, here in places.items():
        assert any(there in word for word in words), there
        words = [word.replace(there, here) for word in words]
    return words


def kserve_pods() -> dict[str, Json]:
    """Return what KServe makes of the examples, as far as they say it."""
    (inference,) = loaded("kserve-llm-inference-service.yaml")
    runtime, service = loaded("kserve-serving-runtime.yaml")
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    formats = {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    assert predictor["model"]["modelFormat"]["name"] in formats
    parts = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    return {
        "main": inference["spec"]["template"],
        "kserve-container": parts | {"securityContext": predictor["securityContext"]},
    }


def test_kserve_s_pods_are_what_kubernetes_takes_and_can_read_their_key(engine: Engine) -> None:
    (answer,) = engine([{"documents": [pod_of(spec) for spec in kserve_pods().values()]}])
    assert answer["invalid"] == []
    (wrong,) = engine([{"documents": [pod_of({"containers": [{"name": 1}]})]}])
    assert wrong["invalid"]
    for name, spec in kserve_pods().items():
        (container,) = spec["containers"]
        assert container["name"] == name
        assert container["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["fsGroup"] == 10001
        assert spec["volumes"][0]["secret"]["defaultMode"] == 0o440


def test_kserve_s_inference_service_serves_base_and_adapter(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    (container,) = kserve_pods()["main"]["containers"]
    assert container["command"] == ["quickchange", "serve"]
    places = {
        "/mnt/models": str(tiny_base),
        "/mnt/lora/verdict": str(make_adapter(seed=1)),
        "/etc/quickchange/keys/admin-key": str(key_file(tmp_path)),
        "0.0.0.0": "127.0.0.1",
        "=8000": "=0",
    }
    server = Server(placed(container["args"], places), tmp_path).wait_ready()
    try:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert httpx.get(server.url + container[probe]["httpGet"]["path"]).status_code == 200
        for model in ("llama", "verdict"):
            body = {"model": model, "prompt": "the", "max_tokens": 2}
            url = f"{server.url}/v1/completions"
            assert httpx.post(url, json=body, headers=HEADERS, timeout=60).status_code == 200
        assert server.stop(signal.SIGTERM) == 0
    finally:
        server.process.kill()


def test_kserve_s_serving_runtime_is_understood(tmp_path: Path) -> None:
    (container,) = kserve_pods()["kserve-container"]["containers"]
    places = {
        "/mnt/models": str(tmp_path / "nothing"),
        "/etc/quickchange/keys/admin-key": str(key_file(tmp_path)),
    }
    done = CliRunner().invoke(app, placed(container["args"], places))
    assert (done.exit_code, "there is no such folder" in done.stderr) == (1, True), done.stderr
