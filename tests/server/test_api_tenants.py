"""Tenants over HTTP: names of their own, what is public, and that nobody learns of the rest."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest_asyncio
from quickchange_adapters.api_keys import token_hash
from quickchange_server.api.app import create_app
from quickchange_server.keyring import Keyring
from quickchange_server.tokenizer import Tokenizer

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tenant_site import OPS, Site, site_services

VERBS = ("load", "unload", "merge", "unmerge", "pin", "unpin", "disable", "enable")
ADMIN_VERBS = VERBS[2:]


@pytest_asyncio.fixture
async def site(tmp_path: Path, tokenizer: Tokenizer) -> AsyncIterator[Site]:
    services = site_services(tmp_path, tokenizer, Keyring(token_hash(OPS)))
    assert isinstance(services.engine, ScriptedEngine)
    async for client in serve_in_process(create_app(services)):
        yield Site(client, services.engine)


def calls_on(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return a request to every route that an adapter can be named to."""
    at = f"/v1/adapters/{name}"
    mix = {"model": "tiny", "prompt": "a", "adapters": [{"model": name}]}
    chat = {"model": f"{name}@default", "messages": [{"role": "user", "content": "a"}]}
    return [
        ("POST", "/v1/completions", {"json": {"model": name, "prompt": "a"}}),
        ("POST", "/v1/completions", {"json": {"model": f"{name}:1", "prompt": "a"}}),
        ("POST", "/v1/completions", {"json": mix}),
        ("POST", "/v1/chat/completions", {"json": chat}),
        ("POST", "/tokenize", {"json": {"model": name, "prompt": "a"}}),
        ("POST", "/detokenize", {"json": {"model": name, "tokens": [1]}}),
        ("GET", "/v1/models", {}),
        ("GET", f"/v1/models/{name}", {}),
        ("GET", f"/v1/models/{name}:1", {}),
        ("GET", "/v1/adapters", {}),
        ("GET", at, {}),
        ("GET", f"{at}/events", {}),
        ("GET", f"{at}/versions/1", {}),
        ("GET", f"{at}/versions/1/files/adapter_config.json", {}),
        ("PUT", f"{at}/aliases/prod", {"json": {"version": 1}}),
        ("DELETE", f"{at}/aliases/default", {}),
        ("DELETE", f"{at}/versions/1", {}),
        ("DELETE", at, {}),
        *(("POST", f"{at}/{verb}", {}) for verb in VERBS),
        ("POST", f"{at}/load", {"json": {"version": 1}}),
        ("GET", "/v1/memory", {}),
    ]


def shown(answer: httpx.Response) -> tuple[int, Any, dict[str, str]]:
    """Return all that a caller sees, but the id of the request and the process's own size."""
    body = answer.json() if answer.content else None
    if isinstance(body, dict) and body.get("object") == "memory":
        body = body["adapters"]
    headers = {key: text for key, text in answer.headers.items() if key != "x-request-id"}
    headers.pop("content-length", None) if body == [] else None
    return answer.status_code, body, headers


async def test_what_others_keep_to_themselves_is_answered_as_what_is_not_there(
    site: Site,
) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    before = [shown(await site.call(zeta, *call[:2], **call[2])) for call in calls_on("ada")]
    await site.pushed(acme)
    assert (await site.ask(acme, "ada")).status_code == 200
    after = [shown(await site.call(zeta, *call[:2], **call[2])) for call in calls_on("ada")]
    for (method, path, _), then, now in zip(calls_on("ada"), before, after, strict=True):
        assert then == now, f"{method} {path}"
    statuses = [status for status, _, _ in after]
    assert statuses.count(404) == len(statuses) - 3
    assert (await site.ask(acme, "ada")).status_code == 200


async def traced(site: Site, secret: str, call: tuple[str, str, dict[str, Any]]) -> list[str]:
    """Return every function of ours that a request calls in its task."""
    names: list[str] = []
    ours = asyncio.current_task()

    def note(frame: FrameType, event: str, argument: object) -> None:
        is_ours = "quickchange_" in frame.f_code.co_filename
        if event == "call" and is_ours and asyncio.current_task() is ours:
            names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        await site.call(secret, call[0], call[1], **call[2])
    finally:
        sys.setprofile(None)
    return names


async def test_what_others_keep_to_themselves_costs_the_work_of_what_is_not_there(
    site: Site,
) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    await site.pushed(acme, "secret")
    for call, twin in zip(calls_on("secret"), calls_on("nobody"), strict=True):
        await traced(site, zeta, twin)  # what is made once is made now
        foreign, unknown = await traced(site, zeta, call), await traced(site, zeta, twin)
        assert foreign == unknown, call
        assert len(foreign) > 10


