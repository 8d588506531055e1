"""A small stand-in that speaks the contract: enough to hold the client and the command to it.

It keeps adapters in memory and answers every prompt with the same few words. It checks no tensors.
"""

import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BASE = "tiny-llama"
WORDS = ("A", " fine", " film", ",\u2028indeed", " 🙂")
FILES = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "task": "task.json",
}
NOT_TENSORS = b"\x80\x04pickle"
GAP = b"break off"

Json = dict[str, Any]


@dataclass
class StoredAdapter:
    """A name, its versions by number, their files by number and file, and its aliases."""

    name: str
    versions: dict[int, Json] = field(default_factory=dict)
    files: dict[tuple[int, str], bytes] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)

    @property
    def etag(self) -> str:
        state = json.dumps([sorted(self.versions), self.aliases])
        return f'"{hashlib.sha256(state.encode()).hexdigest()[:8]}"'

    def to_json(self) -> Json:
        return {
            "object": "adapter",
            "name": self.name,
            "tenant": "default",
            "visibility": "public",
            "aliases": self.aliases,
            "versions": list(self.versions.values()),
            "tags": self.tags,
            "created_at": 1_760_000_000,
        }


class FakeServer:
    """The app, what it was asked (`requests`), and answers to give first (`next_answers`)."""

    def __init__(self) -> None:
        self.adapters: dict[str, StoredAdapter] = {}
        self.requests: list[tuple[str, str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.scopes: list[str] = []
        self.next_answers: deque[Response] = deque()
        self.api_key: str | None = None
        self.refuses_to_delete: set[int] = set()
        adapter = "/v1/adapters/{name}"
        self.app = Starlette(
            routes=[
                Route("/health", self._guarded(self._health)),
                Route("/v1/memory", self._guarded(self._memory)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{model:path}", self._guarded(self._model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
                Route("/v1/adapters", self._guarded(self._upload), methods=["POST"]),
                Route("/v1/adapters", self._guarded(self._list)),
                Route(adapter, self._guarded(self._get)),
                Route(adapter, self._guarded(self._delete), methods=["DELETE"]),
                Route(adapter + "/events", self._guarded(self._events)),
                Route(adapter + "/versions/{version:int}", self._guarded(self._get_version)),
                Route(
                    adapter + "/versions/{version:int}/files/{file}",
                    self._guarded(self._get_file),
                ),
                Route(
                    adapter + "/versions/{version:int}",
                    self._guarded(self._delete_version),
                    methods=["DELETE"],
                ),
                Route(
                    adapter + "/aliases/{alias}",
                    self._guarded(self._alias),
                    methods=["PUT", "DELETE"],
                ),
                Route(adapter + "/{verb}", self._guarded(self._act), methods=["POST"]),
            ]
        )

    def _guarded(self, handler: Any) -> Any:
        async def handle(request: Request) -> Response:
            self.headers.append(dict(request.headers))
            if self.next_answers:
                await request.body()
                return self.next_answers.popleft()
            if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
                return refusal(401, "invalid_api_key", "no key, or one that is not known")
            answer: Response = await handler(request)
            answer.headers["x-request-id"] = f"req-{len(self.headers)}"
            return answer

        return handle

    async def _body(self, request: Request) -> Json:
        text = await request.body()
        body: Json = json.loads(text) if text else {}
        self.requests.append((request.method, request.url.path, body))
        return body

    # generation

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request)
        prompt = body["messages"][-1]["content"]
        return self._generate(body, prompt, "chat.completion", _chat_choice, _chat_delta)

    async def _complete(self, request: Request) -> Response:
        body = await self._body(request)
        prompt = body["prompt"]
        return self._generate(body, prompt, "text_completion", _text_choice, _text_choice)

    def _generate(
        self, body: Json, prompt: Any, kind: str, whole_choice: Any, part_choice: Any
    ) -> Response:
        if self._root_of(body["model"]) is None:
            return refusal(404, "model_not_found", f"there is no model {body['model']!r}")
        if prompt == "too long":
            return refusal(400, "context_length_exceeded", "the prompt has 900 tokens, of 512")
        head = {"id": "gen-1", "created": 1, "model": body["model"], "system_fingerprint": "fp"}
        words = WORDS[: body.get("max_tokens", len(WORDS))]
        reason = "length" if len(words) < len(WORDS) else "stop"
        usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 8}
        if not body.get("stream"):
            choices = [whole_choice("".join(words), reason)]
            answer = {**head, "object": kind, "choices": choices, "usage": usage}
            return JSONResponse(answer, headers=self._generation_headers(body))
        parts = [part_choice(word, None) for word in words] + [part_choice("", reason)]
        events: list[Json] = [{**head, "object": kind, "choices": [part]} for part in parts]
        if body.get("stream_options", {}).get("include_usage"):
            events.append({**head, "object": kind, "choices": [], "usage": usage})
        return StreamingResponse(
            _sse(events, prompt),
            media_type="text/event-stream",
            headers=self._generation_headers(body),
        )

    def _generation_headers(self, body: Json) -> dict[str, str]:
        headers = {"x-quickchange-queue-ms": "1.5", "x-quickchange-ttft-ms": "20"}
        if body["model"] != BASE:
            headers["x-quickchange-adapter-digest"] = "sha256:" + "ab" * 32
        if "tempreature" in body:
            headers["x-quickchange-ignored-fields"] = "tempreature"
        return headers

    # models

    def _root_of(self, model: str) -> str | None:
        """Return the version behind a model string, the base's name for itself, None for none."""
        if model == BASE:
            return BASE
        name, _, selector = model.partition("@")
        name, _, number = name.partition(":")
        stored = self.adapters.get(name)
        if stored is None:
            return None
        version = int(number) if number else stored.aliases.get(selector or "default")
        for each in stored.versions.values():
            if selector.startswith("sha256:") and each["digest"].startswith(selector):
                version = each["version"]
        return f"{name}:{version}" if version in stored.versions else None

    async def _models(self, request: Request) -> Response:
        ids = [BASE, *self.adapters]
        return JSONResponse({"object": "list", "data": [self._model_json(each) for each in ids]})

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        if self._root_of(model) is None:
            return refusal(404, "model_not_found", f"there is no model {model!r}")
        return JSONResponse(self._model_json(model))

    def _model_json(self, model: str) -> Json:
        parent = None if model == BASE else BASE
        return {
            "id": model,
            "object": "model",
            "created": 1,
            "owned_by": "quickchange",
            "root": self._root_of(model),
            "parent": parent,
            "max_model_len": 512,
        }

    # adapters

    async def _upload(self, request: Request) -> Response:
        form = await request.form()
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
        files = {key: form[key] for key in FILES if key in form}
        contents = {key: await part.read() for key, part in files.items()}  # type: ignore[union-attr]
        digests = {key: hashlib.sha256(data).hexdigest() for key, data in contents.items()}
        self.requests.append(("POST", "/v1/adapters", {**fields, **digests}))
        problems = []
        if contents.get("adapter_model", b"").startswith(NOT_TENSORS):
            problems.append(_problem())
        if request.query_params.get("dry_run") == "true":
            return JSONResponse({**_report(), "ok": not problems, "problems": problems})
        if problems:
            return refusal(400, "weights_not_safetensors", "no safetensors", problems=problems)
        return self._keep(fields, contents)

    def _keep(self, fields: dict[str, str], contents: dict[str, bytes]) -> Response:
        name = fields["name"]
        stored = self.adapters.setdefault(name, StoredAdapter(name))
        joined = b"".join(hashlib.sha256(data).digest() for data in contents.values())
        digest = "sha256:" + hashlib.sha256(joined).hexdigest()
        num_bytes = sum(map(len, contents.values()))
        same = [v for v in stored.versions.values() if v["digest"] == digest]
        number = same[0]["version"] if same else len(stored.versions) + 1
        version = same[0] if same else _version(name, number, digest, num_bytes)
        stored.versions[number] = version
        version["task"] = json.loads(contents["task"]) if "task" in contents else None
        stored.files |= {(number, FILES[key]): data for key, data in contents.items()}
        stored.aliases.setdefault("default", number)
        if "alias" in fields:
            stored.aliases[fields["alias"]] = number
        return JSONResponse(version, status_code=200 if same else 201)

    async def _list(self, request: Request) -> Response:
        after = request.query_params.get("after", "")
        limit = int(request.query_params.get("limit", 2))
        names = [name for name in sorted(self.adapters) if name > after]
        page = names[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [self.adapters[name].to_json() for name in page],
                "has_more": len(names) > limit,
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
            }
        )

    async def _get(self, request: Request) -> Response:
        stored = self.adapters.get(request.path_params["name"])
        return _adapter_not_found(request) if stored is None else _adapter_answer(stored)

    async def _events(self, request: Request) -> Response:
        events = self.adapters[request.path_params["name"]].events
        numbered = [{"id": str(n), "at": n, **event} for n, event in enumerate(events, 1)]
        return JSONResponse({"object": "list", "data": numbered, "has_more": False})

    async def _get_version(self, request: Request) -> Response:
        stored = self.adapters.get(request.path_params["name"])
        number = request.path_params["version"]
        if stored is None or number not in stored.versions:
            return _adapter_not_found(request)
        return JSONResponse(stored.versions[number])

    async def _get_file(self, request: Request) -> Response:
        stored = self.adapters[request.path_params["name"]]
        data = stored.files[request.path_params["version"], request.path_params["file"]]
        return StreamingResponse(_pieces(data))

    async def _delete(self, request: Request) -> Response:
        await self._body(request)
        name = request.path_params["name"]
        if self.adapters.pop(name, None) is None:
            return _adapter_not_found(request)
        freed = {"device": 4096, "host": 2048, "merged": 0, "disk": 1024}
        is_done = request.query_params.get("timeout_s") != "0.0"
        return JSONResponse(
            {
                "object": "adapter.deleted",
                "name": name,
                "deleted": is_done,
                "state": "deleted" if is_done else "deleting",
                "freed_bytes": freed,
            },
            status_code=200 if is_done else 202,
        )

    async def _delete_version(self, request: Request) -> Response:
        await self._body(request)
        stored = self.adapters[request.path_params["name"]]
        number = request.path_params["version"]
        if number in {*stored.aliases.values(), *self.refuses_to_delete}:
            return refusal(409, "alias_in_use", "an alias points at it; move the alias first")
        stored.versions.pop(number)
        answer = {"object": "adapter.version.deleted", "name": stored.name, "version": number}
        return JSONResponse({**answer, "deleted": True, "state": "deleted", "freed_bytes": {}})

    async def _alias(self, request: Request) -> Response:
        body = await self._body(request)
        stored = self.adapters.get(request.path_params["name"])
        if stored is None:
            return _adapter_not_found(request)
        if request.headers.get("if-match", stored.etag) != stored.etag:
            return refusal(412, "precondition_failed", "the adapter has changed")
        alias = request.path_params["alias"]
        if request.method == "PUT":
            stored.aliases[alias] = body["version"]
        elif stored.aliases.pop(alias, None) is None:
            return refusal(404, "alias_not_found", f"there is no alias {alias!r}")
        return _adapter_answer(stored)

    async def _act(self, request: Request) -> Response:
        body = await self._body(request)
        verb, name = request.path_params["verb"], request.path_params["name"]
        if name not in self.adapters:
            return _adapter_not_found(request)
        stored = self.adapters[name]
        version = stored.versions[body.get("version", stored.aliases["default"])]
        version["merged"] = verb == "merge"
        version["pinned"] = verb == "pin"
        version["state"] = "disabled" if verb == "disable" else "ready"
        version["tier"] = "disk" if verb == "unload" else "host"
        self.scopes.append(request.query_params.get("scope", "catalog"))
        return JSONResponse(
            {
                "object": "adapter.action",
                "action": verb,
                "name": name,
                "version": version["version"],
                "digest": version["digest"],
                "state": version["state"],
                "tier": version["tier"],
                "pinned": version["pinned"],
                "merged": version["merged"],
                "bytes": {"host": 10, "device": 20, "merged": 3000 if version["merged"] else 0},
                "freed_bytes": {"merged": 0 if version["merged"] else 3000},
                "seconds": 0.25,
                "replica": "here",
            }
        )

    # server

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _memory(self, request: Request) -> Response:
        held = {"host": 2048, "device": 4096, "merged": 0, "num_running": 1}
        return JSONResponse(
            {
                "object": "memory",
                "bytes": {"base": 1_500_000, "kv_used": 0},
                "adapters": [{"digest": "sha256:" + "ab" * 32, **held}],
            }
        )


