"""`/v1/adapters`: upload, list, show, alias, load, delete. The work is the service's."""

from collections.abc import AsyncIterator
from contextlib import suppress
from email.utils import formatdate
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from quickchange_adapters.errors import Problem
from starlette.responses import JSONResponse, Response

from quickchange_server.adapter_downloads import HeldFile
from quickchange_server.adapter_service import FileName
from quickchange_server.adapter_upload import UploadTerms
from quickchange_server.adapter_views import AdapterView, DeletionView
from quickchange_server.api.auth import Reader, Writer
from quickchange_server.api.cold_loads import count_if_cold
from quickchange_server.api.etags import is_known
from quickchange_server.api.file_answer import FileAnswer
from quickchange_server.api.named_adapters import check_upload
from quickchange_server.api.schemas import INT64, ActionBody, AliasBody, LoadBody
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.api.upload import FILES, OPENAPI_BODY, UploadReader
from quickchange_server.errors import NotFound, QuickchangeError
from quickchange_server.principal import Principal

Json = dict[str, Any]
Version = Annotated[int, Path(ge=1, le=999_999_999)]
Timeout = Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)]
Limit = Annotated[int, Query(ge=1, le=100)]
IfMatch = Annotated[str | None, Header()]
IfNoneMatch = Annotated[str | None, Header()]

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=ScopedRoute)
_CHECKED_OR_THERE: dict[int | str, dict[str, Any]] = {
    200: {"description": "These bytes were there; or, of a dry run, the report"}
}


@router.post("", status_code=201, responses=_CHECKED_OR_THERE, openapi_extra=OPENAPI_BODY)
async def upload(
    request: Request, services: Services, caller: Writer, dry_run: bool = False
) -> Response:
    """Check and keep an adapter; 201 with the version, 200 when these bytes were there.

    With `dry_run=true` nothing is kept, and the report lists every problem.
    """
    try:
        with services.quotas.one_upload(caller.tenant):
            return await _read_and_keep(request, services, caller, dry_run)
    except QuickchangeError as error:
        note_refusal(error, services)
        raise


async def _read_and_keep(
    request: Request, services: AppServices, caller: Principal, dry_run: bool
) -> Response:
    reader = UploadReader(services.adapters, caller.tenant, upload_terms(services, caller))
    try:
        _admit(request, services, caller, dry_run)
        form = await reader.read(request, services.limits.upload_pace)
        check_upload(caller, form.name)
        if dry_run:
            return JSONResponse(await services.adapters.check(form))
        result = await services.adapters.upload(form)
    finally:
        await reader.discard()
    return JSONResponse(result.version.to_json(), 201 if result.created else 200)


def upload_terms(services: AppServices, caller: Principal) -> UploadTerms:
    """Return what holds for an upload: once there are keys, a new name is its tenant's alone."""
    visibility = "public" if services.keyring.is_open else "private"
    return UploadTerms(caller.actor, visibility, services.quotas.quota)


def _admit(request: Request, services: AppServices, caller: Principal, dry_run: bool) -> None:
    """Refuse, before the body is read, what comes too often or cannot fit.

    Raises: RateLimited, Forbidden.
    """
    services.quotas.count_try(caller.tenant)
    announced = request.headers.get("content-length", "")
    if services.quotas.quota is not None and announced.isdecimal() and not dry_run:
        owned = services.adapters.owned(caller.tenant)
        services.quotas.check_announced(caller.tenant, owned, int(announced))


def note_refusal(error: QuickchangeError, services: AppServices) -> None:
    """Count what the caller can mend, and list its reason as any other refusal's."""
    if error.status < 500:
        services.metrics.on_upload_refused(error.code)
        if not error.problems:
            error.problems = (Problem(error.code, error.param or "", error.message),)


@router.head("", include_in_schema=False)
@router.get("")
async def list_adapters(
    services: Services,
    caller: Reader,
    after: str | None = None,
    limit: Limit = 20,
) -> Json:
    """List adapters by name."""
    page = await services.adapters.list(
        after=after, limit=limit, tenant=caller.tenant, names=caller.adapters
    )
    return page.to_json()


@router.head("/{name}", include_in_schema=False)
@router.get("/{name}")
async def get_adapter(
    name: str, services: Services, caller: Reader, if_none_match: IfNoneMatch = None
) -> Response:
    """Show an adapter with its versions and aliases; the ETag covers both.

    `If-None-Match` makes it a 304 while they are as they were; tiers and last uses may differ then.
    """
    view = await services.adapters.get(name, tenant=caller.tenant)
    if is_known(if_none_match, view.etag):
        return Response(status_code=304, headers={"etag": view.etag})
    return _adapter(view)


