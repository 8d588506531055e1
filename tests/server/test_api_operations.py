import re
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.api.route_answers import REFUSALS
from quickchange_server.engine.interface import EngineSnapshot

from tests.server.conftest import BASE_URL, serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.socket_server import serve_on_socket


async def test_probes_of_a_running_server(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_probes_may_ask_with_head(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, path: str
) -> None:
    assert (await client.head(path)).status_code == 200
    scripted_engine.is_running = False
    assert (await client.head(path)).status_code == 503


async def test_what_operators_read_may_be_asked_for_by_head(services: AppServices) -> None:
    """On one connection: a body behind an answer to HEAD would be read as the next answer."""
    async with serve_on_socket(create_app(services)) as client:
        for path in ("/livez", "/readyz", "/health", "/version", "/metrics"):
            asked, read = await client.head(path), await client.get(path)
            assert (asked.status_code, asked.content, read.status_code) == (200, b"", 200)
            assert asked.headers["content-type"] == read.headers["content-type"]
        scraped = {"accept": "application/openmetrics-text"}
        assert (
            "openmetrics"
            in (await client.head("/metrics", headers=scraped)).headers["content-type"]
        )


async def test_not_ready_before_start_and_after_stop(services: AppServices) -> None:
    app = create_app(services)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
        assert (await client.get("/readyz")).status_code == 503
        async with app.router.lifespan_context(app):
            assert (await client.get("/readyz")).status_code == 200
        answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


async def test_the_engine_is_stopped_although_the_adapters_cannot_be(
    services: AppServices, scripted_engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop() -> None:
        raise OSError("the disk is gone")

    app = create_app(services)
    monkeypatch.setattr(services.adapters, "stop", stop)
    with pytest.raises(OSError, match="the disk is gone"):
        async with app.router.lifespan_context(app):
            assert scripted_engine.is_running
    assert not scripted_engine.is_running


async def test_dead_engine_is_not_alive(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.is_running = False
    for path in ("/livez", "/readyz"):
        answer = await client.get(path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"


class Hanging(ScriptedEngine):
    silent_s = 60.0

    def snapshot(self) -> EngineSnapshot:
        heard_s = time.monotonic() - self.silent_s
        return replace(super().snapshot(), heartbeat_monotonic_s=heard_s)


async def test_engine_that_hangs_is_not_alive(services: AppServices) -> None:
    engine = Hanging()
    async for client in serve_in_process(create_app(replace(services, engine=engine, stall_s=5))):
        assert (await client.get("/livez")).json()["error"]["code"] == "engine_stalled"
        engine.silent_s = 1.0
        assert (await client.get("/livez")).status_code == 200


async def test_version_names_the_base(client: httpx.AsyncClient) -> None:
    body = (await client.get("/version")).json()
    assert body["base"] == "tiny"
    assert body["base_digest"] == "ba5e" * 16
    assert body["version"]


async def test_memory_by_part(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/memory")).json()
    assert body["bytes"]["base"] == 1000
    assert body["bytes"]["process_rss"] > 1_000_000


async def test_what_is_held_of_a_gpu_is_shown_where_there_is_one(services: AppServices) -> None:
    engine = ScriptedEngine(on_device={"device_allocated": 7, "host_pinned": 9})
    async for client in serve_in_process(create_app(replace(services, engine=engine))):
        parts = (await client.get("/v1/memory")).json()["bytes"]
        assert (parts["device_allocated"], parts["host_pinned"]) == (7, 9)
        text = (await client.get("/metrics")).text
        assert 'quickchange_memory_bytes{part="device_allocated"} 7.0' in text


async def test_models_are_openai_s(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    by_id: dict[str, Any] = {model["id"]: model for model in body["data"]}
    assert set(by_id) == {"tiny", "ada", "bob", "ada@blue"}
    assert by_id["tiny"]["parent"] is None
    assert by_id["ada"]["parent"] == "tiny"
    assert isinstance(by_id["ada"]["created"], int)
    assert by_id["ada"]["object"] == "model"


async def test_one_model(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/ada@blue")).json()["id"] == "ada@blue"


async def test_model_ids_may_hold_slashes(services: AppServices) -> None:
    services.adapters.base_names = ("org/base",)
    async for client in serve_in_process(create_app(services)):
        assert (await client.get("/v1/models/org/base")).json()["id"] == "org/base"


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    text = "the lazy dog 🙂"
    body = (await client.post("/tokenize", json={"model": "ada", "prompt": text})).json()
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 512
    assert body["token_strs"] is None
    back = await client.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": text}


async def test_tokenize_messages_and_pieces(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "the"}]
    body = (
        await client.post("/tokenize", json={"messages": messages, "return_token_strs": True})
    ).json()
    assert body["token_strs"][0] == "<|im_start|>"
    back = await client.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json()["prompt"] == ("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")


async def test_tokenize_wants_one_of_two(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={})).status_code == 400
    answer = await client.post("/tokenize", json={"model": "nobody", "prompt": "a"})
    assert answer.status_code == 404


async def test_detokenize_refuses_ids_outside_the_vocabulary(client: httpx.AsyncClient) -> None:
    answer = await client.post("/detokenize", json={"tokens": [1, 99999]})
    assert answer.status_code == 400
    assert "99999" in answer.json()["error"]["message"]


async def test_metrics_speak_both_formats(client: httpx.AsyncClient) -> None:
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    modern = await client.get("/metrics", headers=accept)
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_openapi_shows_the_upload_s_form(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    form = schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    properties = form["multipart/form-data"]["schema"]["properties"]
    assert {"name", "adapter_config", "adapter_model", "task", "alias"} <= set(properties)
    assert properties["adapter_model"]["format"] == "binary"
    assert properties["task"]["format"] == "binary"
    assert (await client.get("/docs")).status_code == 200


async def test_openapi_shows_the_errors_that_are_answered(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    schemas = schema["components"]["schemas"]
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)
    operations = {
        f"{method.upper()} {path}": each
        for path, methods in schema["paths"].items()
        for method, each in methods.items()
    }
    assert set(operations) == set(REFUSALS)
    for route, operation in operations.items():
        assert all(re.fullmatch(r"\d{3}", status) for status in operation["responses"]), route
        assert ("401" in operation["responses"]) == ("security" in operation), route
    upload = operations["POST /v1/adapters"]["responses"]
    assert {"200", "201", "507"} <= set(upload)
    shape = upload["400"]["content"]["application/json"]["schema"]["$ref"]
    assert shape == "#/components/schemas/Error"
    answer = await client.get("/v1/adapters?limit=0")
    assert set(schemas["Error"]["properties"]["error"]["properties"]) == set(answer.json()["error"])
    other = operations["POST /generate"]["responses"]["422"]["content"]["application/json"]
    assert other["schema"]["$ref"] == "#/components/schemas/GenerateError"
    answer = await client.post("/generate", json={})
    assert set(schemas["GenerateError"]["properties"]) == set(answer.json())


async def test_openapi_shows_which_key_a_route_needs(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    schemes = schema["components"]["securitySchemes"]
    assert {(each["type"], each["scheme"]) for each in schemes.values()} == {("http", "bearer")}
    paths = schema["paths"]
    assert paths["/v1/adapters"]["post"]["security"] == [{"adapters:write": []}]
    assert paths["/v1/memory"]["get"]["security"] == [{"admin": []}]
    assert "security" not in paths["/livez"]["get"]


async def test_openapi_shows_how_a_task_is_left_aside(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for body in ("ChatBody", "CompletionBody", "TokenizeBody"):
        assert "task.json" in schemas[body]["properties"]["raw_prompt"]["description"]
