"""How much a tenant may upload: numbers, two at once, and a clock that is moved by hand."""

import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.api_keys import token_hash
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import QuotaExceeded
from quickchange_adapters.records import FileRecord, NewVersion, Quota
from quickchange_server.api.app import create_app
from quickchange_server.errors import RateLimited
from quickchange_server.keyring import Keyring
from quickchange_server.tokenizer import Tokenizer
from quickchange_server.upload_quotas import FORM_BYTES, UploadQuotas
from starlette.types import Message

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tenant_site import OPS, Site, site_services

FILE_BYTES = len(weights_bytes(q_pairs(small_spec()))) + len(json.dumps(config_values()))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_version(number: int, quota: Quota, tenant: str = "acme") -> NewVersion:
    files = (
        FileRecord("adapter_config.json", f"{0:064x}", 10),
        FileRecord("adapter_model.safetensors", f"{number:064x}", 90),
    )
    return NewVersion(
        name="ada",
        files=files,
        base_name="tiny",
        base_digest="b" * 64,
        ranks=(4,),
        target_modules=("q_proj",),
        report={},
        tenant=tenant,
        visibility="private",
        quota=quota,
    )


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url)
    yield catalog
    catalog.close()


@pytest.mark.parametrize(
    ("quota", "numbers"),
    [(Quota(max_versions=3), "4 versions.*3"), (Quota(max_bytes=399), "400 bytes.*399")],
)
def test_a_quota_ends_at_its_number_for_each_tenant(
    catalog: Catalog, quota: Quota, numbers: str
) -> None:
    for number in (1, 2, 3):
        catalog.publish(new_version(number, quota))
    with pytest.raises(QuotaExceeded, match=numbers):
        catalog.publish(new_version(4, quota))
    assert len(catalog.list_adapters()[0].versions) == 3
    assert not catalog.publish(new_version(3, quota)).created
    assert catalog.publish(new_version(4, quota, "zeta")).created
    gone = catalog.begin_delete_adapter("ada", tenant="acme")
    with pytest.raises(QuotaExceeded):
        catalog.publish(new_version(4, quota))
    catalog.purge(gone[0])
    assert catalog.publish(new_version(4, quota)).created


@pytest.mark.parametrize("quota", [Quota(max_versions=5), Quota(max_bytes=599)])
def test_uploads_at_once_cannot_pass_together(catalog: Catalog, quota: Quota) -> None:
    passed, refused = [], []

    def publish(number: int) -> None:
        try:
            catalog.publish(new_version(number, quota))
        except QuotaExceeded:
            refused.append(number)
        else:
            passed.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused)) == (5, 7)


def test_tries_come_back_one_by_one() -> None:
    clock = Clock()
    quotas = UploadQuotas(uploads_per_minute=3, clock=clock)
    for _ in range(3):
        quotas.count_try("acme")
    with pytest.raises(RateLimited, match="3 times a minute") as caught:
        quotas.count_try("acme")
    assert caught.value.retry_after_s == 20
    quotas.count_try("zeta")
    clock.now += 19.9
    with pytest.raises(RateLimited) as caught:
        quotas.count_try("acme")
    assert caught.value.retry_after_s == 1
    clock.now += 0.1
    quotas.count_try("acme")
    with pytest.raises(RateLimited):
        quotas.count_try("acme")
    clock.now += 3600
    for _ in range(3):
        quotas.count_try("acme")
    with pytest.raises(RateLimited):
        quotas.count_try("acme")


def refusal(quotas: UploadQuotas) -> RateLimited:
    """Try until no more is allowed."""
    try:
        while True:
            quotas.count_try("acme")
    except RateLimited as error:
        return error


def test_whoever_waits_as_long_as_told_is_let_in() -> None:
    clock = Clock()
    for per_minute in (1, 7, 59, 1000):
        quotas = UploadQuotas(uploads_per_minute=per_minute, clock=clock)
        for _ in range(per_minute):
            quotas.count_try("acme")
        for _ in range(20):
            wait_s = refusal(quotas).retry_after_s
            assert wait_s is not None
            clock.now += wait_s
            quotas.count_try("acme")


def test_without_a_rate_nobody_is_counted() -> None:
    quotas = UploadQuotas(clock=Clock())
    for _ in range(1000):
        quotas.count_try("acme")


@dataclass
class Quotas:
    """What the next site is to allow."""

    quota: Quota | None = None
    per_minute: int | None = None


