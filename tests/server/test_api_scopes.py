"""Who may call which route: every route, without a key, with a wrong one, with a foreign one."""

import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from types import FrameType

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.api_keys import KEY_SCOPES, KeyRecord, KeyScope, new_token, token_hash
from quickchange_adapters.api_keys import token_id as id_of
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.keyring import Keyring
from starlette.types import Message

from tests.server.conftest import serve_in_process
from tests.server.routes import FoundRoute, routes_of

OPEN = {"/livez", "/readyz", "/health", "/version"}
ANY_KEY = {"/docs", "/openapi.json"}
PAGE = "https://app.example"


class Keys:
    """A keyring under way: each `make` adds a key and returns what its owner sends."""

    def __init__(self) -> None:
        self.ring = Keyring()
        self._records: list[KeyRecord] = []

    def make(
        self, *scopes: KeyScope, adapters: tuple[str, ...] | None = None, tenant: str = "default"
    ) -> dict[str, str]:
        token = new_token()
        key_id = id_of(token)
        assert key_id is not None
        record = KeyRecord(key_id, tenant, token_hash(token), scopes, adapters, "test", 1)
        self._records.append(record)
        self.ring.load(self._records)
        return {"authorization": f"Bearer {token}"}


def code_and_message(answer: httpx.Response) -> tuple[str, str]:
    """Read an error in OpenAI's shape, or in that of TGI and LoRAX."""
    body = answer.json()
    error = body["error"]
    if isinstance(error, str):
        return body["error_type"], error
    assert error["type"] in ("authentication_error", "permission_error")
    return error["code"], error["message"]


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest_asyncio.fixture
async def keyed(services: AppServices, keys: Keys) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with at least one key, whose client sends none."""
    keys.make("admin")
    app = create_app(replace(services, keyring=keys.ring, cors_origins=(PAGE,)))
    async for each in serve_in_process(app):
        yield each


@pytest.fixture
def routes(services: AppServices) -> list[FoundRoute]:
    return routes_of(create_app(services))


async def test_every_route_declares_a_scope_or_is_known_to_be_open(
    routes: list[FoundRoute],
) -> None:
    assert len(routes) > 25
    assert {each.template for each in routes if not each.needs_key} == OPEN
    assert {each.template for each in routes if each.needs_key and not each.scope} == ANY_KEY
    assert {each.scope for each in routes if each.scope} == set(KEY_SCOPES)


async def test_every_other_route_is_401_without_a_key_and_with_a_wrong_one(
    keyed: httpx.AsyncClient, routes: list[FoundRoute]
) -> None:
    for each in routes:
        for headers in ({}, {"authorization": f"Bearer {new_token()}"}):
            answer = await keyed.request(each.method, each.path, headers=headers)
            if each.template in OPEN:
                assert answer.status_code == 200, each
                continue
            assert answer.status_code == 401, each
            assert answer.headers["www-authenticate"] == "Bearer"
            if each.method != "HEAD":
                assert code_and_message(answer)[0] == "invalid_api_key", each


async def test_every_route_is_403_for_a_key_of_all_other_scopes(
    keyed: httpx.AsyncClient, keys: Keys, routes: list[FoundRoute]
) -> None:
    for each in routes:
        if each.scope is None:
            continue
        headers = keys.make(*(scope for scope in KEY_SCOPES if scope != each.scope))
        answer = await keyed.request(each.method, each.path, headers=headers)
        assert answer.status_code == 403, each
        if each.method != "HEAD":
            code, message = code_and_message(answer)
            assert code == "scope_missing", each
            assert f"'{each.scope}'" in message


async def test_the_scope_alone_is_enough(
    keyed: httpx.AsyncClient, keys: Keys, routes: list[FoundRoute]
) -> None:
    for each in routes:
        headers = keys.make(*([each.scope] if each.scope else ["generate"]))
        status = (await keyed.request(each.method, each.path, headers=headers)).status_code
        assert status not in (401, 403), each


async def test_what_the_guards_refuse_is_counted_under_the_route_it_asked_for(
    keyed: httpx.AsyncClient, keys: Keys, routes: list[FoundRoute]
) -> None:
    for each in routes:
        await keyed.request(each.method, each.path)
    await keyed.get("/nothing/here")
    text = (await keyed.get("/metrics", headers=keys.make("metrics"))).text
    counted = dict(re.findall(r"http_requests_total\{(.*)\} ([0-9.]+)", text))
    for each in routes:
        if each.needs_key:
            label = f'method="{each.method}",route="{each.template}",status="401"'
            assert counted[label] == "1.0", each
    assert counted['method="GET",route="_unmatched",status="401"'] == "1.0"


@pytest.mark.parametrize("path", ["/", "/nothing/here", "/v1", "/livez/", "/redoc", "//livez"])
async def test_what_is_no_route_is_401_too(keyed: httpx.AsyncClient, path: str) -> None:
    assert (await keyed.get(path)).status_code == 401


@pytest.mark.parametrize(
    "sent",
    [
        *("", "Bearer", "Bearer ", "Basic YTpi", "qc-1", "Bearer qc-0-0", "Bearer é", "Token x"),
        *("Bearer " + "0" * 64, "Bearer " + "x" * 5000),
    ],
)
async def test_what_is_no_key_is_401(keyed: httpx.AsyncClient, sent: str) -> None:
    answer = await keyed.get("/v1/models", headers={b"authorization": sent.encode("latin-1")})
    assert answer.status_code == 401
    assert "x" * 100 not in answer.text


async def test_two_keys_at_once_are_none(keyed: httpx.AsyncClient, keys: Keys) -> None:
    (pair,) = keys.make("generate").items()
    assert (await keyed.get("/v1/models", headers=[pair])).status_code == 200
    assert (await keyed.get("/v1/models", headers=[pair, pair])).status_code == 401


async def test_scheme_s_case_does_not_matter(keyed: httpx.AsyncClient, keys: Keys) -> None:
    token = keys.make("generate")["authorization"].partition(" ")[2]
    answer = await keyed.get("/v1/models", headers={"authorization": f"bearer {token}"})
    assert answer.status_code == 200


async def test_refusals_of_keys_read_nothing_of_the_body(services: AppServices, keys: Keys) -> None:
    reads = 0

    async def receive() -> Message:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def status_of(path: str, headers: dict[str, str]) -> int:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        pairs = [(key.encode(), text.encode()) for key, text in headers.items()]
        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"},
            **{"method": "POST", "scheme": "http", "path": path, "raw_path": path.encode()},
            **{"query_string": b"", "root_path": "", "headers": pairs},
        }
        await create_app(replace(services, keyring=keys.ring))(scope, receive, send)
        status: int = sent[0]["status"]
        return status

    reader = keys.make("adapters:read")
    for path in ("/v1/completions", "/v1/adapters", "/v1/adapters/ada/load", "/tokenize"):
        assert await status_of(path, {}) == 401
        assert await status_of(path, reader) == 403
    assert reads == 0


async def test_a_refused_key_counts_as_a_rejected_request(
    keyed: httpx.AsyncClient, keys: Keys
) -> None:
    await keyed.post("/v1/completions", headers=keys.make("metrics"), json={})
    text = (await keyed.get("/metrics", headers=keys.make("metrics"))).text
    assert 'quickchange_requests_total{outcome="rejected"} 1.0' in text


async def test_a_page_that_is_allowed_may_ask_before_it_sends_its_key(
    keyed: httpx.AsyncClient, keys: Keys
) -> None:
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = await keyed.options("/v1/completions", headers=asks)
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    foreign = await keyed.options("/v1/completions", headers={**asks, "origin": "https://evil"})
    assert foreign.status_code != 200
    refused = await keyed.get("/v1/models", headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


async def test_with_keys_the_name_of_the_host_does_not_matter(
    keyed: httpx.AsyncClient, keys: Keys
) -> None:
    headers = {**keys.make("generate"), "host": "models.example"}
    assert (await keyed.get("/v1/models", headers=headers)).status_code == 200


async def test_without_keys_everybody_here_may_do_everything(
    client: httpx.AsyncClient, routes: list[FoundRoute]
) -> None:
    for headers in ({}, {"authorization": "Bearer unused"}):
        for each in routes:
            status = (await client.request(each.method, each.path, headers=headers)).status_code
            assert status not in (401, 403), each


async def test_the_file_s_key_may_do_everything(services: AppServices) -> None:
    secret = "a-key-that-somebody-put-into-a-file-0123456789"
    app = create_app(replace(services, keyring=Keyring(token_hash(secret))))
    async for client in serve_in_process(app):
        assert (await client.get("/v1/memory")).status_code == 401
        headers = {"authorization": f"Bearer {secret}"}
        for path in ("/v1/memory", "/metrics", "/v1/models", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == 200
        headers["authorization"] += "0"
        assert (await client.get("/v1/memory", headers=headers)).status_code == 401


async def test_an_unknown_key_a_wrong_one_and_a_revoked_one_get_the_same_answer(
    keyed: httpx.AsyncClient, keys: Keys
) -> None:
    good = keys.make("generate")["authorization"]
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    unknown = f"Bearer {new_token()}"
    bodies = [
        (await keyed.get("/v1/models", headers={"authorization": sent})).content
        for sent in (wrong, unknown, "Bearer nonsense")
    ]
    assert len(set(bodies)) == 1


def test_every_text_is_hashed_and_compared_as_often(keys: Keys) -> None:
    good = keys.make("generate")["authorization"].removeprefix("Bearer ")
    texts = [good, good[:-1] + "!", new_token(), "nonsense", ""]
    counts = [calls_of(partial(keys.ring.authenticate, text)) for text in texts]
    assert keys.ring.authenticate(good) is not None
    assert all(count == {"openssl_sha256": 1, "compare_digest": 2} for count in counts)


def calls_of(function: Callable[[], object]) -> dict[str, int]:
    """Count the calls of what costs time."""
    counts = Counter[str]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = getattr(argument, "__name__", "")
        if event == "c_call" and name in ("openssl_sha256", "compare_digest"):
            counts[name] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return dict(counts)
