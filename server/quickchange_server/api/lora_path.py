"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: what vLLM's callers send.

Off unless folders were named at start (`--lora-root`). A loaded folder becomes a version like any
upload: the same checks, store and catalog. What was first loaded here may be unloaded here, which
deletes it; what was uploaded otherwise may not.
"""

import asyncio
from contextlib import suppress

from fastapi import APIRouter
from quickchange_adapters.names import DEFAULT_ALIAS, is_adapter_name
from quickchange_adapters.records import version_digest
from quickchange_adapters.store import StagedFile
from starlette.responses import PlainTextResponse

from quickchange_server.adapter_service import FileName, UploadForm
from quickchange_server.adapter_upload import file_records
from quickchange_server.adapter_views import ResolvedModel
from quickchange_server.api.adapters import note_refusal, upload_terms
from quickchange_server.api.auth import Writer
from quickchange_server.api.field_policy import NEUTRAL_IN_LORA_PATH, check_extra_fields
from quickchange_server.api.named_adapters import check_upload
from quickchange_server.api.schemas import LoadLoraBody, UnloadLoraBody
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.errors import Conflict, InvalidRequest, NotFound, QuickchangeError
from quickchange_server.lora_roots import FolderFile
from quickchange_server.principal import Principal

TAG = "load_lora_adapter"
"""Marks the names that were first loaded here."""

router = APIRouter(tags=["vLLM"], route_class=ScopedRoute)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    body: LoadLoraBody, services: Services, caller: Writer
) -> PlainTextResponse:
    """Make the adapter in a folder a version; the same bytes again change nothing."""
    try:
        _check_on(services)
        headers = check_extra_fields(
            body.model_extra or {}, NEUTRAL_IN_LORA_PATH, 1, services.is_strict
        )
        if not body.lora_name or not body.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
        check_upload(caller, body.lora_name)
        services.quotas.count_try(caller.tenant)
        async with services.lora_roots.loading(caller.tenant, body.lora_name):
            files = await asyncio.to_thread(services.lora_roots.open_adapter, body.lora_path)
            try:
                with services.quotas.one_upload(caller.tenant):
                    await _load(body.lora_name, files, body.load_inplace, services, caller)
            finally:
                for file in files.values():
                    file.close()
    except QuickchangeError as error:
        note_refusal(error, services)
        raise
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' added successfully.", headers=headers
    )


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(
    body: UnloadLoraBody, services: Services, caller: Writer
) -> PlainTextResponse:
    """Delete an adapter that was loaded from a folder; running requests finish on it."""
    _check_on(services)
    headers = check_extra_fields(
        body.model_extra or {}, NEUTRAL_IN_LORA_PATH, 1, services.is_strict
    )
    name = body.lora_name
    if not name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
    async with services.lora_roots.loading(caller.tenant, name):
        await _unload(name, services, caller)
    return PlainTextResponse(
        f"Success: LoRA adapter '{name}' removed successfully.", headers=headers
    )


def _check_on(services: AppServices) -> None:
    if not services.lora_roots:
        raise NotFound(
            "adapters are not loaded from folders here: upload them (POST /v1/adapters), or start "
            "the server with --lora-root FOLDER"
        )


async def _load(
    name: str,
    files: dict[FileName, FolderFile],
    is_in_place: bool,
    services: AppServices,
    caller: Principal,
) -> None:
    """Copy an adapter's files and publish them, unless they are what the name means already.

    Raises: InvalidRequest, UploadRefused, TooLarge, Conflict, Forbidden, Unavailable, StorageFull.
    """
    num_bytes = sum(file.num_bytes for file in files.values())
    services.quotas.check_announced(
        caller.tenant, services.adapters.owned(caller.tenant), num_bytes
    )
    staged: dict[FileName, StagedFile] = {}
    try:
        for each, file in files.items():
            staged[each] = await services.adapters.stage(each, file.chunks())
        known = _known(name, services, caller)
        form = _form(name, staged, services, caller, is_new=known is None)
        if known is None or known.digest != version_digest(file_records(form)):
            if known is not None and not is_in_place:
                raise InvalidRequest(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                )
            await _publish(form, services)
    finally:
        await services.adapters.discard(list(staged.values()))


def _known(name: str, services: AppServices, caller: Principal) -> ResolvedModel | None:
    """Return what a name means to its owner now."""
    if not is_adapter_name(name):
        return None
    with suppress(NotFound):
        model = services.adapters.resolve(name, tenant=caller.tenant)
        return model if model.kind == "adapter" and model.tenant == caller.tenant else None
    return None


def _form(
    name: str,
    staged: dict[FileName, StagedFile],
    services: AppServices,
    caller: Principal,
    is_new: bool,
) -> UploadForm:
    return UploadForm(
        name,
        staged["adapter_config.json"],
        staged["adapter_model.safetensors"],
        staged.get("task.json"),
        alias=DEFAULT_ALIAS,
        tags=(TAG,) if is_new else (),
        tenant=caller.tenant,
        terms=upload_terms(services, caller),
    )


async def _publish(form: UploadForm, services: AppServices) -> None:
    result = await services.adapters.upload(form)
    if result.version.state == "disabled":
        raise Conflict(f"{form.name}:{result.version.version} is disabled: enable it first")


async def _unload(name: str, services: AppServices, caller: Principal) -> None:
    """Delete a name that was first loaded from a folder.

    Raises: NotFound, Conflict, Forbidden, Unavailable.
    """
    unknown = NotFound(
        f"The lora adapter '{name[:80]}' cannot be found.",
        code="adapter_not_found",
        param="lora_name",
    )
    if not caller.may_name(name):
        raise unknown
    try:
        view = await services.adapters.get(name, tenant=caller.tenant)
    except NotFound as error:
        raise unknown from error
    if TAG not in view.tags:
        raise Conflict(
            f"{name!r} was not loaded by load_lora_adapter, so it is not deleted here: use "
            f"DELETE /v1/adapters/{name}",
            param="lora_name",
        )
    await services.adapters.delete_adapter(name, tenant=caller.tenant, actor=caller.actor)
