"""The Dockerfile is built by a container engine, and the image is run as the chart runs it."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from quickchange_adapters.native.build import BuildFailed, check_cpu

from tests.clients.real_server import free_port
from tests.conftest import MakeAdapter, save_tiny_base
from tests.ops.container_engine import RESTRICTED, Container, ContainerEngine
from tests.ops.environments import NotHere

USER = 10001
KEY = "k" * 32
HEADERS = {"authorization": f"Bearer {KEY}"}
READY_S = 180
LOAD_KERNELS = "import torch; from quickchange_adapters.native.library import *; load_library()"
MODELS, STORE = "/var/cache/quickchange/models", "/var/lib/quickchange"


@pytest.fixture(scope="session")
def engine() -> Iterator[ContainerEngine]:
    try:
        engine = ContainerEngine()
    except NotHere as reason:
        pytest.skip(f"no container engine: {reason}")
    yield engine
    if not os.environ.get("QUICKCHANGE_KEEP_IMAGES"):
        engine.remove_built()


@pytest.fixture(scope="session")
def image(engine: ContainerEngine) -> str:
    return engine.build("quickchange")


class Volumes:
    """What is kept outside of the container, owned by the image's user."""

    def __init__(self, folder: Path) -> None:
        self.models, self.store, self.key = (folder / name for name in ("models", "store", "key"))
        save_tiny_base(self.models / "tiny", max_position_embeddings=4096)
        self.store.mkdir()
        self.key.write_text(KEY)
        self.key.chmod(0o400)
        for each in [folder, *folder.rglob("*")]:
            shutil.chown(each, USER, USER)

    def options(self, port: int) -> list[str]:
        """Return how they are mounted, and the settings that go with them."""
        settings = {
            "HOST": "127.0.0.1",
            "PORT": port,
            "MODEL": f"{MODELS}/tiny",
            "ADMIN_KEY_FILE": "/run/admin.key",
            "DRAIN_TIMEOUT": 120,
            "DTYPE": "bfloat16",
        }
        mounts = {self.models: MODELS, self.store: STORE, self.key: "/run/admin.key:ro"}
        return [
            "--env=OMP_NUM_THREADS=1",
            *(f"--env=QUICKCHANGE_{name}={value}" for name, value in settings.items()),
            *(f"--volume={here}:{there}" for here, there in mounts.items()),
        ]


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Volumes]:
    folder = tmp_path_factory.mktemp("volumes")
    yield Volumes(folder)
    shutil.rmtree(folder)


@contextmanager
def serving(
    engine: ContainerEngine, image: str, *options: str, port: int
) -> Iterator[tuple[Container, str]]:
    """Give a container that is ready, and its address."""
    url = f"http://127.0.0.1:{port}"
    with engine.running(image, *options) as container:
        wait_for(lambda: is_ready(url) or not container.is_running())
        assert container.is_running(), container.logs()
        yield container, url


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + READY_S
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.5)


def ask(url: str, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "the quick", "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=120)


def upload(url: str, name: str, folder: Path) -> None:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    address = f"{url}/v1/adapters"
    answer = httpx.post(address, data={"name": name}, files=files, headers=HEADERS, timeout=60)
    assert answer.status_code == 201, answer.text


def has_native_cpu() -> bool:
    try:
        check_cpu()
    except BuildFailed:
        return False
    return True


def test_it_serves_as_a_user_without_rights_on_a_read_only_root(
    engine: ContainerEngine, image: str, volumes: Volumes, make_adapter: MakeAdapter
) -> None:
    port = free_port()
    options = [*RESTRICTED, *volumes.options(port)]
    with serving(engine, image, *options, port=port) as (container, url):
        assert ask(url, "tiny").status_code == 200
        upload(url, "ada", make_adapter(volumes.models / "tiny", seed=1))
        changed = ask(url, "ada").json()["choices"][0]["text"]
        assert changed != ask(url, "tiny").json()["choices"][0]["text"]
        status = container.execute("cat", "/proc/1/status")
        assert f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}" in status
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        with pytest.raises(RuntimeError, match="Read-only file system"):
            container.execute("touch", "/opt/quickchange/x")
        (kind, *check) = engine.inspect(image)["Healthcheck"]["Test"]
        assert kind == "CMD"
        container.execute(*check)
        if has_native_cpu():
            container.execute("python", "-c", LOAD_KERNELS)
        assert "Read-only file system" not in container.logs()
        assert container.stop(60) == 0
    with serving(engine, image, *options, port=port) as (_, url):
        assert ask(url, "ada").json()["choices"][0]["text"] == changed


def test_a_stop_lets_a_stream_end_and_nothing_is_written_beside_the_volumes(
    engine: ContainerEngine, image: str, volumes: Volumes, make_adapter: MakeAdapter
) -> None:
    port = free_port()
    options = ["--tmpfs=/tmp", *volumes.options(port)]
    with serving(engine, image, *options, port=port) as (container, url):
        upload(url, "bob", make_adapter(volumes.models / "tiny", seed=2))
        assert ask(url, "bob").status_code == 200
        body = {"model": "bob", "prompt": "the", "max_tokens": 1500, "ignore_eos": True}
        address = f"{url}/v1/completions"
        with (
            ThreadPoolExecutor(1) as pool,
            httpx.stream(
                "POST", address, json=body | {"stream": True}, headers=HEADERS, timeout=120
            ) as answer,
        ):
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines).startswith("data: ")
            code = pool.submit(container.stop, 100)
            assert list(lines)[-1] == "data: [DONE]"
            assert code.result() == 0
        mounts = {"/tmp", "/var/lib", "/var/cache/quickchange", MODELS, STORE}
        mounts |= {"/run", "/run/admin.key", "/etc", "/var", "/var/cache"}
        assert container.changes() - mounts == set()


def test_a_healthcheck_fails_where_nothing_answers(engine: ContainerEngine, image: str) -> None:
    (_, *check) = engine.inspect(image)["Healthcheck"]["Test"]
    sleeping = ["--entrypoint=sleep", f"--env=QUICKCHANGE_PORT={free_port()}"]
    with (
        engine.running(image, *sleeping, command=("600",)) as container,
        pytest.raises(RuntimeError, match="exit code 1"),
    ):
        container.execute(*check)


def test_code_alone_changes_small_layers_only(engine: ContainerEngine, image: str) -> None:
    layers = json.loads(engine.podman("history", "--no-trunc", "--format=json", image))
    sizes = [layer["size"] for layer in layers]
    above = sizes[: sizes.index(max(sizes))]  # the largest are the libraries
    assert 0 < sum(above) < 10 << 20
    assert sum(sizes) < 3 << 30


def test_a_preloaded_base_serves_without_any_volume_or_network(engine: ContainerEngine) -> None:
    image = engine.build("quickchange-demo", PRELOAD_BUILTIN=1)
    port = free_port()
    settings = {"HOST": "127.0.0.1", "PORT": port}
    options = [f"--env=QUICKCHANGE_{name}={value}" for name, value in settings.items()]
    options += [*RESTRICTED, "--env=PIP_NO_INDEX=1"]
    with serving(engine, image, *options, port=port) as (container, url):
        assert ("Steps: native kernels" in container.logs()) is has_native_cpu()
        answer = ask(url, "smollm2-135m", prompt="The capital of France is")
        assert "Paris" in answer.json()["choices"][0]["text"]
