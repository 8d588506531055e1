"""A server with keys and tenants over a scripted engine, a real store and a real catalog."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.server.scripted_engine import ScriptedEngine

SPEC = small_spec()
OPS = "o" * 40
SCOPES = ["generate", "adapters:read", "adapters:write", "admin"]
NO_NEWS_S = 600.0


@dataclass
class Site:
    """A client of such a server, and what is done on it; `secret` is the key that is sent."""

    client: httpx.AsyncClient
    engine: ScriptedEngine

    async def key(self, tenant: str, **wish: Any) -> str:
        body = {"tenant": tenant, "scopes": SCOPES, **wish}
        answer = await self.call(OPS, "POST", "/v1/keys", json=body)
        assert answer.status_code == 201, answer.text
        secret: str = answer.json()["secret"]
        return secret

    async def call(self, secret: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"}
        return await self.client.request(method, path, headers=headers, **more)

    async def push(
        self, secret: str, name: str = "ada", seed: int = 0, **fields: str
    ) -> httpx.Response:
        files = {
            "adapter_config": json.dumps(config_values()).encode(),
            "adapter_model": weights_bytes({n: a + seed for n, a in q_pairs(SPEC).items()}),
        }
        data = {"name": name, **fields}
        return await self.call(secret, "POST", "/v1/adapters", data=data, files=files)

    async def pushed(self, secret: str, name: str = "ada", seed: int = 0, **fields: str) -> str:
        answer = await self.push(secret, name, seed, **fields)
        assert answer.status_code in (200, 201), answer.text
        digest: str = answer.json()["digest"]
        return digest

    async def ask(self, secret: str, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "a", "max_tokens": 2, **more}
        return await self.call(secret, "POST", "/v1/completions", json=body)

    async def seen(self, secret: str) -> list[str]:
        answer = await self.call(secret, "GET", "/v1/adapters")
        return [adapter["name"] for adapter in answer.json()["data"]]


def site_services(
    folder: Path, tokenizer: Tokenizer, keyring: Keyring, poll_s: float = NO_NEWS_S
) -> AppServices:
    """Return a real adapter service around a scripted engine, with keys."""
    catalog = Catalog(sqlite_url(folder / "catalog.db"))
    engine = ScriptedEngine(base=SPEC)
    limits, store = AdapterLimits(), LocalStore(folder)
    service = AdapterService(engine, store, catalog, limits, torch.float32, poll_s=poll_s)
    keys = KeyService(KeyCatalog(catalog.database), keyring)
    return AppServices(engine, service, tokenizer, ServerMetrics(), keyring=keyring, keys=keys)