def refusal(status: int, code: str, message: str, **more: Any) -> JSONResponse:
    """Return an answer in the contract's form of an error."""
    headers = more.pop("headers", None)
    error = {"message": message, "type": "a_type", "param": "a_param", "code": code}
    return JSONResponse({"error": error, **more}, status_code=status, headers=headers)


async def _sse(events: list[Json], prompt: Any) -> AsyncIterator[bytes]:
    yield b": ping\n\n"
    for index, event in enumerate(events):
        if index == 2 and prompt == "break off":
            return
        if index == 2 and prompt == "fail":
            error = {"message": "not finite", "type": "server_error", "code": "generation_failed"}
            yield f"data: {json.dumps({'error': error})}\n\n".encode()
            return
        yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _chat_choice(text: str, reason: str) -> Json:
    message = {"role": "assistant", "content": text}
    return {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}


def _chat_delta(text: str, reason: str | None) -> Json:
    return {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}


def _text_choice(text: str, reason: str | None) -> Json:
    return {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}


def _adapter_answer(stored: StoredAdapter) -> Response:
    return JSONResponse(stored.to_json(), headers={"etag": stored.etag})


def _adapter_not_found(request: Request) -> Response:
    name = request.path_params["name"]
    return refusal(404, "adapter_not_found", f"there is no adapter {name!r}")


