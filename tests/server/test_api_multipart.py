"""The upload's form as it arrives: in any order, in any pieces, broken in any way."""

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quickchange_adapters.errors import Problem
from quickchange_server.api.app import AppServices, BodyLimits, create_app
from quickchange_server.api.multipart import MultipartReader
from quickchange_server.errors import InvalidRequest, TooLarge

from tests.server.conftest import serve_in_process
from tests.server.scripted_adapters import ScriptedAdapters

PATH = "/v1/adapters"
KIND = "multipart/form-data; boundary=XX"


def part(name: str, data: bytes, extra: str = "") -> bytes:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + data + b"\r\n"


PARTS = {
    "name": part("name", b"ada"),
    "config": part("adapter_config", b"{}", '; filename="../../etc/passwd"'),
    "weights": part("adapter_model", b"\r\n--X\r\n\x00\xff" * 99, '; filename="x.bin"'),
}
END = b"--XX--\r\n"
FORM = b"".join(PARTS.values()) + END


async def post(client: httpx.AsyncClient, body: bytes, kind: str = KIND) -> httpx.Response:
    return await client.post(PATH, content=body, headers={"content-type": kind})


@pytest.mark.parametrize("order", [("name", "config", "weights"), ("weights", "name", "config")])
async def test_parts_in_any_order(
    client: httpx.AsyncClient, adapters: ScriptedAdapters, order: tuple[str, ...]
) -> None:
    body = b"".join(PARTS[name] for name in order) + END
    answer = await post(client, body)
    assert answer.status_code == 200
    assert adapters.received == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"\r\n--X\r\n\x00\xff" * 99,
    }
    (form,) = adapters.uploads
    assert (form.name, form.alias, form.tags, form.allow_noop) == ("ada", None, (), False)


async def test_new_name_is_201(client: httpx.AsyncClient) -> None:
    body = FORM.replace(b"\r\nada\r\n", b"\r\nnew\r\n")
    assert (await post(client, body)).status_code == 201


async def test_every_field_is_read(client: httpx.AsyncClient, adapters: ScriptedAdapters) -> None:
    fields = {
        "alias": b"blue",
        "tags": b"a, b,,a",
        "visibility": b"private",
        "allow_noop": b"TRUE",
        "strict_base": b"1",
        "task": b"{}",
    }
    await post(client, b"".join(part(*each) for each in fields.items()) + FORM)
    (form,) = adapters.uploads
    assert (form.alias, form.tags, form.visibility) == ("blue", ("a", "b"), "private")
    assert (form.allow_noop, form.strict_base) == (True, True)
    assert form.task is not None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FORM[:-8], "ends before"),
        (FORM[:40], "ends before"),
        (b"", "ends before"),
        (b"nonsense", "cannot be read"),
        (PARTS["name"] + FORM, "sent twice"),
        (PARTS["config"] + FORM, "sent twice"),
        (part("surprise", b"x") + FORM, "not a part"),
        (part("allow_noop", b"maybe") + FORM, "true or false"),
        (part("alias", b"\xff") + FORM, "UTF-8"),
        (PARTS["config"] + PARTS["weights"] + END, "name: is missing"),
        (b"--XX\r\nX-Other: 1\r\n\r\nx\r\n" + FORM, "no Content-Disposition"),
        (b"".join(part(f"p{i}", b"") for i in range(99)) + END, "32 parts"),
        (part("tags", b",".join(b"%d" % i for i in range(40))) + FORM, "32"),
    ],
)
async def test_broken_forms_are_the_caller_s_fault(
    client: httpx.AsyncClient, adapters: ScriptedAdapters, body: bytes, message: str
) -> None:
    answer = await post(client, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert adapters.num_discarded == len(adapters.received)
    assert adapters.uploads == []


async def test_every_fault_of_a_form_is_said_at_once(
    client: httpx.AsyncClient, adapters: ScriptedAdapters
) -> None:
    wrong = [part("allow_noop", b"maybe"), part("surprise", b"x" * 9999), PARTS["config"]]
    answer = await post(client, b"".join(wrong) + PARTS["config"] + PARTS["weights"] + END)
    problems = {each["where"]: each["code"] for each in answer.json()["problems"]}
    assert problems == {
        "surprise": "unknown_field",
        "adapter_config": "invalid_request",
        "allow_noop": "invalid_request",
        "name": "invalid_name",
    }
    assert adapters.num_discarded == 2


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (PARTS["config"] + FORM, KIND, "invalid_request"),
        (PARTS["config"] + PARTS["weights"] + END, KIND, "invalid_name"),
        (part("surprise", b"x") + FORM, KIND, "unknown_field"),
        (part("alias", b"x" * 5000) + FORM, KIND, "too_large"),
        (FORM[:40], KIND, "invalid_form"),
        (FORM, "text/plain", "unsupported_media_type"),
        (FORM.replace(b"\r\nada\r\n", b"\r\ntiny\r\n"), KIND, "conflict"),
        (FORM + b" " * 3_000_000, KIND, "too_large"),
    ],
)
async def test_every_refusal_is_counted_and_lists_its_problems(
    services: AppServices, body: bytes, kind: str, code: str
) -> None:
    limits = BodyLimits(upload_bytes=2_000_000)
    async for client in serve_in_process(create_app(replace(services, limits=limits))):
        answer = await post(client, body, kind)
    assert answer.json()["error"]["code"] == code
    assert [problem["code"] for problem in answer.json()["problems"]] == [code]
    counted = services.metrics.registry.get_sample_value
    assert counted("quickchange_adapter_rejections_total", {"code": code}) == 1


