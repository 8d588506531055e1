"""`/v1/keys`: make, list and revoke API keys. The work is the key service's."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from quickchange_server.api.auth import Admin
from quickchange_server.api.schemas import KeyBody
from quickchange_server.api.scoped_route import ScopedRoute
from quickchange_server.api.services import AppServices, Services
from quickchange_server.errors import Forbidden, Unavailable
from quickchange_server.key_service import KeyService, KeyWish, key_json

Json = dict[str, Any]
NOT_STORED = {"cache-control": "no-store"}

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=ScopedRoute)


@router.post("", status_code=201)
async def create_key(body: KeyBody, services: Services, caller: Admin) -> Response:
    """Make a key; `secret` is what its owner sends, and is shown this once.

    The first key must be an admin's. From then on every call needs a key.
    """
    if services.keyring.is_open and not services.is_loopback_only:
        raise Forbidden(
            "anybody may reach this server, so it does not make its first key over HTTP: "
            "start it with --admin-key-file"
        )
    adapters = None if body.adapters is None else tuple(body.adapters)
    wish = KeyWish(body.name, tuple(body.scopes), adapters, body.tenant)
    record, secret = await _service(services).create(wish, caller)
    return JSONResponse({**key_json(record), "secret": secret}, 201, headers=NOT_STORED)


@router.head("", include_in_schema=False)
@router.get("")
async def list_keys(
    services: Services,
    caller: Admin,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    include_revoked: bool = False,
) -> Json:
    """List keys, oldest first, without their secrets."""
    page = await _service(services).list(
        caller, after=after, limit=limit, include_revoked=include_revoked
    )
    return page.to_json()


@router.delete("/{key_id}")
async def revoke_key(key_id: str, services: Services, caller: Admin) -> Json:
    """Revoke a key: at once, and for good."""
    record = await _service(services).revoke(key_id, caller)
    return {**key_json(record), "object": "api_key.deleted", "deleted": True}


def _service(services: AppServices) -> KeyService:
    if services.keys is None:
        raise Unavailable("this server has no catalog to keep keys in", code="store_unavailable")
    return services.keys