def _problem() -> Json:
    return {
        "code": "weights_not_safetensors",
        "where": "adapter_model.safetensors",
        "message": "the file does not begin as safetensors do",
        "hint": "save it with save_pretrained()",
    }


def _report() -> Json:
    module = {"module": "layers.0.q_proj", "rank": 8, "scaling": 2.0, "update_norm": 0.5}
    return {
        "object": "adapter.report",
        "ok": True,
        "warnings": ["trained on another path of the base"],
        "base": BASE,
        "modules": {
            "matched": [{**module, "lora_a": [8, 64], "lora_b": [64, 8]}],
            "missed": [],
            "unexpected": [],
        },
        "ranks": [8],
        "target_modules": ["q_proj"],
        "finite": True,
        "no_effect": False,
        "probe": {
            "num_tokens": 35,
            "mean_change": 0.25,
            "max_change": 1.5,
            "num_top_changed": 7,
            "seconds": 0.1,
        },
        "probe_reason": None,
    }


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    """Yield bytes in pieces; those of a file with a gap break off there."""
    for start in range(0, len(data), 50_000):
        piece = data[start : start + 50_000]
        yield piece
        if GAP in piece:
            raise ConnectionError("broken off on purpose")


def _version(name: str, number: int, digest: str, num_bytes: int) -> Json:
    return {
        "object": "adapter.version",
        "name": name,
        "version": number,
        "digest": digest,
        "state": "ready",
        "peft_type": "LORA",
        "rank": 8,
        "ranks": [8],
        "target_modules": ["q_proj"],
        "task": None,
        "bytes": {"file": num_bytes, "host": 0, "device": 0},
        "tier": "disk",
        "pinned": False,
        "merged": False,
        "base": BASE,
        "created_at": 1_760_000_000,
        "last_used_at": None,
        "requests": 0,
        "report": _report(),
    }