@router.head("/{name}/events", include_in_schema=False)
@router.get("/{name}/events")
async def get_events(
    name: str,
    services: Services,
    caller: Reader,
    after: Annotated[int, Query(ge=0, lt=INT64)] = 0,
    limit: Limit = 20,
) -> Json:
    """Show what was done to a name, oldest first; an event's id is its place in that log.

    The oldest go by age and number; the others keep their places.
    """
    events = await services.adapters.events(
        name, tenant=caller.tenant, after=after, limit=limit + 1
    )
    page = events[:limit]
    return {
        "object": "list",
        "data": page,
        "has_more": len(events) > limit,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


@router.head("/{name}/versions/{version}", include_in_schema=False)
@router.get("/{name}/versions/{version}")
async def get_version(name: str, version: Version, services: Services, caller: Reader) -> Json:
    """Show one version with the report of its upload."""
    view = await services.adapters.get_version(name, version, tenant=caller.tenant)
    return view.to_json()


async def _held_file(
    name: str, version: Version, file: str, services: Services, caller: Reader
) -> AsyncIterator[HeldFile]:
    """Give a file; it is held until the answer was sent."""
    known: dict[str, FileName] = {each: each for each in FILES.values()}
    if file not in known:
        raise NotFound(
            f"{file[:80]!r} is not a file of an adapter; use {', '.join(known)}",
            code="file_not_found",
        )
    opened = services.adapters.open_file(name, version, known[file], tenant=caller.tenant)
    async with opened as held:
        yield held


@router.head("/{name}/versions/{version}/files/{file}", include_in_schema=False)
@router.get("/{name}/versions/{version}/files/{file}", response_class=FileAnswer)
async def get_file(
    file: str,
    held: Annotated[HeldFile, Depends(_held_file)],
    caller: Reader,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Download one file of a version, byte for byte as it was uploaded; its ETag is its sha256."""
    # The file's own time is that of whoever sent these bytes last, and differs between servers.
    headers = {
        "etag": f'"{held.sha256}"',
        "last-modified": formatdate(held.created_at, usegmt=True),
    }
    if is_known(if_none_match, headers["etag"]):
        return Response(status_code=304, headers=headers)
    return FileAnswer(held.path, filename=file, headers=headers)


@router.delete("/{name}")
async def delete_adapter(
    name: str,
    services: Services,
    caller: Writer,
    timeout_s: Timeout = 30.0,
    if_match: IfMatch = None,
) -> Response:
    """Delete an adapter: unknown at once, running requests finish; 202 when they still run."""
    done = await services.adapters.delete_adapter(
        name,
        timeout_s=timeout_s,
        if_match=if_match,
        tenant=caller.tenant,
        actor=caller.actor,
    )
    return _deletion(done)


@router.delete("/{name}/versions/{version}")
async def delete_version(
    name: str,
    version: Version,
    services: Services,
    caller: Writer,
    timeout_s: Timeout = 30.0,
    if_match: IfMatch = None,
) -> Response:
    """Delete one version that no alias points at."""
    done = await services.adapters.delete_version(
        name,
        version,
        timeout_s=timeout_s,
        if_match=if_match,
        tenant=caller.tenant,
        actor=caller.actor,
    )
    return _deletion(done)


@router.put("/{name}/aliases/{alias}")
async def put_alias(
    name: str,
    alias: str,
    body: AliasBody,
    services: Services,
    caller: Writer,
    if_match: IfMatch = None,
) -> Response:
    """Point an alias at a version, atomically; `If-Match` makes it compare-and-swap."""
    view = await services.adapters.set_alias(
        name, alias, body.version, if_match=if_match, tenant=caller.tenant, actor=caller.actor
    )
    return _adapter(view)


@router.delete("/{name}/aliases/{alias}")
async def delete_alias(
    name: str, alias: str, services: Services, caller: Writer, if_match: IfMatch = None
) -> Response:
    """Remove an alias; its version stays."""
    view = await services.adapters.delete_alias(
        name, alias, if_match=if_match, tenant=caller.tenant, actor=caller.actor
    )
    return _adapter(view)


@router.post("/{name}/load")
async def load(name: str, services: Services, caller: Writer, body: LoadBody | None = None) -> Json:
    """Bring a version into host memory, or to the device before a request needs it there."""
    version = _version(body)
    model = name if version is None else f"{name}:{version}"
    with suppress(NotFound):  # the service says what there is not
        meant = services.adapters.resolve(model, tenant=caller.tenant)
        if meant.kind == "adapter":
            count_if_cold([meant.digest], services, caller.tenant)
    view = await services.adapters.load(
        name,
        version,
        to_device=body is not None and body.tier == "device",
        tenant=caller.tenant,
    )
    return view.to_json()


@router.post("/{name}/unload")
async def unload(
    name: str,
    services: Services,
    caller: Writer,
    body: ActionBody | None = None,
    timeout_s: Timeout = 30.0,
) -> Json:
    """Give device and host bytes back; the next request loads the version again."""
    view = await services.adapters.unload(
        name, _version(body), timeout_s=timeout_s, tenant=caller.tenant
    )
    return view.to_json()


def _version(body: ActionBody | None) -> int | None:
    return body.version if body else None


def _adapter(view: AdapterView) -> Response:
    return JSONResponse(view.to_json(), headers={"etag": view.etag})


def _deletion(view: DeletionView) -> Response:
    return JSONResponse(view.to_json(), 200 if view.done else 202)
