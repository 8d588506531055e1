"""`/v1/keys` over a real catalog: the first key, others, tenants, revocation."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.api_keys import token_hash
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring

from tests.server.conftest import serve_in_process

FILE_KEY = "f" * 40
ALL = ["generate", "adapters:read", "adapters:write", "admin", "metrics"]


def with_keys(services: AppServices, folder: Path, *, has_file: bool = False) -> AppServices:
    """Return services whose keys are kept in a catalog in `folder`."""
    keyring = Keyring(token_hash(FILE_KEY) if has_file else None)
    keys = KeyCatalog(Catalog(sqlite_url(folder / "catalog.db")).database)
    return replace(services, keyring=keyring, keys=KeyService(keys, keyring))


@pytest_asyncio.fixture
async def fresh(services: AppServices, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server without any key."""
    async for each in serve_in_process(create_app(with_keys(services, tmp_path))):
        yield each


@pytest_asyncio.fixture
async def filed(services: AppServices, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with an admin key file."""
    async for each in serve_in_process(create_app(with_keys(services, tmp_path, has_file=True))):
        yield each


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def make(client: httpx.AsyncClient, secret: str = FILE_KEY, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/keys", json=body, headers=bearer(secret))
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def status(client: httpx.AsyncClient, secret: str, path: str = "/v1/models") -> int:
    return (await client.get(path, headers=bearer(secret))).status_code


async def test_the_first_key_ends_the_open_time(fresh: httpx.AsyncClient) -> None:
    assert (await fresh.get("/v1/models")).status_code == 200
    answer = await fresh.post("/v1/keys", json={"name": "ops", "scopes": ALL})
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert made["object"] == "api_key"
    assert (made["name"], made["tenant"], made["scopes"]) == ("ops", "default", ALL)
    assert made["secret"].startswith(f"qc-{made['id']}-")
    assert (await fresh.get("/v1/models")).status_code == 401
    assert (await fresh.post("/v1/keys", json={"scopes": ALL})).status_code == 401
    assert await status(fresh, made["secret"]) == 200


@pytest.mark.parametrize(
    "body", [{}, {"scopes": ["generate", "metrics"]}, {"scopes": ["admin"], "tenant": "x"}]
)
async def test_a_first_key_that_would_lock_everybody_out_is_refused(
    fresh: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    answer = await fresh.post("/v1/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "admin_key_needed")
    assert "'admin'" in answer.json()["error"]["message"]
    assert (await fresh.get("/v1/keys")).json()["data"] == []


async def test_of_two_first_keys_at_once_one_is_made(fresh: httpx.AsyncClient) -> None:
    bodies = [{"scopes": ["admin"]}, {"scopes": ["generate"]}]
    answers = await asyncio.gather(*(fresh.post("/v1/keys", json=body) for body in bodies))
    admin = answers[0].json()
    assert answers[0].status_code == 201
    assert answers[1].status_code in (201, 401, 409)
    listed = await fresh.get("/v1/keys", headers=bearer(admin["secret"]))
    assert admin["id"] in [key["id"] for key in listed.json()["data"]]


async def test_a_public_server_makes_no_first_key_over_http(
    services: AppServices, tmp_path: Path
) -> None:
    public = replace(with_keys(services, tmp_path), is_loopback_only=False)
    async for client in serve_in_process(create_app(public)):
        answer = await client.post("/v1/keys", json={"scopes": ["admin"]})
        assert answer.status_code == 403
        assert "--admin-key-file" in answer.json()["error"]["message"]
        assert (await client.get("/v1/models")).status_code == 200


async def test_the_secret_is_shown_once_and_kept_nowhere(
    filed: httpx.AsyncClient, tmp_path: Path
) -> None:
    secret = (await make(filed))["secret"]
    listed = await filed.get("/v1/keys", headers=bearer(FILE_KEY))
    assert secret not in listed.text
    assert "secret" not in listed.json()["data"][0]
    for file in tmp_path.iterdir():
        for text in (secret, secret.rpartition("-")[2], FILE_KEY):
            assert text.encode() not in file.read_bytes()


async def test_revocation_is_at_once(filed: httpx.AsyncClient) -> None:
    made = await make(filed, scopes=["generate"])
    assert await status(filed, made["secret"]) == 200
    answer = await filed.delete(f"/v1/keys/{made['id']}", headers=bearer(FILE_KEY))
    assert answer.status_code == 200
    assert answer.json()["deleted"] is True
    assert answer.json()["object"] == "api_key.deleted"
    assert await status(filed, made["secret"]) == 401
    again = await filed.delete(f"/v1/keys/{made['id']}", headers=bearer(FILE_KEY))
    assert again.json() == answer.json()


async def test_the_last_admin_key_cannot_be_revoked_without_a_file(
    fresh: httpx.AsyncClient,
) -> None:
    first = (await fresh.post("/v1/keys", json={"scopes": ["admin"]})).json()
    headers = bearer(first["secret"])
    answer = await fresh.delete(f"/v1/keys/{first['id']}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "admin_key_needed")
    second = await make(fresh, first["secret"], scopes=["admin"])
    assert (await fresh.delete(f"/v1/keys/{first['id']}", headers=headers)).status_code == 200
    assert await status(fresh, first["secret"], "/v1/keys") == 401
    assert await status(fresh, second["secret"], "/v1/keys") == 200


async def test_when_all_keys_are_revoked_nobody_gets_in(
    services: AppServices, tmp_path: Path
) -> None:
    async for client in serve_in_process(create_app(with_keys(services, tmp_path, has_file=True))):
        made = await make(client, scopes=["admin"])
        await client.delete(f"/v1/keys/{made['id']}", headers=bearer(FILE_KEY))
    async for client in serve_in_process(create_app(with_keys(services, tmp_path))):
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post("/v1/keys", json={"scopes": ["admin"]})).status_code == 401


async def test_keys_survive_a_restart(services: AppServices, tmp_path: Path) -> None:
    async for client in serve_in_process(create_app(with_keys(services, tmp_path))):
        made = (await client.post("/v1/keys", json={"scopes": ALL})).json()
    async for client in serve_in_process(create_app(with_keys(services, tmp_path))):
        assert (await client.get("/v1/models")).status_code == 401
        assert await status(client, made["secret"]) == 200


async def test_another_server_s_changes_are_followed(services: AppServices, tmp_path: Path) -> None:
    here, there = (with_keys(services, tmp_path) for _ in range(2))
    assert there.keys is not None
    async for client in serve_in_process(create_app(there)):
        async for other in serve_in_process(create_app(here)):
            admin = (await other.post("/v1/keys", json={"scopes": ALL})).json()
            made = await make(other, admin["secret"])
            assert (await client.get("/v1/models")).status_code == 200
            await there.keys.refresh()
            assert (await client.get("/v1/models")).status_code == 401
            assert await status(client, made["secret"]) == 200
            await other.delete(f"/v1/keys/{made['id']}", headers=bearer(admin["secret"]))
            await there.keys.refresh()
            assert await status(client, made["secret"]) == 401


async def test_list_pages_and_hides_what_is_revoked(filed: httpx.AsyncClient) -> None:
    made = [await make(filed, name=f"k{number}") for number in range(5)]
    ids = {key["id"] for key in made}

    async def page(query: str) -> dict[str, Any]:
        answer = await filed.get(f"/v1/keys?{query}", headers=bearer(FILE_KEY))
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    first = await page("limit=2")
    assert (first["object"], first["has_more"], len(first["data"])) == ("list", True, 2)
    gone = first["last_id"]
    await filed.delete(f"/v1/keys/{gone}", headers=bearer(FILE_KEY))
    rest = await page(f"after={gone}")
    assert rest["has_more"] is False
    seen = [key["id"] for key in (*first["data"], *rest["data"])]
    assert (len(seen), set(seen)) == (5, ids)
    assert {key["id"] for key in (await page(""))["data"]} == ids - {gone}
    (revoked,) = [key for key in (await page("include_revoked=true"))["data"] if key["revoked_at"]]
    assert revoked["id"] == gone
    unknown = await filed.get("/v1/keys?after=nix", headers=bearer(FILE_KEY))
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "after")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["all"]}, "scopes[0]"),
        ({"scopes": ["generate", "generate"]}, "scopes"),
        ({"scopes": "admin"}, "scopes"),
        ({"scope": ["admin"]}, "scope"),
        ({"adapters": []}, "adapters"),
        ({"adapters": ["../x"]}, "adapters[0]"),
        ({"adapters": ["a\n"]}, "adapters[0]"),
        ({"adapters": ["a"], "scopes": ["admin"]}, "adapters"),
        ({"adapters": ["a"], "scopes": ["metrics"]}, "adapters"),
        ({"scopes": ["metrics"], "tenant": "x"}, "scopes"),
        ({"tenant": "Big Corp"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"id": "x"}, "id"),
    ],
)
async def test_keys_that_cannot_be_are_refused_by_name(
    filed: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await filed.post("/v1/keys", json=body, headers=bearer(FILE_KEY))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_a_tenant_s_admin_rules_its_tenant_alone(filed: httpx.AsyncClient) -> None:
    acme = await make(filed, tenant="acme", scopes=["admin"])
    zeta = await make(filed, tenant="zeta", scopes=["generate"])
    own = await make(filed, acme["secret"], name="own")
    assert (own["tenant"], own["created_by"]) == ("acme", acme["id"])
    for tenant in ("zeta", "default"):
        answer = await filed.post(
            "/v1/keys", json={"tenant": tenant}, headers=bearer(acme["secret"])
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    listed = await filed.get("/v1/keys", headers=bearer(acme["secret"]))
    assert {key["id"] for key in listed.json()["data"]} == {acme["id"], own["id"]}
    everything = await filed.get("/v1/keys", headers=bearer(FILE_KEY))
    assert zeta["id"] in {key["id"] for key in everything.json()["data"]}

    unknown_id = "0" * 16
    foreign, unknown = [
        await filed.delete(f"/v1/keys/{key_id}", headers=bearer(acme["secret"]))
        for key_id in (zeta["id"], unknown_id)
    ]
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json()["error"]["code"] == "key_not_found"
    assert foreign.text.replace(zeta["id"], unknown_id) == unknown.text
    assert await status(filed, zeta["secret"]) == 200


async def test_an_app_without_a_catalog_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/keys", json={"scopes": ["admin"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
