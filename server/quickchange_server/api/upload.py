"""The form of `POST /v1/adapters`: its parts in any order, files to the store as they arrive."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from quickchange_adapters.errors import Problem
from quickchange_adapters.store import StagedFile
from starlette.exceptions import HTTPException

from quickchange_server.adapter_service import AdapterService, FileName, UploadForm
from quickchange_server.adapter_upload import UploadTerms
from quickchange_server.api.multipart import FormInvalid, MultipartReader, read_text
from quickchange_server.api.upload_pace import UploadPace
from quickchange_server.errors import InvalidRequest, TooLarge

MAX_FIELD_BYTES = 4096
MAX_TAGS = 32
FILES: dict[str, FileName] = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "task": "task.json",
}
SWITCHES = ("allow_noop", "strict_base")
FIELDS = ("name", "alias", "tags", "visibility", *SWITCHES)
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}


class UploadReader:
    """Collects the parts of one upload; `discard` forgets the staged files of a failed one.

    What is wrong with a part goes into the form's problems, and the other parts are read as well.
    """

    def __init__(self, service: AdapterService, tenant: str, terms: UploadTerms) -> None:
        self._service = service
        self._tenant = tenant
        self._terms = terms
        self._fields: dict[str, str] = {}
        self._staged: dict[str, StagedFile] = {}
        self._seen: set[str] = set()
        self._problems: list[Problem] = []

    async def read(self, request: Request, pace: UploadPace) -> UploadForm:
        """Read the body to its end.

        Raises: FormInvalid, UnsupportedMediaType, Unavailable, TooSlow, TooLarge when it is the
        body.
        """
        content_type = request.headers.get("content-type", "")
        reader = MultipartReader(content_type, pace.watch(request.stream()))
        try:
            async for name, chunks in reader.parts():
                await self._take(name, chunks)
        except HTTPException as error:
            raise TooLarge(error.detail) from error
        return self._form()

    async def discard(self) -> None:
        """Forget what was staged."""
        await self._service.discard(list(self._staged.values()))

    async def _take(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        try:
            await self._keep(name, chunks)
        except FormInvalid:
            raise
        except (InvalidRequest, TooLarge) as error:
            self._refuse(error.code, error.param or name[:80], error.message)
            async for _ in chunks:
                pass  # the next part begins where this one ends

    def _refuse(self, code: str, part: str, message: str) -> None:
        self._problems.append(Problem(code, part, message))

    async def _keep(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        if name in self._seen:
            raise InvalidRequest(f"{name[:80]}: was sent twice", param=name[:80])
        self._seen.add(name)
        if name in FILES:
            self._staged[name] = await self._service.stage(FILES[name], chunks)
        elif name in FIELDS:
            self._fields[name] = await read_text(name, chunks, MAX_FIELD_BYTES)
        else:
            raise InvalidRequest(
                f"{name[:80]!r} is not a part of this form; use {', '.join((*FILES, *FIELDS))}",
                code="unknown_field",
            )

    def _form(self) -> UploadForm:
        switches = {name: self._switch(name) for name in SWITCHES}
        tags = self._tags()
        return UploadForm(
            name=self._fields.get("name", "").strip(),
            adapter_config=self._staged.get("adapter_config"),
            adapter_model=self._staged.get("adapter_model"),
            task=self._staged.get("task"),
            alias=self._fields.get("alias") or None,
            tags=tags,
            visibility=self._fields.get("visibility") or None,
            tenant=self._tenant,
            terms=self._terms,
            problems=tuple(self._problems),
            **switches,
        )

    def _switch(self, name: str) -> bool:
        value = self._fields.get(name, "").strip().lower()
        if value not in _TRUTH:
            message = f"{name}: must be true or false, not {value[:20]!r}"
            self._refuse(InvalidRequest.code, name, message)
        return _TRUTH.get(value, False)

    def _tags(self) -> tuple[str, ...]:
        parts = self._fields.get("tags", "").split(",")
        tags = tuple(dict.fromkeys(tag.strip() for tag in parts if tag.strip()))
        if len(tags) > MAX_TAGS:
            self._refuse(InvalidRequest.code, "tags", f"tags: {len(tags)}; at most {MAX_TAGS}")
        return tags


def _file(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}


OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "adapter_config", "adapter_model"],
                    "properties": {
                        "name": {
                            "type": "string",
                            "pattern": "^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$",
                        },
                        "adapter_config": _file("PEFT's adapter_config.json"),
                        "adapter_model": _file("PEFT's adapter_model.safetensors"),
                        "task": _file(
                            "task.json, up to 16 KiB: prompt (with {input}), system, stop, "
                            "max_tokens, temperature, top_p; all optional"
                        ),
                        "alias": {
                            "type": "string",
                            "pattern": "^[a-z][a-z0-9-]{0,31}$",
                            "description": "moved to this version in the same transaction",
                        },
                        "tags": {"type": "string", "description": "separated by commas"},
                        "visibility": {"type": "string", "enum": ["public", "private"]},
                        "allow_noop": {"type": "boolean", "default": False},
                        "strict_base": {"type": "boolean", "default": False},
                    },
                }
            }
        },
    }
}
"""The form, by hand: the route reads the body itself, so FastAPI cannot see it."""
