"""What can be done with API keys, for plain and for async code."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from quickchange_client.api_key import ApiKey, ApiKeyPage, NewApiKey, Scope
from quickchange_client.call import Call
from quickchange_client.connection import AsyncConnection, Connection
from quickchange_client.errors import ArgumentInvalid

PATH = "/v1/keys"


class Keys:
    """API keys; all of it needs a key with the scope `admin`, but the very first one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        *,
        name: str = "",
        scopes: Sequence[Scope] = ("generate",),
        adapters: Sequence[str] | None = None,
        tenant: str | None = None,
    ) -> NewApiKey:
        """Make a key. Its `secret` is shown this once.

        `adapters`: the only ones it may name. `tenant` None: that of the key which makes it.
        """
        return self._connection.send(_create(name, scopes, adapters, tenant))

    def list(
        self, *, after: str | None = None, limit: int | None = None, include_revoked: bool = False
    ) -> ApiKeyPage:
        """Return one page of keys, oldest first; `iterate` walks all pages."""
        return self._connection.send(_list(after, limit, include_revoked))

    def iterate(self, *, include_revoked: bool = False) -> Iterator[ApiKey]:
        """Yield every key, asking for pages as needed."""
        page = self.list(include_revoked=include_revoked)
        yield from page.data
        while page.has_more and page.last_id is not None:
            page = self.list(after=page.last_id, include_revoked=include_revoked)
            yield from page.data

    def revoke(self, key_id: str) -> ApiKey:
        """End a key, at once and for good; what runs with it is finished."""
        return self._connection.send(_revoke(key_id))


class AsyncKeys:
    """API keys; all of it needs a key with the scope `admin`, but the very first one."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
        self,
        *,
        name: str = "",
        scopes: Sequence[Scope] = ("generate",),
        adapters: Sequence[str] | None = None,
        tenant: str | None = None,
    ) -> NewApiKey:
        """Make a key. Its `secret` is shown this once.

        `adapters`: the only ones it may name. `tenant` None: that of the key which makes it.
        """
        return await self._connection.send(_create(name, scopes, adapters, tenant))

    async def list(
        self, *, after: str | None = None, limit: int | None = None, include_revoked: bool = False
    ) -> ApiKeyPage:
        """Return one page of keys, oldest first; `iterate` walks all pages."""
        return await self._connection.send(_list(after, limit, include_revoked))

    async def iterate(self, *, include_revoked: bool = False) -> AsyncIterator[ApiKey]:
        """Yield every key, asking for pages as needed."""
        page = await self.list(include_revoked=include_revoked)
        for key in page.data:
            yield key
        while page.has_more and page.last_id is not None:
            page = await self.list(after=page.last_id, include_revoked=include_revoked)
            for key in page.data:
                yield key

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key, at once and for good; what runs with it is finished."""
        return await self._connection.send(_revoke(key_id))


def _create(
    name: str, scopes: Sequence[Scope], adapters: Sequence[str] | None, tenant: str | None
) -> Call[NewApiKey]:
    """Make a key. Not repeated: the first one's secret would be lost."""
    body: dict[str, Any] = {"name": name, "scopes": list(scopes)}
    if adapters is not None:
        body["adapters"] = list(adapters)
    if tenant is not None:
        body["tenant"] = tenant
    return Call("POST", PATH, NewApiKey, body=body, is_repeatable=False)


def _list(after: str | None, limit: int | None, include_revoked: bool) -> Call[ApiKeyPage]:
    query: dict[str, str | int | float] = {}
    if after is not None:
        query["after"] = after
    if limit is not None:
        query["limit"] = limit
    if include_revoked:
        query["include_revoked"] = "true"
    return Call("GET", PATH, ApiKeyPage, query=query)


def _revoke(key_id: str) -> Call[ApiKey]:
    if key_id in ("", ".", ".."):
        raise ArgumentInvalid(f"{key_id!r} is no id of a key; `keys.list` shows them")
    return Call("DELETE", f"{PATH}/{quote(key_id, safe='')}", ApiKey)