async def test_broken_forms_do_not_fill_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        await post(client, FORM + b"garbage behind the end")
        await post(client, b"nonsense")
    assert caplog.records == []


async def test_long_field_is_413(client: httpx.AsyncClient) -> None:
    answer = await post(client, part("name", b"x" * 5000) + FORM)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "text/plain; boundary=XX", ""]
)
async def test_other_content_types_are_415(client: httpx.AsyncClient, kind: str) -> None:
    assert (await post(client, FORM, kind)).status_code == 415


async def test_boundary_too_long_is_400(client: httpx.AsyncClient) -> None:
    answer = await post(client, FORM, "multipart/form-data; boundary=" + "x" * 500)
    assert answer.status_code == 400


async def test_refusal_lists_all_problems(
    client: httpx.AsyncClient, adapters: ScriptedAdapters
) -> None:
    adapters.problems = [
        Problem("shape_mismatch", "q_proj", "lora_a is [8, 3], not [8, 64]", "train on this base"),
        Problem("unknown_module", "x_proj", "the base has no x_proj"),
    ]
    answer = await post(client, FORM)
    body = answer.json()
    assert answer.status_code == 400
    assert body["error"]["code"] == "shape_mismatch"
    assert [problem["where"] for problem in body["problems"]] == ["q_proj", "x_proj"]
    assert body["problems"][0]["hint"] == "train on this base"


async def read_all(body: bytes, cuts: list[int]) -> dict[str, bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        marks = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        for start, end in zip(marks, marks[1:], strict=False):
            yield body[start:end]

    reader = MultipartReader(KIND, pieces())
    return {name: b"".join([c async for c in chunks]) async for name, chunks in reader.parts()}


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 10_000), max_size=12))
async def test_pieces_of_any_size_give_the_same_parts(data: bytes, cuts: list[int]) -> None:
    if b"\r\n--XX" in b"\r\n" + data:
        return
    body = PARTS["name"] + part("adapter_model", data) + END
    assert await read_all(body, cuts) == {"name": b"ada", "adapter_model": data}


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, len(FORM) - 1), byte=st.integers(0, 255))
async def test_any_changed_byte_is_read_or_refused(place: int, byte: int) -> None:
    body = FORM[:place] + bytes([byte]) + FORM[place + 1 :]
    with suppress(InvalidRequest, TooLarge):
        await read_all(body, [place])
