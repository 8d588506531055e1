"""Who calls, from where, and what a route asks of the caller's key.

A route declares the scope that it needs by its caller's type: `Generator`, `Reader`, `Writer`,
`Admin`, `Scraper`, or `AnyKey`. Without keys only this machine may call: the guard on `Host` and
`Origin` keeps web pages of other sites, and names that were re-pointed to this machine (DNS
rebinding), away from a server that asks for no key.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from quickchange_adapters.api_keys import KeyScope
from starlette.datastructures import Headers

from quickchange_server.adapter_lookup import unknown_adapter
from quickchange_server.errors import Forbidden, InvalidApiKey, ScopeMissing
from quickchange_server.keyring import Keyring
from quickchange_server.principal import Principal

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/version"})
"""What is answered without a key."""

_HOST = re.compile(r"(?P<name>[A-Za-z0-9.-]+|\[(?P<address>[0-9A-Fa-f:.]+)\])(:[0-9]{0,5})?")


class Needs(SecurityBase):
    """A dependency that hands a route its caller, whose key must have a scope (None: any key).

    `check` is called before the body is read; see ScopedRoute. OpenAPI shows it as a bearer key.
    """

    def __init__(self, scope: KeyScope | None) -> None:
        self.scope = scope
        self.scheme_name = scope or "any key"
        needed = f"with the scope `{scope}`" if scope else "of any scope"
        self.model = HTTPBearer(description=f"An API key {needed}, once there are keys.")

    async def __call__(self, request: Request) -> Principal:
        """Return the caller."""
        return caller_of(request)

    def check(self, request: Request) -> None:
        """Refuse a caller whose key does not cover the route, or the adapter in its path.

        Raises: ScopeMissing, NotFound (the adapter is not one of the key's).
        """
        caller = caller_of(request)
        if self.scope is not None and self.scope not in caller.scopes:
            raise ScopeMissing(self.scope)
        name = request.path_params.get("name")
        if name is not None and not caller.may_name(name):
            raise unknown_adapter(name)


Generator = Annotated[Principal, Depends(Needs("generate"))]
Reader = Annotated[Principal, Depends(Needs("adapters:read"))]
Writer = Annotated[Principal, Depends(Needs("adapters:write"))]
Admin = Annotated[Principal, Depends(Needs("admin"))]
Scraper = Annotated[Principal, Depends(Needs("metrics"))]
AnyKey = Annotated[Principal, Depends(Needs(None))]


def caller_of(request: Request) -> Principal:
    """Return who sent a request, as the key guard found out."""
    caller: Principal = request.state.principal
    return caller


def authenticate(headers: Headers, keyring: Keyring) -> Principal:
    """Return who sent a request; without any key in the world, everybody is the default tenant.

    Raises: InvalidApiKey.
    """
    if keyring.is_open:
        return Principal()
    sent = headers.getlist("authorization")
    scheme, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise InvalidApiKey("no API key came with this request; send Authorization: Bearer KEY")
    principal = keyring.authenticate(token.strip())
    if principal is None:
        raise InvalidApiKey("this API key is not known here, or was revoked; use another one")
    return principal


def check_loopback(headers: Headers, cors_origins: Sequence[str], *, needs_host: bool) -> None:
    """Refuse a request that names another host, or comes from another site's page.

    A request without Host passes unless `needs_host`; it can name no other host then.

    Raises: Forbidden.
    """
    hosts = headers.getlist("host")
    is_ours = len(hosts) == 1 and _is_loopback(hosts[0])
    if not is_ours and (hosts or needs_host):
        raise Forbidden(
            f"the Host header {', '.join(hosts)[:80]!r} is not this machine's; without keys only "
            "loopback names (localhost, 127.0.0.1, [::1]) are answered",
            code="foreign_host",
        )
    origin = headers.get("origin")
    if origin is not None and origin not in cors_origins and not _is_loopback_origin(origin):
        raise Forbidden(
            f"pages of {origin[:80]!r} may not call this server; allow them with --cors-origin",
            code="foreign_origin",
        )


def _is_loopback_origin(origin: str) -> bool:
    scheme, separator, host = origin.partition("://")
    return bool(scheme and separator) and _is_loopback(host)


def _is_loopback(host: str) -> bool:
    """Whether `host[:port]` names this machine. Source: RFC 3986, 3.2.2; no user, no path."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match["name"].lower()
    if name.removesuffix(".") == "localhost" or name.endswith((".localhost", ".localhost.")):
        return True
    try:
        return ipaddress.ip_address(match["address"] or name).is_loopback
    except ValueError:
        return False
