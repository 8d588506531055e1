"""Who calls, and from where. Without keys only this machine may: its names, its pages.

The guard on `Host` and `Origin` keeps web pages of other sites, and names that were re-pointed to
this machine (DNS rebinding), away from a server that asks for no key.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends
from quickchange_adapters.names import DEFAULT_TENANT
from starlette.datastructures import Headers

from quickchange_server.errors import Forbidden


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. Without keys there is one tenant, and everybody is it."""

    tenant: str = DEFAULT_TENANT


async def _principal() -> Principal:
    return Principal()


Caller = Annotated[Principal, Depends(_principal)]


def check_loopback(headers: Headers, cors_origins: Sequence[str]) -> None:
    """Refuse a request that names another host, or comes from another site's page.

    Raises: Forbidden.
    """
    host = headers.get("host", "")
    if not _is_loopback(f"http://{host}"):
        raise Forbidden(
            f"the Host header {host[:80]!r} is not this machine's; without keys only loopback "
            "names (localhost, 127.0.0.1, [::1]) are answered",
            code="foreign_host",
        )
    origin = headers.get("origin")
    if origin is not None and origin not in cors_origins and not _is_loopback(origin):
        raise Forbidden(
            f"pages of {origin[:80]!r} may not call this server; allow them with --cors-origin",
            code="foreign_origin",
        )


def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
