"""What suites run against: two real servers on one tiny float32 base, as people start them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from transformers.utils.logging import disable_progress_bar

from tests.conftest import save_peft_adapter, save_tiny_base
from tests.server.server_process import Server

BASE = "tiny"
KEY = "a-key-that-opens-the-small-server-0123456789"


@contextmanager
def served_site(folder: Path) -> Iterator[Path]:
    """Start both servers; give the file that tells a suite where they are."""
    disable_progress_bar()
    base = save_tiny_base(folder / "base")
    adapters = {
        name: save_peft_adapter(folder / name, base, seed=seed)
        for seed, name in enumerate(("ada", "bob"), start=1)
    }
    key_file = folder / "admin.key"
    key_file.write_text(KEY, encoding="utf-8")
    key_file.chmod(0o600)
    common = ["--model", str(base), "--served-model-name", BASE, "--dtype", "float32"]
    common += ["--device", "cpu", "--kernels", "plain"]
    small = ["--admin-key-file", str(key_file), "--max-batch-rows", "1", "--max-queue", "0"]
    servers = []
    try:
        for name, arguments in (("open", []), ("keyed", small)):
            (folder / name).mkdir()
            servers.append(Server([*common, *arguments], folder / name))
        for server in servers:
            server.wait_ready()
        for name, adapter in adapters.items():
            for server in servers:
                _push(server.url, name, adapter)
        told = {
            "url": servers[0].url,
            "base": BASE,
            "base_folder": str(base),
            "adapters": {name: str(path) for name, path in adapters.items()},
            "keyed_url": servers[1].url,
            "key": KEY,
        }
        file = folder / "site.json"
        file.write_text(json.dumps(told), encoding="utf-8")
        yield file
    finally:
        for server in servers:
            server.stop()


def _push(url: str, name: str, folder: Path) -> None:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{url}/v1/adapters", data={"name": name}, files=files, headers=headers, timeout=60
    )
    answer.raise_for_status()
