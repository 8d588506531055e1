"""Fixtures of the client: a fake server, on a socket and without one, and folders to upload."""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from quickchange_client import AsyncQuickchange, Quickchange, RetryPolicy
from typer.testing import CliRunner, Result

from tests.clients.app_thread import AppSlot, serve_app
from tests.clients.fake_server import FakeServer
from tests.clients.real_server import real_server

FAST_RETRIES = RetryPolicy(max_retries=2, base_wait_s=0.001)
WEIGHTS = bytes(range(256)) * 4096

RunCommand = Callable[..., Result]


@pytest.fixture
def fake_server() -> FakeServer:
    """Return a fake server with nothing in it."""
    return FakeServer()


@pytest.fixture(scope="session")
def app_socket() -> Iterator[tuple[AppSlot, str]]:
    """Return a socket that stays open for all tests, and the slot for the app behind it."""
    slot = AppSlot()
    with serve_app(slot) as url:
        yield slot, url


@pytest.fixture
def server_url(app_socket: tuple[AppSlot, str], fake_server: FakeServer) -> str:
    """Return the address of the fake server on a real socket."""
    slot, url = app_socket
    slot.app = fake_server.app
    return url


@pytest.fixture(scope="session")
def real_server_url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of the real server, with a tiny base under the built-in one's name."""
    store = tmp_path_factory.mktemp("real-server") / "store"
    with real_server(tiny_base, store, "smollm2-135m") as url:
        yield url


@pytest.fixture
def client(server_url: str) -> Iterator[Quickchange]:
    """Return a client of the fake server, over a real socket."""
    with Quickchange(server_url, retry=FAST_RETRIES) as client:
        yield client


@pytest.fixture
async def async_client(fake_server: FakeServer) -> AsyncIterator[AsyncQuickchange]:
    """Return an async client of the fake server, without a socket."""
    transport = httpx.ASGITransport(fake_server.app)
    url = "http://fake"
    async with AsyncQuickchange(url, retry=FAST_RETRIES, transport=transport) as client:
        yield client


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """Return a folder with the files of an adapter; the weights are a megabyte of anything."""
    return write_adapter(tmp_path / "adapter")


def write_adapter(folder: Path, weights: bytes = WEIGHTS) -> Path:
    """Write the files of an adapter, as far as the client looks at them."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """Return an adapter with other bytes."""
    return write_adapter(tmp_path / "other", b"other" + WEIGHTS)


@pytest.fixture
def pickle_folder(tmp_path: Path) -> Path:
    """Return a folder whose weights are a pickle under a safetensors' name."""
    return write_adapter(tmp_path / "pickle", b"\x80\x04pickle")


@pytest.fixture
def run_command(server_url: str) -> RunCommand:
    """Return a function that runs `quickchange` against the fake server."""
    from quickchange_client.cli import app

    def run(*words: str, input: str | None = None, **variables: str) -> Result:
        env = {"QUICKCHANGE_URL": server_url, "COLUMNS": "200", "NO_COLOR": "1", **variables}
        return CliRunner().invoke(app, list(words), input=input, env=env)

    return run


@pytest.fixture
def command_env(server_url: str) -> dict[str, str]:
    """Return an environment for `quickchange` in a process of its own."""
    return {**os.environ, "QUICKCHANGE_URL": server_url, "COLUMNS": "200", "NO_COLOR": "1"}
