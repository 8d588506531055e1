"""Who calls, and from where. Without keys only this machine may: its names, its pages.

The guard on `Host` and `Origin` keeps web pages of other sites, and names that were re-pointed to
this machine (DNS rebinding), away from a server that asks for no key.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from quickchange_adapters.names import DEFAULT_TENANT
from starlette.datastructures import Headers

from quickchange_server.errors import Forbidden

_HOST = re.compile(r"(?P<name>[A-Za-z0-9.-]+|\[(?P<address>[0-9A-Fa-f:.]+)\])(:[0-9]{0,5})?")


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. Without keys there is one tenant, and everybody is it."""

    tenant: str = DEFAULT_TENANT


async def _principal() -> Principal:
    return Principal()


Caller = Annotated[Principal, Depends(_principal)]


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
