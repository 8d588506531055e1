"""How much of the engine a tenant may take: in numbers, and over HTTP with two tenants."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.api_keys import token_hash
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.errors import InvalidRequest, QueueFull, RateLimited
from quickchange_server.keyring import Keyring
from quickchange_server.request_quotas import RequestQuotas
from quickchange_server.tenant_limits import PerMinute
from quickchange_server.tokenizer import Tokenizer
from quickchange_server.upload_quotas import UploadQuotas

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.tenant_site import OPS, Site, site_services
from tests.server.test_upload_quotas import Clock, error_of


def test_a_tenant_has_so_many_in_flight_and_others_their_own() -> None:
    refused: list[str] = []
    quotas = RequestQuotas(max_requests=3, on_refusal=refused.append)
    quotas.hold("a", "acme", 2, 100)
    quotas.hold("a", "acme", 2, 100)  # the same request again
    with pytest.raises(RateLimited, match="2 requests in flight and may have 3"):
        quotas.hold("b", "acme", 2, 100)
    quotas.hold("b", "acme", 1, 100)
    quotas.hold("c", "zeta", 3, 100)
    quotas.release("a")
    quotas.release("a")
    quotas.hold("d", "acme", 2, 100)
    with pytest.raises(InvalidRequest, match="4 choices"):
        quotas.hold("e", "acme", 4, 100)
    assert refused == ["requests"]


def test_a_tenant_whose_minute_is_over_is_forgotten() -> None:
    clock = Clock()
    limit = PerMinute(2, clock)
    assert [limit.take(f"t{number}") for number in range(50)] == [None] * 50
    assert (limit.take("t0"), limit.take("t0")) == (None, 30.0)
    clock.now += 31
    assert limit.take("other") is None
    assert set(limit._full_at_s) == {"t0", "other"}


def test_loads_that_belong_together_count_together_or_not_at_all() -> None:
    clock = Clock()
    limit = PerMinute(2, clock)
    assert limit.take("t") is None
    assert limit.take("t", 2) == 30.0
    assert limit.take("t") is None  # what was refused cost nothing
    clock.now += 60
    assert limit.take("t", 4) is None  # else a mix of four would be refused for ever
    assert limit.take("t") == 90.0
    clock.now += 90
    assert limit.take("t") is None


def test_one_tenant_never_holds_all_places_once_there_are_several() -> None:
    quotas = RequestQuotas()
    for number in range(8):
        quotas.hold(f"f{number}", "flood", 1, 8)  # alone it may
    with pytest.raises(QueueFull, match="8 requests are running"):
        quotas.hold("more", "flood", 1, 8)
    quotas.has_tenants = lambda: True
    for number in range(3):
        quotas.release(f"f{number}")
    with pytest.raises(QueueFull, match="may have 6 of the 8 places"):
        quotas.hold("two", "flood", 2, 8)
    quotas.hold("one", "flood", 1, 8)
    quotas.hold("q", "quiet", 2, 8)
    with pytest.raises(QueueFull, match="8 requests are running"):
        quotas.hold("r", "quiet", 1, 8)


def test_a_request_larger_than_the_share_runs_alone() -> None:
    quotas = RequestQuotas()
    quotas.has_tenants = lambda: True
    quotas.hold("big", "acme", 8, 8)


def test_loads_come_back_one_by_one() -> None:
    clock = Clock()
    quotas = RequestQuotas(loads_per_minute=2, clock=clock)
    quotas.count_loads("acme")
    quotas.count_loads("acme")
    with pytest.raises(RateLimited, match="2 adapters loaded a minute") as caught:
        quotas.count_loads("acme")
    assert caught.value.retry_after_s == 30
    quotas.count_loads("zeta")
    clock.now += 30
    quotas.count_loads("acme")


@pytest.fixture
def services(tmp_path: Path, tokenizer: Tokenizer) -> AppServices:
    services = site_services(tmp_path, tokenizer, Keyring(token_hash(OPS)))
    count = services.metrics.on_quota_refused
    return replace(
        services,
        requests=RequestQuotas(3, 2, count, Clock()),
        quotas=UploadQuotas(max_uploads=2, on_refusal=count),
    )


@pytest_asyncio.fixture
async def site(services: AppServices) -> AsyncIterator[Site]:
    assert isinstance(services.engine, ScriptedEngine)
    async for client in serve_in_process(create_app(services)):
        yield Site(client, services.engine)


async def refusals(site: Site) -> Counter[str]:
    text = (await site.call(OPS, "GET", "/metrics")).text
    lines = [line for line in text.splitlines() if "quota_rejections_total{" in line]
    counts = {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}
    return +Counter(counts)


async def in_flight(site: Site, number: int) -> None:
    async with asyncio.timeout(30):
        while len(site.engine.live) < number:
            await asyncio.sleep(0.005)


async def test_requests_in_flight_over_http(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    site.engine.pause_after = 1
    running = [asyncio.create_task(site.ask(acme, "tiny", max_tokens=4)) for _ in range(3)]
    await in_flight(site, 3)
    refused = await site.ask(acme, "tiny")
    assert error_of(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "1"
    assert error_of(await site.ask(acme, "tiny", n=4))[0] == 400
    other = asyncio.create_task(site.ask(zeta, "tiny", max_tokens=4))
    await in_flight(site, 4)
    site.engine.resume.set()
    answers = await asyncio.gather(*running, other)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert (await site.ask(acme, "tiny", n=3)).status_code == 200
    assert await refusals(site) == {"requests": 1}


async def test_what_was_refused_or_given_up_is_not_in_flight(
    site: Site, services: AppServices
) -> None:
    acme = await site.key("acme")
    for _ in range(5):
        assert (await site.ask(acme, "nobody")).status_code == 404
    site.engine.pause_after = 1
    for _ in range(5):
        task = asyncio.create_task(site.ask(acme, "tiny", max_tokens=4))
        await in_flight(site, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(30):
            while site.engine.live:
                await asyncio.sleep(0.005)
    assert services.requests._in_flight.total == 0


async def test_cold_adapters_over_http(site: Site) -> None:
    acme = await site.key("acme")
    for index, name in enumerate(("ada", "bob", "cid")):
        assert (await site.push(acme, name, seed=index)).status_code == 201
        await site.call(acme, "POST", f"/v1/adapters/{name}/unload")
    assert (await site.ask(acme, "ada")).status_code == 200
    assert (await site.call(acme, "POST", "/v1/adapters/bob/load")).status_code == 200
    for refused in (await site.ask(acme, "cid"), await load(site, acme, "cid")):
        assert error_of(refused) == (429, "rate_limited")
        assert refused.headers["retry-after"] == "30"
    assert (await site.ask(acme, "ada")).status_code == 200  # what is loaded costs nothing
    assert (await load(site, acme, "bob")).status_code == 200
    assert await refusals(site) == {"loads": 2}
    assert (await load(site, acme, "nobody")).status_code == 404


async def test_requests_that_come_at_once_for_a_cold_adapter_are_one_load(site: Site) -> None:
    acme = await site.key("acme")
    assert (await site.push(acme, "ada")).status_code == 201
    await site.call(acme, "POST", "/v1/adapters/ada/unload")
    answers = await asyncio.gather(*(site.ask(acme, "ada") for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3  # of two loads a minute


async def test_a_mix_of_more_cold_adapters_than_a_minute_has_is_served(site: Site) -> None:
    acme = await site.key("acme")
    names = ("ada", "bob", "cid")
    for index, name in enumerate(names):
        assert (await site.push(acme, name, seed=index)).status_code == 201
        await site.call(acme, "POST", f"/v1/adapters/{name}/unload")
    body = {"model": "tiny", "prompt": "a", "adapters": [{"model": name} for name in names]}
    for _ in range(2):
        answer = await site.call(acme, "POST", "/v1/completions", json=body)
        assert answer.status_code == 200, answer.text


async def load(site: Site, key: str, name: str) -> httpx.Response:
    return await site.call(key, "POST", f"/v1/adapters/{name}/load")


async def test_uploads_at_once_over_http(site: Site) -> None:
    acme, zeta = await site.key("acme"), await site.key("zeta")
    go_on = asyncio.Event()
    num_begun = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_begun
        num_begun += 1
        yield b"--b\r\n"
        await go_on.wait()
        yield b"--b--\r\n"

    def push(key: str) -> asyncio.Task[httpx.Response]:
        kind = "multipart/form-data; boundary=b"
        headers = {"authorization": f"Bearer {key}", "content-type": kind}
        return asyncio.create_task(
            site.client.post("/v1/adapters", content=body(), headers=headers)
        )

    held = [push(acme), push(acme)]
    async with asyncio.timeout(30):
        while num_begun < 2:
            await asyncio.sleep(0.005)
    refused = await site.push(acme)
    assert error_of(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "5"
    assert (await site.push(zeta)).status_code == 201
    go_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*held)] == [400, 400]
    assert (await site.push(acme)).status_code == 201
    assert await refusals(site) == {"uploads": 1}
