"""`GET /v1/models`, and `/tokenize` and `/detokenize` in vLLM's shapes."""

from typing import Any

from fastapi import APIRouter
from quickchange_adapters.task import Task

from quickchange_server.api.auth import Generator
from quickchange_server.api.generation_planner import vocab_size
from quickchange_server.api.named_adapters import check_model
from quickchange_server.api.prompts import template_messages
from quickchange_server.api.schemas import DetokenizeBody, TokenizeBody
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.errors import InvalidRequest
from quickchange_server.principal import Principal

Json = dict[str, Any]

router = APIRouter(tags=["models"], route_class=ScopedRoute)


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def list_models(services: Services, caller: Generator) -> Json:
    """List the base, the adapters, and their aliases."""
    models = services.adapters.models(tenant=caller.tenant, names=caller.adapters)
    return {"object": "list", "data": [model.to_json() for model in models]}


@router.head("/v1/models/{model_id:path}", include_in_schema=False)
@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, services: Services, caller: Generator) -> Json:
    """Show one model; any model string that a request may name."""
    check_model(caller, model_id)
    return services.adapters.model(model_id, tenant=caller.tenant).to_json()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, services: Services, caller: Generator) -> Json:
    """Return the token ids that generation makes of a prompt or of messages, task included."""
    task = _task(body.model, services, caller)
    token_ids = await _token_ids(body, services, Task() if body.raw_prompt else task)
    pieces = None
    if body.return_token_strs:
        pieces = [services.tokenizer.token_piece(token_id) for token_id in token_ids]
    return {
        "count": len(token_ids),
        "max_model_len": services.engine.max_model_len,
        "tokens": token_ids,
        "token_strs": pieces,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, services: Services, caller: Generator) -> Json:
    """Return the text of token ids, special tokens included."""
    _task(body.model, services, caller)
    limit = vocab_size(services)
    for token_id in body.tokens:
        if token_id >= limit:
            raise InvalidRequest(
                f"tokens: {token_id} is not a token id; they are below {limit}", param="tokens"
            )
    return {"prompt": services.tokenizer.decode(body.tokens, skip_special_tokens=False)}


async def _token_ids(body: TokenizeBody, services: AppServices, task: Task) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if body.prompt is not None:
        has_specials = body.add_special_tokens is not False
        text = task.render_prompt(body.prompt)
        return await services.tokenizer.encode_async(text, has_specials)
    messages = task.render_chat(template_messages(body.messages or ()))
    return await services.tokenizer.encode_chat(messages, body.add_generation_prompt)


def _task(model: str | None, services: AppServices, caller: Principal) -> Task:
    """Return a model's task; all share the base's tokenizer, and an unknown one is still a 404."""
    if model is None:
        return Task()
    check_model(caller, model)
    return services.adapters.resolve(model, tenant=caller.tenant).task or Task()
