"""The Ray application on a real local Ray: two engines, one of which is killed; and autoscaling."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.clients.real_server import free_port
from tests.conftest import MakeAdapter, save_tiny_base
from tests.documentation import page
from tests.ops.environments import NotHere, python_beside
from tests.ops.ray_site import RaySite, ray_site, serve_command

SEEN_S = 90.0
LONG = 3000
REPLICA = "x-quickchange-replica"
CANCELLED = 'quickchange_requests_total{outcome="cancelled"}'
RUNNING = "quickchange_requests_running"
TOKENS = "quickchange_generation_tokens_total"


@pytest.fixture(scope="session")
def python() -> Path:
    try:
        return python_beside("ray", "ray[serve]")
    except NotHere as reason:
        pytest.skip(f"no Ray: {reason}")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-base") / "base"
    return save_tiny_base(folder, max_position_embeddings=4096)


@pytest.fixture(scope="session")
def pair(
    python: Path, base: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RaySite]:
    """Start two engines that both know the adapters ada and bob."""
    folder = tmp_path_factory.mktemp("pair")
    with ray_site(python, [*arguments(base, folder), "min_replicas=2"], folder) as site:
        for number, name in enumerate(("ada", "bob")):
            upload(site, name, make_adapter(base, seed=number))
        yield site


def arguments(base: Path, folder: Path) -> list[str]:
    store, cache = f"store={folder / 'store'}", f"cache={folder / 'cache'}"
    return [f"model={base}", "served-model-name=tiny", "device=cpu", store, cache]


def upload(site: RaySite, name: str, folder: Path) -> None:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    url = f"{site.url}/v1/adapters"
    answer = httpx.post(url, data={"name": name}, files=files, timeout=60)
    assert answer.status_code == 201, answer.text
    time.sleep(2.5)  # a server promises to know within two seconds what others were given


def ask(site: RaySite, model: str, max_tokens: int = 8) -> httpx.Response:
    return ask_at(site.url, model, max_tokens)


def ask_at(url: str, model: str, max_tokens: int = 8) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body_of(model, max_tokens), timeout=120)


def body_of(model: str, max_tokens: int, **fields: object) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": "the quick brown",
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        **fields,
    }


def stream(
    site: RaySite, model: str, max_tokens: int, on_first: Callable[[str], None]
) -> tuple[str, list[Any]]:
    """Read a stream to its end; return its text and its errors. `on_first` is told the replica."""
    text, errors, is_done = "", [], False
    body = body_of(model, max_tokens, stream=True)
    url = f"{site.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for number, line in enumerate(line for line in answer.iter_lines() if line):
            if number == 0:
                on_first(answer.headers[REPLICA])
            data = line.removeprefix("data: ")
            is_done = data == "[DONE]"
            event = {} if is_done or data.startswith(":") else json.loads(data)
            text += event["choices"][0]["text"] if "choices" in event else ""
            errors += [event["error"]] if "error" in event else []
    assert is_done != bool(errors)
    return text, errors


def counters(site: RaySite, replica: str) -> dict[str, float]:
    """Return one replica's metrics, by asking until it is the one that answers."""
    for _ in range(100):
        answer = httpx.get(f"{site.url}/metrics", timeout=60)
        if answer.headers[REPLICA] == replica:
            lines = (line for line in answer.text.splitlines() if not line.startswith("#"))
            found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
            return {CANCELLED: 0.0, **found}
    raise AssertionError(f"{replica} answers none of a hundred requests")


def versions(url: str) -> list[httpx.Response]:
    return [httpx.get(f"{url}/version", timeout=60) for _ in range(20)]


def wait_for(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + SEEN_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.3)


