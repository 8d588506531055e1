"""The chart, rendered by Helm's own engine: every scenario, every rule of the templates."""

import json
import tomllib
from pathlib import Path

import yaml
from quickchange_server.config import load_config

from tests.helm.conftest import RenderAll
from tests.helm.rendered import CHART, SCENARIOS, Json, config_text, documents, only, pod_specs
from tools.chart_pages import pages

SECRETS = {"auth": {"existingSecret": "keys"}, "catalog": {"existingSecret": "catalog"}}
BUCKET = {"store": {"type": "s3", "s3": {"url": "s3://adapters/x"}}}


def test_schema_and_readme_are_those_of_the_values() -> None:
    assert [file.name for file, text in pages() if file.read_text() != text] == []


def test_every_scenario_is_what_kubernetes_takes(scenarios: dict[str, Json]) -> None:
    assert len(scenarios) == len(SCENARIOS) >= 7
    for name, answer in scenarios.items():
        assert "error" not in answer, (name, answer)
        assert answer["invalid"] == [], name
        namespaces = {each["metadata"]["namespace"] for each in answer["documents"]}
        assert namespaces == {"prod"}


def test_every_scenario_s_settings_are_read_by_the_server(
    scenarios: dict[str, Json], tmp_path: Path
) -> None:
    for name, answer in scenarios.items():
        text = config_text(answer)
        file = tmp_path / f"{name}.toml"
        file.write_text(text)
        config = load_config({"config": str(file)})
        assert (config.port, config.admin_port, config.log_format) == (8000, 9000, "json")
        assert tomllib.loads(text)["drain_delay"] == 7


def test_pods_are_restricted(scenarios: dict[str, Json]) -> None:
    for answer in scenarios.values():
        for spec in pod_specs(answer):
            assert spec["automountServiceAccountToken"] is False
            assert spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] is True
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]


def test_a_stop_has_the_time_that_it_takes(scenarios: dict[str, Json]) -> None:
    spec = only(scenarios["replicas"], "Deployment")["spec"]
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 3 + 7 + 120 + 20
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "3"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 1200
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "admin"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "admin"}


def test_a_gpu_is_asked_for_and_its_taint_tolerated(scenarios: dict[str, Json]) -> None:
    pod = only(scenarios["gpu"], "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].endswith("-cuda")
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    config = config_text(scenarios["gpu"])
    assert 'device = "cuda"' in config


def test_replicas_share_a_catalog_and_a_bucket_and_spread(scenarios: dict[str, Json]) -> None:
    answer = scenarios["replicas"]
    deployment = only(answer, "Deployment")["spec"]
    assert deployment["replicas"] == 3
    pod = deployment["template"]["spec"]
    env = {each["name"]: each for each in pod["containers"][0]["env"]}
    assert env["QUICKCHANGE_CATALOG"]["valueFrom"]["secretKeyRef"]["name"] == "quickchange-catalog"
    assert pod["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname"
    assert documents(answer, "PersistentVolumeClaim") == []
    assert only(answer, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    policy = only(answer, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    admin = next(each for each in policy["ingress"] if each["ports"] == [{"port": "admin"}])
    assert "namespaceSelector" in admin["from"][0]


def test_a_network_policy_lets_in_the_release_s_own_pods(render_all: RenderAll) -> None:
    train = {"enabled": True, "configMap": "recipe", "name": "verdict"}
    prometheus = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "m"}}}]
    closed = {"enabled": True, "apiFrom": prometheus, "adminFrom": prometheus}
    (answer,) = render_all([{"auth": {"insecure": True}, "networkPolicy": closed, "train": train}])
    labels = {
        "test": only(answer, "Pod")["metadata"]["labels"],
        "train": only(answer, "Job")["spec"]["template"]["metadata"]["labels"],
    }
    ports = {
        kind: {
            port["port"]
            for rule in only(answer, "NetworkPolicy")["spec"]["ingress"]
            for peer in rule["from"]
            if "podSelector" in peer
            and peer["podSelector"]["matchLabels"].items() <= pod_labels.items()
            for port in rule["ports"]
        }
        for kind, pod_labels in labels.items()
    }
    assert ports == {"test": {"http", "admin"}, "train": {"http"}}


def test_a_gateway_s_picker_is_told_which_port_to_read(scenarios: dict[str, Json]) -> None:
    answer = scenarios["gateway"]
    pool = only(answer, "InferencePool")["spec"]
    assert pool["targetPorts"] == [{"number": 8000}]
    assert pool["endpointPickerRef"] == {"name": "quickchange-epp", "port": {"number": 9002}}
    (rule,) = only(answer, "HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", "qc-quickchange")
    assert "--model-server-metrics-port=9000" in answer["notes"]
    assert "--model-server-metrics-port" not in scenarios["replicas"]["notes"]


def test_threads_follow_the_request_for_cpus_where_there_is_one(render_all: RenderAll) -> None:
    insecure = {"auth": {"insecure": True}}
    named, without = render_all(
        [insecure, insecure | {"resources": {"requests": {"cpu": None, "memory": "1Gi"}}}]
    )
    for answer, is_there in ((named, True), (without, False)):
        (container,) = only(answer, "Deployment")["spec"]["template"]["spec"]["containers"]
        assert any(each["name"] == "OMP_NUM_THREADS" for each in container["env"] or []) is is_there


