"""Two server processes on one store and one catalog see what the other was asked to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.real_server import real_server
from tests.conftest import MakeAdapter

SEEN_S = 10.0
"""The promise is two seconds; a busy machine that runs tests gets five times that."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def servers(tiny_base: Path, tmp_path: Path) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Start two servers as people do, and give a client of each."""
    with ExitStack() as stack:
        urls = [
            stack.enter_context(real_server(tiny_base, tmp_path / "store", "tiny", name=name))
            for name in ("first", "second")
        ]
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=30)) for url in urls]
        yield clients[0], clients[1]


def push(client: httpx.Client, folder: Path, **fields: str) -> Any:
    files = {
        "adapter_config": (CONFIG, (folder / CONFIG).read_bytes()),
        "adapter_model": (WEIGHTS, (folder / WEIGHTS).read_bytes()),
    }
    answer = client.post("/v1/adapters", data={"name": "ada", **fields}, files=files)
    assert answer.status_code == 201, answer.text
    return answer.json()


def act(client: httpx.Client, action: str) -> None:
    answer = client.post(f"/v1/adapters/ada/{action}")
    assert answer.status_code == 200, answer.text


def version(client: httpx.Client, number: int) -> Any:
    return client.get(f"/v1/adapters/ada/versions/{number}").json()


def generate(client: httpx.Client, model: str = "ada") -> httpx.Response:
    body = {"model": model, "prompt": "the quick brown", "temperature": 0, "max_tokens": 8}
    return client.post("/v1/completions", json=body)


def digest_of(client: httpx.Client) -> str | None:
    digest: str | None = generate(client).headers.get("x-quickchange-adapter-digest")
    return digest


def seen(is_true: Callable[[], bool]) -> str:
    """Wait until the other server shows something; return how long that took."""
    started = time.monotonic()
    while not is_true():
        assert time.monotonic() - started < SEEN_S
        time.sleep(0.05)
    return f"{time.monotonic() - started:.2f} s"


def test_each_sees_what_the_other_was_asked_to_do(
    servers: tuple[httpx.Client, httpx.Client], make_adapter: MakeAdapter
) -> None:
    one, two = servers
    took = {}
    first = push(one, make_adapter(seed=1))
    took["upload"] = seen(lambda: digest_of(two) == first["digest"])
    assert generate(one).json()["choices"] == generate(two).json()["choices"]
    second = push(two, make_adapter(seed=2))
    took["second upload"] = seen(lambda: version(one, 2).get("digest") == second["digest"])
    moved = two.put("/v1/adapters/ada/aliases/default", json={"version": 2})
    assert moved.status_code == 200
    took["alias move"] = seen(lambda: digest_of(one) == second["digest"])
    act(one, "pin")
    took["pin"] = seen(lambda: version(two, 2)["pinned"] and version(two, 2)["bytes"]["host"] > 0)
    act(two, "merge")
    took["merge"] = seen(lambda: version(one, 2)["merged"])
    act(one, "unmerge")
    took["unmerge"] = seen(lambda: not version(two, 2)["merged"])
    act(two, "disable")
    took["disable"] = seen(lambda: generate(one).status_code == 404)
    assert version(one, 2)["state"] == "disabled"
    act(one, "enable")
    took["enable"] = seen(lambda: digest_of(two) == second["digest"])
    assert two.delete("/v1/adapters/ada").json()["deleted"]
    took["delete"] = seen(lambda: generate(one).status_code == 404)
    took["unload"] = seen(lambda: one.get("/v1/memory").json()["adapters"] == [])
    assert one.get("/v1/adapters/ada").status_code == 404
    print(took)