async def test_a_name_means_each_tenant_s_own_adapter(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    digests = [await site.pushed(acme, seed=1), await site.pushed(zeta, seed=2)]
    assert digests[0] != digests[1]
    for secret, digest in zip((acme, zeta), digests, strict=True):
        answer = await site.ask(secret, "ada")
        assert answer.headers["x-quickchange-adapter-digest"] == digest
        version = (await site.call(secret, "GET", "/v1/adapters/ada/versions/1")).json()
        assert version["digest"] == digest
    await site.call(acme, "DELETE", "/v1/adapters/ada")
    assert (await site.ask(acme, "ada")).status_code == 404
    assert (await site.ask(zeta, "ada")).status_code == 200


async def test_the_same_bytes_of_two_tenants_are_two_adapters(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    answers = [await site.push(secret) for secret in (acme, zeta)]
    assert [answer.status_code for answer in answers] == [201, 201]
    await site.call(acme, "DELETE", "/v1/adapters/ada")
    assert (await site.ask(zeta, "ada")).status_code == 200


async def test_once_there_are_keys_a_new_name_is_private(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    await site.pushed(acme)
    await site.pushed(acme, "open", visibility="public")
    adapter = (await site.call(acme, "GET", "/v1/adapters/ada")).json()
    assert (adapter["visibility"], adapter["tenant"]) == ("private", "acme")
    assert await site.seen(zeta) == ["open"]
    assert await site.seen(acme) == ["ada", "open"]
    await site.pushed(acme, visibility="public")
    assert await site.seen(zeta) == ["ada", "open"]
    await site.pushed(acme, seed=3)
    assert await site.seen(zeta) == ["ada", "open"]
    await site.pushed(acme, visibility="private")
    assert await site.seen(zeta) == ["open"]
    assert (await site.ask(zeta, "ada")).status_code == 404


async def test_what_is_public_may_be_used_and_not_changed(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    digest = await site.pushed(acme, visibility="public")
    assert (await site.ask(zeta, "ada")).headers["x-quickchange-adapter-digest"] == digest
    assert (await site.call(zeta, "GET", "/v1/adapters/ada")).json()["tenant"] == "acme"
    file = "/v1/adapters/ada/versions/1/files/adapter_config.json"
    assert (await site.call(zeta, "GET", file)).status_code == 200
    changes = [call for call in calls_on("ada") if call[1].startswith("/v1/adapters/ada")]
    changes = [call for call in changes if call[0] != "GET" or call[1].endswith("/events")]
    assert len(changes) == 14
    for method, path, more in changes:
        answer = await site.call(zeta, method, path, **more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), path
    assert (await site.ask(acme, "ada")).status_code == 200


async def test_a_tenant_s_own_adapter_goes_before_a_public_one(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    public = await site.pushed(acme, seed=1, visibility="public")
    own = await site.pushed(zeta, seed=2)
    assert (await site.ask(zeta, "ada")).headers["x-quickchange-adapter-digest"] == own
    await site.call(zeta, "DELETE", "/v1/adapters/ada")
    assert (await site.ask(zeta, "ada")).headers["x-quickchange-adapter-digest"] == public


async def test_a_public_name_has_one_owner(site: Site) -> None:
    acme, zeta, other = [await site.key(tenant) for tenant in ("acme", "zeta", "other")]
    digest = await site.pushed(zeta, seed=1, visibility="public")
    answer = await site.push(acme, seed=2, visibility="public")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert await site.seen(acme) == ["ada"]
    own = await site.pushed(acme, seed=2)
    assert (await site.push(acme, seed=2, visibility="public")).status_code == 409
    assert (await site.ask(acme, "ada")).headers["x-quickchange-adapter-digest"] == own
    assert (await site.ask(other, "ada")).headers["x-quickchange-adapter-digest"] == digest
    await site.call(zeta, "DELETE", "/v1/adapters/ada")
    await site.pushed(acme, seed=2, visibility="public")
    assert (await site.ask(other, "ada")).headers["x-quickchange-adapter-digest"] == own


async def test_a_key_limited_to_adapters_reaches_nothing_else(site: Site) -> None:
    acme = await site.key("acme")
    for seed, name in enumerate(("ada", "bob", "cy")):
        await site.pushed(acme, name, seed)
    scopes = ["generate", "adapters:read", "adapters:write"]
    limited = await site.key("acme", scopes=scopes, adapters=["ada", "bob"])
    assert await site.seen(limited) == ["ada", "bob"]
    models = (await site.call(limited, "GET", "/v1/models")).json()["data"]
    assert {model["root"] for model in models} == {"ada:1", "bob:1"}
    for model in ("ada", "ada:1", "bob@default"):
        assert (await site.ask(limited, model)).status_code == 200
    for method, path, more in calls_on("cy"):
        if path not in ("/v1/models", "/v1/adapters", "/v1/memory"):
            status = (await site.call(limited, method, path, **more)).status_code
            assert status == (403 if path.endswith(ADMIN_VERBS) else 404), path
    mix = {"adapters": [{"model": "ada", "weight": 0.0}]}
    assert (await site.ask(limited, "tiny", **mix)).status_code == 404
    assert (await site.ask(limited, "tiny")).status_code == 404
    assert (await site.call(limited, "GET", "/v1/models/tiny")).status_code == 404
    for name in ("cy", "new"):
        answer = await site.push(limited, name, 7)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert (await site.push(limited, "ada", 7)).status_code == 201
    assert await site.seen(acme) == ["ada", "bob", "cy"]


async def test_the_log_says_which_key_did_what(site: Site) -> None:
    key = await site.key("acme")
    key_id = key.split("-")[1]
    await site.pushed(key)
    await site.pushed(key, seed=1, alias="next")
    await site.call(key, "PUT", "/v1/adapters/ada/aliases/default", json={"version": 2})
    await site.call(key, "DELETE", "/v1/adapters/ada/aliases/next")
    await site.call(key, "DELETE", "/v1/adapters/ada/versions/1")
    await site.call(key, "DELETE", "/v1/adapters/ada")
    events = (await site.call(key, "GET", "/v1/adapters/ada/events?limit=100")).json()["data"]
    assert {event["action"] for event in events if event["actor"] == key_id} == {
        *("publish", "set_alias", "delete_alias", "delete_version", "delete_adapter")
    }
    assert {event["action"] for event in events if event["actor"] != key_id} <= {"purge"}
    await site.pushed(OPS, "mine")
    (event,) = (await site.call(OPS, "GET", "/v1/adapters/mine/events")).json()["data"]
    assert event["actor"] == "admin-key-file"


async def test_metrics_tell_tenants_apart(site: Site) -> None:
    acme = await site.key("acme")
    await site.pushed(acme)
    await site.pushed(OPS, seed=1)
    for secret, times in ((acme, 2), (OPS, 1)):
        for _ in range(times):
            assert (await site.ask(secret, "ada")).status_code == 200

    async def metrics(kind: str) -> str:
        return (await site.call(OPS, "GET", "/metrics", params={"kind": kind})).text

    text = await metrics("before")
    for label, count in (("acme/ada", 2), ("ada", 1)):
        line = f'quickchange_adapter_requests_total{{adapter="{label}",outcome="ok"}} {count}.0'
        assert line in text
    await site.call(acme, "DELETE", "/v1/adapters/ada")
    headers = {"authorization": f"Bearer {OPS}", "accept": "application/openmetrics-text"}
    text = (await site.client.get("/metrics", headers=headers)).text
    assert 'adapter="acme/ada"' not in text
    assert 'adapter="ada"' in text


async def test_kv_is_shared_within_a_tenant_alone(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    await site.pushed(acme, visibility="public")
    for secret in (acme, acme, zeta):
        await site.ask(secret, "ada", cache_salt="x")
    first, second, third = [request.cache_scope for request in site.engine.requests]
    assert first == second != third


async def test_memory_shows_a_tenant_its_own_adapters(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    digests = [await site.pushed(acme, seed=1), await site.pushed(zeta, seed=2)]
    for secret in (acme, zeta):
        await site.ask(secret, "ada")

    async def held(secret: str) -> set[str]:
        body = (await site.call(secret, "GET", "/v1/memory")).json()
        return {adapter["digest"] for adapter in body["adapters"]}

    assert await held(OPS) == set(digests)
    assert [await held(acme), await held(zeta)] == [{digests[0]}, {digests[1]}]


async def test_without_keys_a_new_name_is_public(tmp_path: Path, tokenizer: Tokenizer) -> None:
    services = site_services(tmp_path, tokenizer, Keyring())
    async for client in serve_in_process(create_app(services)):
        site = Site(client, ScriptedEngine())
        await site.pushed("unused")
        adapter = (await client.get("/v1/adapters/ada")).json()
        assert (adapter["visibility"], adapter["tenant"]) == ("public", "default")