def test_the_dashboard_and_the_alerts_are_the_project_s(scenarios: dict[str, Json]) -> None:
    answer = scenarios["replicas"]
    rules = yaml.safe_load((CHART / "rules/quickchange.rules.yaml").read_text())
    assert only(answer, "PrometheusRule")["spec"] == rules
    dashboard = next(
        each
        for each in documents(answer, "ConfigMap")
        if each["metadata"]["name"].endswith("dashboard")
    )
    shown = json.loads(dashboard["data"]["quickchange.json"])
    assert shown == json.loads((CHART / "dashboards/quickchange.json").read_text())
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_whoever_scales_owns_the_number(scenarios: dict[str, Json]) -> None:
    for name in ("hpa", "keda"):
        assert "replicas" not in only(scenarios[name], "Deployment")["spec"]
    hpa = only(scenarios["hpa"], "HorizontalPodAutoscaler")["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 6)
    scaled = only(scenarios["keda"], "ScaledObject")["spec"]
    query = scaled["triggers"][0]["metadata"]["query"]
    assert 'namespace="prod"' in query
    assert 'pod=~"qc-quickchange-.*"' in query


def test_the_train_job_has_rank_and_alpha_and_pushes(scenarios: dict[str, Json]) -> None:
    job = only(scenarios["train"], "Job")["spec"]["template"]
    (container,) = job["spec"]["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert (env["LORA_RANK"], env["LORA_ALPHA"]) == ("16", "32")
    words = container["args"]
    assert words[:2] == ["train", "/recipe/recipe.toml"]
    assert words[words.index("--push") + 1] == "http://qc-quickchange.prod.svc:8000"
    assert words[words.index("--alias") + 1] == "candidate"
    deployed = only(scenarios["train"], "Deployment")["spec"]["selector"]["matchLabels"]
    assert not deployed.items() <= job["metadata"]["labels"].items()  # no traffic for the job


REFUSED: dict[str, Json] = {
    "one of them": SECRETS
    | BUCKET
    | {"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True}}},
    "SQLite serves one": {"auth": {"insecure": True}, "replicas": 2},
    "all can write": SECRETS | {"replicas": 2},
    "set store.s3.url": SECRETS | {"store": {"type": "s3"}},
    "lost with the pod": {"auth": {"insecure": True}} | BUCKET,
    "set auth.existingSecret": {},
    "contradict": {"auth": {"existingSecret": "keys", "insecure": True}},
    "block every drain": {"auth": {"insecure": True}, "podDisruptionBudget": {"enabled": True}},
    "scrape every server twice": {
        "auth": {"insecure": True},
        "metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
    },
    "is more than": {"auth": {"insecure": True}, "autoscaling": {"minReplicas": 9}},
    "set gateway.enabled": {
        "auth": {"insecure": True},
        "gateway": {"httpRoute": {"enabled": True}},
    },
    "parentRefs": {
        "auth": {"insecure": True},
        "gateway": {"enabled": True, "httpRoute": {"enabled": True}},
    },
    "train.name": {"auth": {"insecure": True}, "train": {"enabled": True}},
    "the chart sets this itself": {"auth": {"insecure": True}, "config": {"port": 1}},
    "replica": {"auth": {"insecure": True}, "replica": 2},
    "strategy": {"auth": {"insecure": True}, "strategy": {"type": "Now"}},
    "replicas": {"auth": {"insecure": True}, "replicas": "two"},
}
"""What must not be deployed, by words of the reason; the last three are the schema's."""


def test_what_must_not_be_deployed_is_refused_with_the_reason(
    render_all: RenderAll,
) -> None:
    for words, answer in zip(REFUSED, render_all(list(REFUSED.values())), strict=True):
        assert words in answer.get("error", f"rendered {words}"), words


def test_settings_and_environment_are_passed_on(render_all: RenderAll, tmp_path: Path) -> None:
    values = {
        "auth": {"insecure": True},
        "config": {
            "max_batch_rows": 64,
            "kv_cache_bytes": "2GiB",
            "log_format": "text",
            "adapter": {"legal": "/srv/legal"},
            "cors_origin": ["https://a.example"],
            "strict_fields": True,
        },
        "extraEnv": [{"name": "HF_TOKEN", "value": "x"}],
        "base": {"preloaded": True},
        "drain": {"preStopSeconds": 0},
    }
    (answer,) = render_all([values])
    file = tmp_path / "settings.toml"
    file.write_text(config_text(answer))
    config = load_config({"config": str(file)})
    assert (config.max_batch_rows, config.kv_cache_bytes) == (64, 2 << 30)
    assert config.log_format == "text"
    assert [(each.name, str(each.folder)) for each in config.adapter] == [("legal", "/srv/legal")]
    assert (config.cors_origin, config.strict_fields) == (("https://a.example",), True)
    (container,) = only(answer, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"name": "HF_TOKEN", "value": "x"} in container["env"]
    assert "lifecycle" not in container
    assert "/var/cache/quickchange/models" not in {
        each["mountPath"] for each in container["volumeMounts"]
    }