def test_an_adapter_keeps_to_the_replica_that_has_it_and_the_base_does_not(pair: RaySite) -> None:
    homes = {}
    for name in ("ada", "bob"):
        assert ask(pair, name).status_code == 200
        time.sleep(1)  # Ray tells its routers ten times a second
        answers = [ask(pair, name) for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        (homes[name],) = {answer.headers[REPLICA] for answer in answers}
    assert set(homes.values()) == set(pair.engines())
    with httpx.Client(base_url=pair.url) as client:
        assert pair.replicas(client, 40) == set(pair.engines())


def test_a_stream_has_the_text_of_the_whole_answer(pair: RaySite) -> None:
    streamed, errors = stream(pair, "ada", 24, lambda replica: None)
    assert not errors
    assert streamed == ask(pair, "ada", 24).json()["choices"][0]["text"]


def test_a_stream_comes_as_it_is_made(pair: RaySite) -> None:
    started_s, first_s = time.monotonic(), []
    stream(pair, "ada", LONG, lambda replica: first_s.append(time.monotonic()))
    assert first_s[0] - started_s < (time.monotonic() - started_s) / 2


def test_a_caller_that_leaves_a_stream_is_computed_for_no_longer(pair: RaySite) -> None:
    body = body_of("ada", LONG, stream=True)
    (home,) = {ask(pair, "ada", 1).headers[REPLICA] for _ in range(4)}
    before = counters(pair, home)
    with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.headers[REPLICA] == home
        assert next(line for line in answer.iter_lines() if line).startswith("data: ")
    wait_for(lambda: counters(pair, home)[CANCELLED] == before[CANCELLED] + 1)
    after = counters(pair, home)
    assert after[RUNNING] == 0
    assert 0 < after[TOKENS] - before[TOKENS] < LONG / 2


def test_errors_and_routes_are_the_servers(pair: RaySite) -> None:
    unknown = ask(pair, "nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    foreign = httpx.get(f"{pair.url}/v1/models", headers={"host": "evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_host")
    large = httpx.post(f"{pair.url}/v1/completions", content=b" " * (9 << 20), timeout=60)
    assert large.status_code == 413
    models = httpx.get(f"{pair.url}/v1/models").json()["data"]
    assert {"tiny", "ada", "bob"} <= {model["id"] for model in models}


def test_a_killed_replica_loses_only_its_own_streams_and_comes_back(pair: RaySite) -> None:
    expected = {name: ask(pair, name, LONG).json()["choices"][0]["text"] for name in ("ada", "bob")}
    homes: dict[str, str] = {}
    engines = pair.engines()

    def run(name: str) -> tuple[str, list[Any]]:
        return stream(pair, name, LONG, lambda replica: homes.update({name: replica}))

    with ThreadPoolExecutor(2) as pool:
        streams = {name: pool.submit(run, name) for name in ("ada", "bob")}
        wait_for(lambda: len(homes) == 2)
        assert homes["ada"] != homes["bob"]
        engines[homes["ada"]].kill()
        results = {name: each.result() for name, each in streams.items()}
    text, errors = results["ada"]
    assert [error["code"] for error in errors] == ["unavailable"]
    assert len(text) < len(expected["ada"])
    assert results["bob"] == (expected["bob"], [])
    wait_for(lambda: len(pair.engines()) == 2)
    assert homes["ada"] not in pair.engines()
    with httpx.Client(base_url=pair.url, timeout=60) as client:
        wait_for(lambda: pair.replicas(client, 20) == set(pair.engines()))
    assert ask(pair, "ada", LONG).json()["choices"][0]["text"] == expected["ada"]


def test_load_adds_an_engine(python: Path, base: Path, tmp_path: Path) -> None:
    layout = ["min_replicas=1", "max_replicas=2", "target_ongoing_requests=1", "upscale_delay_s=1"]
    with ray_site(python, [*arguments(base, tmp_path), *layout], tmp_path) as site:
        assert len(site.engines()) == 1
        end_s = time.monotonic() + SEEN_S

        def load() -> None:
            while len(site.engines()) < 2 and time.monotonic() < end_s:
                assert ask(site, "tiny", 500).status_code == 200

        with ThreadPoolExecutor(4) as clients:
            for each in [clients.submit(load) for _ in range(4)]:
                each.result()
        with httpx.Client(base_url=site.url, timeout=60) as client:
            wait_for(lambda: len(site.replicas(client, 20)) == 2)


def test_serve_run_takes_the_file_of_the_page(python: Path, base: Path, tmp_path: Path) -> None:
    (block,) = page("docs/scale-out-ray.md").blocks("yaml")
    config = yaml.safe_load(block.text)
    port = free_port()
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    assert application["args"]["model"] == "/models/base"
    ours = {"model": str(base), "store": str(tmp_path / "store"), "min_replicas": 1}
    application["args"] |= {**ours, "max_replicas": 1, "cache": str(tmp_path / "cache")}
    (tmp_path / "application.yaml").write_text(yaml.safe_dump(config))
    with serve_command(python, [str(tmp_path / "application.yaml")], tmp_path, port) as url:
        assert ask_at(url, "base").status_code == 200


def test_serve_run_takes_the_command_of_the_page(python: Path, base: Path, tmp_path: Path) -> None:
    lines = page("docs/scale-out-ray.md").code_lines()
    words = next(line for line in lines if line.startswith("serve run ")).split()[2:]
    places = {"builtin:smollm2-135m": str(base), "/srv/quickchange": str(tmp_path / "store")}
    for there, here in places.items():
        assert any(word.endswith(f"={there}") for word in words)
        words = [word.replace(there, here) for word in words]
    with serve_command(python, [*words, f"cache={tmp_path / 'cache'}"], tmp_path, 8000) as url:
        assert ask_at(url, "base").status_code == 200
        wait_for(lambda: len({answer.headers[REPLICA] for answer in versions(url)}) == 2)