@pytest.fixture
def allowed() -> Quotas:
    return Quotas(Quota(max_versions=2))


@pytest_asyncio.fixture
async def site(tmp_path: Path, tokenizer: Tokenizer, allowed: Quotas) -> AsyncIterator[Site]:
    services = site_services(tmp_path, tokenizer, Keyring(token_hash(OPS)))
    services = replace(
        services, quotas=UploadQuotas(allowed.quota, allowed.per_minute, clock=Clock())
    )
    assert isinstance(services.engine, ScriptedEngine)
    async for client in serve_in_process(create_app(services)):
        yield Site(client, services.engine)


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_versions_over_http(site: Site, tmp_path: Path) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    assert [(await site.push(acme, seed=seed)).status_code for seed in (1, 2)] == [201, 201]
    refused = await site.push(acme, seed=3)
    assert error_of(refused) == (403, "quota_exceeded")
    assert "3 versions" in refused.json()["error"]["message"]
    assert [problem["code"] for problem in refused.json()["problems"]] == ["quota_exceeded"]
    assert (await site.push(acme, seed=2)).status_code == 200
    assert (await site.push(zeta, seed=3)).status_code == 201
    assert list((tmp_path / "incoming").iterdir()) == []
    assert len(list((tmp_path / "blobs").rglob("*"))) >= 3
    await site.call(acme, "DELETE", "/v1/adapters/ada/versions/2")
    assert (await site.push(acme, seed=3)).status_code == 201


@pytest.mark.parametrize("allowed", [Quotas(Quota(max_bytes=2 * FILE_BYTES))])
async def test_bytes_over_http(site: Site) -> None:
    acme = await site.key("acme")
    assert [(await site.push(acme, seed=seed)).status_code for seed in (1, 2)] == [201, 201]
    assert error_of(await site.push(acme, seed=3)) == (403, "quota_exceeded")
    assert (await site.push(acme, "bob", seed=1)).status_code == 403
    assert (await site.push(acme, seed=1)).status_code == 200


@pytest.mark.parametrize("allowed", [Quotas(Quota(max_bytes=1 << 20))])
async def test_what_cannot_fit_is_refused_before_it_is_read(site: Site) -> None:
    acme = await site.key("acme")
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        num_sent += 1
        yield b"x"

    def headers(num_bytes: int) -> dict[str, str]:
        return {
            "authorization": f"Bearer {acme}",
            "content-type": "multipart/form-data; boundary=b",
            "content-length": str(num_bytes),
        }

    async def push(num_bytes: int, query: str = "") -> httpx.Response:
        path = f"/v1/adapters{query}"
        return await site.client.post(path, content=body(), headers=headers(num_bytes))

    too_much = (1 << 20) + FORM_BYTES + 1
    assert error_of(await push(too_much)) == (403, "quota_exceeded")
    assert (await push(too_much - 1)).status_code == 400
    assert (await push(too_much, "?dry_run=true")).status_code == 400


@pytest.mark.parametrize("allowed", [Quotas(per_minute=2)])
async def test_rate_over_http(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    reader = await site.key("acme", scopes=["adapters:read"])
    assert (await site.push(reader)).status_code == 403
    assert (await site.push(acme)).status_code == 201
    assert (await site.push(acme, "Bad Name")).status_code == 400
    refused = await site.push(acme)
    assert error_of(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "30"
    assert (await site.push(zeta)).status_code == 201
    assert (await site.ask(acme, "ada")).status_code == 200


async def test_a_refusal_reads_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    services = site_services(tmp_path, tokenizer, Keyring(token_hash(OPS)))
    app = create_app(replace(services, quotas=UploadQuotas(Quota(max_bytes=10), 1, clock=Clock())))
    reads: list[int] = []

    async def receive() -> Message:
        reads.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def status_of() -> int:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        pairs = [(b"authorization", f"Bearer {OPS}".encode()), (b"content-length", b"1000000")]
        scope: dict[str, Any] = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"},
            **{"method": "POST", "scheme": "http", "path": "/v1/adapters", "headers": pairs},
            **{"raw_path": b"/v1/adapters", "query_string": b"", "root_path": ""},
        }
        await app(scope, receive, send)
        status: int = sent[0]["status"]
        return status

    assert [await status_of(), await status_of()] == [403, 429]
    assert reads == []
