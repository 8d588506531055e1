"""A whole server in a process of its own: start, answers, refusals, a stop that loses nothing."""

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from quickchange_server.config import load_config
from quickchange_server.errors import ConfigInvalid
from quickchange_server.serving import check_auto_merge, kernels_text, pick_device, ready_text

from tests.conftest import MakeAdapter, save_tiny_base
from tests.server.server_process import START_S, Server

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path, tiny_base: Path) -> Iterator[StartServer]:
    """Return a function that starts a server on the tiny base; they are gone after the test."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(Server(["--model", str(tiny_base), *arguments], folder))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_base_and_adapter_answer_and_sigterm_ends_with_0(
    start_server: StartServer, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(std=0.3)
    server = start_server("--adapter", f"bold={adapter}", "--served-model-name", "tiny")
    server.wait_ready()
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in models][:2] == ["tiny", "bold"]
    texts = {name: server.generate(name).json()["choices"][0]["text"] for name in ("tiny", "bold")}
    assert texts["tiny"] != texts["bold"]
    log = server.log.read_text()
    for words in ("KV cache", "merged copies", f"curl {server.url}/v1/models", '"model": "bold"'):
        assert words in log
    (worker,) = psutil.Process(server.process.pid).children()
    assert "quickchange_adapters.validation_worker" in worker.cmdline()
    assert server.stop() == 0
    assert psutil.wait_procs([worker], timeout=20)[1] == []
    assert server.log.read_text().endswith("stopped\n")
    assert "Traceback" not in server.log.read_text()


def test_stop_lets_a_running_stream_finish(start_server: StartServer, tiny_base: Path) -> None:
    server = start_server().wait_ready()
    lines: list[str] = []
    body = {"model": "tiny-llama", "prompt": "the", "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**body, "max_tokens": 400}, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if not lines:
                server.process.send_signal(signal.SIGTERM)
            lines.append(line)
    chunks = [line for line in lines if line.startswith("data: {")]
    assert '"finish_reason":"length"' in chunks[-1].replace(": ", ":")
    assert "data: [DONE]" in lines
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/livez")


def test_a_keyed_server_with_an_admin_port_drains_in_order(
    start_server: StartServer, tmp_path: Path
) -> None:
    secret = "0123456789abcdef" * 4
    file = tmp_path / "admin.key"
    file.write_text(secret + "\n")
    file.chmod(0o600)
    keys = ("--admin-key-file", str(file), "--admin-port", "0", "--host", "0.0.0.0")
    server = start_server(*keys).wait_ready()
    found = re.search(r"without a key: (http://\S+)/metrics", server.log.read_text())
    assert found is not None
    admin, headers = found[1], {"authorization": f"Bearer {secret}"}
    assert httpx.get(f"{admin}/metrics").status_code == 200
    assert httpx.get(f"{admin}/v1/models").status_code == 404
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 200
    body = {"model": "tiny-llama", "prompt": "the", "stream": True, "ignore_eos": True}
    was_ready_last = True
    with httpx.stream(
        *("POST", f"{server.url}/v1/completions"),
        json={**body, "max_tokens": 480, "n": 4},
        headers=headers,
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        while was_ready_last:
            next(lines)
            was_ready_last = httpx.get(f"{admin}/readyz").status_code == 200
        assert httpx.get(f"{server.url}/readyz").json()["error"]["code"] == "draining"
        assert "data: [DONE]" in list(lines)
    assert server.process.wait(30) == 0
    assert secret not in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_ctrl_c_ends_with_0(start_server: StartServer) -> None:
    assert start_server().wait_ready().stop(signal.SIGINT) == 0


def read_refusal(server: Server) -> str:
    """Wait for a server that cannot start; return its last line."""
    assert server.process.wait(START_S) == 1
    log = server.log.read_text()
    assert "Traceback" not in log
    return log.splitlines()[-1]


def test_taken_port_is_one_sentence_before_anything_is_loaded(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = read_refusal(start_server("--port", str(port)))
    assert sentence.startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")
    assert "--port" in sentence


def test_adapter_that_does_not_fit_is_one_sentence(
    start_server: StartServer, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    wider = save_tiny_base(tmp_path / "wider", hidden_size=96)
    adapter = make_adapter(base=wider)
    sentence = read_refusal(start_server("--adapter", f"wide={adapter}"))
    assert sentence.startswith("error: --adapter wide=")
    assert "shape" in sentence


def test_adapter_folder_that_is_not_there_is_one_sentence(start_server: StartServer) -> None:
    sentence = read_refusal(start_server("--adapter", "gone=/no/such/folder"))
    assert sentence.startswith("error: --adapter gone=/no/such/folder")


def test_catalog_that_does_not_answer_is_one_sentence_without_its_password(
    start_server: StartServer,
) -> None:
    server = start_server("--catalog", "postgresql://quick:s3cret@127.0.0.1:1/catalog")
    sentence = read_refusal(server)
    assert sentence == "error: --catalog: the catalog does not answer: there is no connection to it"
    assert "port 1 failed" in server.log.read_text()
    assert "s3cret" not in server.log.read_text()


def test_store_that_cannot_be_written_is_one_sentence(start_server: StartServer) -> None:
    sentence = read_refusal(start_server("--store", "/proc/no-store"))
    assert sentence.startswith("error: --store /proc/no-store: ")


def test_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="TORCH=cuda"):
        pick_device("cuda:99")


def test_the_start_says_which_kernels_compute_and_why_not_the_native_ones() -> None:
    assert kernels_text(None, "the CPU has no amx_bf16") == "Steps: native kernels"
    assert kernels_text(None, None) == "Steps: native kernels, products by AMX"
    reason = "no C++ compiler"
    assert kernels_text(reason, reason).endswith("not native ones: no C++ compiler")


def test_ready_text_offers_the_first_adapter_or_the_base() -> None:
    assert '"model": "sentiment"' in ready_text("http://x:1", "base", ["sentiment"], 1.0)
    assert '"model": "base"' in ready_text("http://x:1", "base", [], 1.0)


def test_ready_text_shows_where_the_key_goes() -> None:
    key = 'curl http://x:1/v1/models -H "authorization: Bearer $QUICKCHANGE_API_KEY"'
    assert key in ready_text("http://x:1", "base", [], 1.0, has_keys=True)
    assert "authorization" not in ready_text("http://x:1", "base", [], 1.0)


def test_what_the_ready_text_says_to_run_is_valid_json() -> None:
    text = ready_text("http://x:1", "base", ["sentiment"], 1.0)
    body = re.search(r"-d '(.*)'", text)
    assert body is not None
    assert json.loads(body[1])["messages"][0]["role"] == "user"


def test_auto_merge_is_for_cpus() -> None:
    config = load_config({"auto_merge": True}, {})
    check_auto_merge(config, "cpu")
    check_auto_merge(load_config({}, {}), "cuda:0")
    with pytest.raises(ConfigInvalid, match="--auto-merge is for CPUs"):
        check_auto_merge(config, "cuda:0")
