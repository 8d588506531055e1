"""`/v1/adapters/{name}/pin` and its like: what versions are to be, everywhere or here alone."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from quickchange_server.api.adapters import IfMatch
from quickchange_server.api.auth import Admin
from quickchange_server.api.schemas import ActionBody
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.principal import Principal
from quickchange_server.state_actions import StateAction, WishAction

Json = dict[str, Any]
Body = ActionBody | None
Scope = Annotated[
    Literal["catalog", "replica"],
    Query(
        description="`catalog`: every server on the catalog, and after a restart; `replica`: here"
    ),
]

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=ScopedRoute)


@router.post("/{name}/pin")
async def pin(
    name: str, services: Services, caller: Admin, body: Body = None, scope: Scope = "catalog"
) -> Json:
    """Load a version now and keep it loaded, whoever else needs room."""
    return await _wish("pin", name, services, caller, body, scope)


@router.post("/{name}/unpin")
async def unpin(
    name: str, services: Services, caller: Admin, body: Body = None, scope: Scope = "catalog"
) -> Json:
    """Let a version go like any other when room is needed."""
    return await _wish("unpin", name, services, caller, body, scope)


@router.post("/{name}/merge")
async def merge(
    name: str, services: Services, caller: Admin, body: Body = None, scope: Scope = "catalog"
) -> Json:
    """Make a merged copy beside the untouched base."""
    return await _wish("merge", name, services, caller, body, scope)


@router.post("/{name}/unmerge")
async def unmerge(
    name: str, services: Services, caller: Admin, body: Body = None, scope: Scope = "catalog"
) -> Json:
    """Drop the merged copy."""
    return await _wish("unmerge", name, services, caller, body, scope)


@router.post("/{name}/disable")
async def disable(
    name: str,
    services: Services,
    caller: Admin,
    body: Body = None,
    scope: Scope = "catalog",
    if_match: IfMatch = None,
) -> Json:
    """Take a version out of service: 404 to new requests, running ones finish, the files stay."""
    return await _set_state("disable", name, services, caller, body, scope, if_match)


@router.post("/{name}/enable")
async def enable(
    name: str,
    services: Services,
    caller: Admin,
    body: Body = None,
    scope: Scope = "catalog",
    if_match: IfMatch = None,
) -> Json:
    """Put a version back into service."""
    return await _set_state("enable", name, services, caller, body, scope, if_match)


async def _wish(
    action: WishAction,
    name: str,
    services: AppServices,
    caller: Principal,
    body: Body,
    scope: str,
) -> Json:
    view = await services.adapters.wish(
        action,
        name,
        body.version if body else None,
        is_here_only=scope == "replica",
        tenant=caller.tenant,
        actor=caller.actor,
    )
    return view.to_json()


async def _set_state(
    action: StateAction,
    name: str,
    services: AppServices,
    caller: Principal,
    body: Body,
    scope: str,
    if_match: str | None,
) -> Json:
    view = await services.adapters.set_state(
        action,
        name,
        body.version if body else None,
        is_here_only=scope == "replica",
        if_match=if_match,
        tenant=caller.tenant,
        actor=caller.actor,
    )
    return view.to_json()
