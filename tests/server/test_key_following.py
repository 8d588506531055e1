"""Two servers on one catalog: what one does to keys, the other knows soon."""

import asyncio
from pathlib import Path

from quickchange_server.api.app import create_app
from quickchange_server.keyring import Keyring
from quickchange_server.tokenizer import Tokenizer

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tenant_site import Site, site_services

SEEN_S = 20.0


async def until(site: Site, secret: str, status: int) -> None:
    """Wait until a server answers a key so."""
    async with asyncio.timeout(SEEN_S):
        while (await site.call(secret, "GET", "/v1/models")).status_code != status:
            await asyncio.sleep(0.02)


async def test_keys_that_one_server_makes_and_revokes_reach_the_other(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    apps = [
        create_app(site_services(tmp_path, tokenizer, Keyring(), poll_s=0.05)) for _ in range(2)
    ]
    async for one in serve_in_process(apps[0]):
        async for two in serve_in_process(apps[1]):
            here, there = Site(one, ScriptedEngine()), Site(two, ScriptedEngine())
            await until(there, "unused", 200)
            first = await one.post("/v1/keys", json={"scopes": ["admin", "generate"]})
            admin = first.json()["secret"]
            await until(there, "unused", 401)
            await until(there, admin, 200)
            made = await there.call(admin, "POST", "/v1/keys", json={"tenant": "acme"})
            secret = made.json()["secret"]
            await until(here, secret, 200)
            await there.call(admin, "DELETE", f"/v1/keys/{made.json()['id']}")
            await until(here, secret, 401)
