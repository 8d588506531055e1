"""The gateway's model-server protocol, held against real servers as an endpoint picker reads them.

Source: Gateway API Inference Extension, proposal 003 (model-server protocol).
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from quickchange_server.metrics_text import MAX_AGE_S

from tests.conftest import MakeAdapter
from tests.integration.endpoint_picker import (
    CACHE,
    KV_USAGE,
    LORA,
    QUEUED,
    RUNNING,
    Endpoint,
    pick,
    scrape,
)
from tests.server.server_process import Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SEEN_S = 20.0


@pytest.fixture(scope="module")
def servers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers on one store and catalog."""
    root = tmp_path_factory.mktemp("gateway")
    options = ["--model", str(tiny_base), "--store", str(root / "store")]
    options += ["--adapter-device-bytes", "4MiB"]
    started = []
    try:
        for name in ("one", "two"):
            (root / name).mkdir()
            started.append(Server(options, root / name))
        yield [server.wait_ready() for server in started]
    finally:
        for server in started:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def first_scrapes(servers: list[Server]) -> list[str]:
    """What both showed before anybody asked for anything."""
    return [httpx.get(f"{server.url}/metrics").text for server in servers]


@pytest.fixture(scope="module")
def adapters(
    servers: list[Server], first_scrapes: list[str], make_adapter: MakeAdapter
) -> dict[str, str]:
    """Adapters that both servers know, with their digests; `ada@prod` is an alias."""
    digests = {}
    for seed, name in enumerate(("ada", "bob", "eve")):
        answer = push(servers[0], make_adapter(seed=seed), name, alias="prod")
        assert answer.status_code == 201, answer.text
        digests[name] = answer.json()["digest"]
    for name in digests:
        wait_until(partial(is_served, servers[1], name))
    for server in servers:
        for name in digests:
            act(server, name, "unload")
    return digests


def push(server: Server, folder: Path, name: str, **fields: str) -> httpx.Response:
    files = {
        "adapter_config": (CONFIG, (folder / CONFIG).read_bytes()),
        "adapter_model": (WEIGHTS, (folder / WEIGHTS).read_bytes()),
    }
    data = {"name": name, **fields}
    return httpx.post(f"{server.url}/v1/adapters", data=data, files=files, timeout=60)


def act(server: Server, name: str, action: str, **body: Any) -> None:
    url = f"{server.url}/v1/adapters/{name}/{action}"
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SEEN_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_served(server: Server, name: str) -> bool:
    return server.generate(name, max_tokens=1).status_code == 200


def holds(server: Server, models: set[str]) -> bool:
    return scrape(server.url).ready == models


def scrape_anew(servers: list[Server]) -> list[Endpoint]:
    """Read gauges that were rendered after now."""
    time.sleep(MAX_AGE_S + 0.1)
    return [scrape(server.url) for server in servers]


def test_every_gauge_is_there_with_zero_before_the_first_request(first_scrapes: list[str]) -> None:
    for text in first_scrapes:
        lines = text.splitlines()
        for name in (QUEUED, RUNNING, KV_USAGE):
            assert f"{name} 0.0" in lines
        for name in (QUEUED, RUNNING, KV_USAGE, CACHE, LORA):
            assert f"# TYPE {name} gauge" in lines
        (lora,) = (line for line in lines if line.startswith(f"{LORA}{{"))
        assert 'running_lora_adapters=""' in lora
        assert 'waiting_lora_adapters=""' in lora


def test_completions_and_chat_serve_the_base_and_an_adapter_named_in_model(
    servers: list[Server], adapters: dict[str, str]
) -> None:
    answers = {}
    for model in ("tiny-llama", "ada", "ada@prod", "ada:1"):
        chat = {"model": model, "messages": [{"role": "user", "content": "the quick"}]}
        chat_answer = httpx.post(
            f"{servers[0].url}/v1/chat/completions",
            json={**chat, "max_tokens": 8, "temperature": 0},
            timeout=60,
        )
        completion = servers[0].generate(model, max_tokens=8)
        for answer in (chat_answer, completion):
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            digest = answer.headers.get("x-quickchange-adapter-digest")
            assert digest == (None if model == "tiny-llama" else adapters["ada"])
        answers[model] = completion.json()["choices"][0]["text"]
    assert answers["ada"] == answers["ada@prod"] == answers["ada:1"] != answers["tiny-llama"]


def test_one_lora_series_lists_what_is_resident_however_adapters_come_and_go(
    servers: list[Server], adapters: dict[str, str]
) -> None:
    server = servers[0]
    for name in adapters:
        act(server, name, "unload")
    for name in [*adapters] * 2:
        act(server, name, "load", tier="device")
        wait_until(partial(holds, server, {name, f"{name}@prod"}))
        assert httpx.get(f"{server.url}/metrics").text.count(f"\n{LORA}{{") == 1
        act(server, name, "unload")
        wait_until(partial(holds, server, set()))
    for name in adapters:
        act(server, name, "load", tier="device")
    shown = scrape_anew([server])[0]
    assert shown.ready == {model for name in adapters for model in (name, f"{name}@prod")}
    assert shown.max_adapters > len(adapters)


@pytest.mark.parametrize("name", ["ada,bob", "ada bob", "ada\tbob"])
def test_a_name_that_the_lists_could_not_hold_is_refused(
    servers: list[Server], make_adapter: MakeAdapter, name: str
) -> None:
    answer = push(servers[0], make_adapter(seed=0), name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")


def test_scrapes_every_50_ms_are_answered_while_streams_run(
    servers: list[Server], adapters: dict[str, str]
) -> None:
    url = servers[0].url
    seen = []

    def stream(model: str) -> None:
        body = {"model": model, "prompt": "the", "stream": True, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "max_tokens": 400}, timeout=120
        ) as answer:
            assert list(answer.iter_lines())[-2] == "data: [DONE]"

    threads = [threading.Thread(target=stream, args=(name,)) for name in adapters]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(scrape(url))
        time.sleep(0.05)
    assert max(each.num_running for each in seen) == len(adapters)
    assert max(each.kv_usage for each in seen) > 0
    wait_until(lambda: scrape(url).num_running == 0)


def test_a_picker_sends_a_request_to_the_server_that_holds_its_adapter(
    servers: list[Server], adapters: dict[str, str]
) -> None:
    for server in servers:
        for name in adapters:
            act(server, name, "unload")
    holders = {"ada": servers[1], "bob": servers[0]}
    for name, holder in holders.items():
        act(holder, name, "load", tier="device")
    endpoints = scrape_anew(servers)
    for name, holder in holders.items():
        for model in (name, f"{name}@prod"):
            picked = pick(endpoints, model)
            assert picked.url == holder.url
            assert sorted(each.affinity(model) for each in endpoints) == [0.8, 1.0]
            answer = httpx.post(
                f"{picked.url}/v1/completions", json={"model": model, "prompt": "the"}, timeout=60
            )
            assert answer.headers["x-quickchange-adapter-digest"] == adapters[name]
    holdings = [endpoint.ready for endpoint in scrape_anew(servers)]
    assert holdings == [{"bob", "bob@prod"}, {"ada", "ada@prod"}]  # nobody loaded a second copy
    # Nobody holds it: any server serves it, and is the one to ask from then on.
    assert {each.affinity("eve") for each in endpoints} == {0.8}
    assert servers[0].generate("eve", max_tokens=1).status_code == 200
    assert pick(scrape_anew(servers)[::-1], "eve").url == servers[0].url
    act(servers[1], "bob", "load", tier="device")
    act(servers[0], "bob", "unload")
    assert pick(scrape_anew(servers), "bob").url == servers[1].url
