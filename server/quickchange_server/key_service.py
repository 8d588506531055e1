"""API keys as the server offers them: made, listed, revoked; the keyring follows the catalog.

Lives on the event loop; the catalog's blocking calls run in threads. Knows no HTTP.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quickchange_adapters.api_keys import (
    KeyRecord,
    KeyScope,
    new_token,
    token_hash,
    token_id,
)
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_adapters.names import DEFAULT_TENANT

from quickchange_server.answers import as_answers
from quickchange_server.errors import Forbidden, InvalidRequest
from quickchange_server.keyring import Keyring
from quickchange_server.principal import Principal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeyWish:
    """What a key is to be. `tenant` None: the caller's own."""

    name: str = ""
    scopes: tuple[KeyScope, ...] = ("generate",)
    adapters: tuple[str, ...] | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class KeyPage:
    """One page of keys, oldest first: an OpenAI-style list."""

    data: tuple[KeyRecord, ...]
    has_more: bool

    def to_json(self) -> Json:
        """Return `{"object": "list", "data", "has_more", "first_id", "last_id"}`."""
        return {
            "object": "list",
            "data": [key_json(record) for record in self.data],
            "has_more": self.has_more,
            "first_id": self.data[0].id if self.data else None,
            "last_id": self.data[-1].id if self.data else None,
        }


class KeyService:
    """Makes, lists and revokes keys. An admin of the default tenant does so for all tenants.

    One change or `refresh` at a time: the keyring takes the catalog's states in their order.
    """

    def __init__(self, catalog: KeyCatalog, keyring: Keyring) -> None:
        self._catalog = catalog
        self._keyring = keyring
        self._changing = asyncio.Lock()

    async def refresh(self) -> None:
        """Read all keys anew, as another process may have changed them.

        Raises: Unavailable; the keyring stays as it was.
        """
        async with self._changing:
            with as_answers():
                self._keyring.load(await asyncio.to_thread(self._catalog.list_keys))

    async def create(self, wish: KeyWish, caller: Principal) -> tuple[KeyRecord, str]:
        """Make a key; return it and, for this once, what its owner is to send.

        Raises: InvalidRequest, Forbidden, Conflict (the first key must be an admin's), Unavailable.
        """
        tenant = caller.tenant if wish.tenant is None else wish.tenant
        if not _rules(caller, tenant):
            raise Forbidden(f"only an admin of the tenant 'default' makes keys of {tenant!r}")
        _check(wish, tenant)
        token = new_token()
        key_id = token_id(token)
        assert key_id is not None
        record = KeyRecord(
            id=key_id,
            tenant=tenant,
            secret_hash=token_hash(token),
            scopes=wish.scopes,
            adapters=wish.adapters,
            name=wish.name,
            created_at=0,
            created_by=caller.actor,
        )
        has_file = self._keyring.has_file_key
        made = await self._change(lambda: self._catalog.create(record, has_other_admin=has_file))
        return made, token

    async def revoke(self, key_id: str, caller: Principal) -> KeyRecord:
        """End a key: nobody gets in with it once this returns; what runs is finished.

        Raises: NotFound (key_not_found), Conflict (the last admin key), Unavailable.
        """
        tenant = None if _rules_all(caller) else caller.tenant
        has_file = self._keyring.has_file_key
        return await self._change(
            lambda: self._catalog.revoke(
                key_id, tenant=tenant, actor=caller.actor, has_other_admin=has_file
            )
        )

    async def list(
        self,
        caller: Principal,
        *,
        after: str | None = None,
        limit: int = 20,
        include_revoked: bool = False,
    ) -> KeyPage:
        """Return the keys of the caller's tenant, or all for an admin of the default tenant.

        Raises: InvalidRequest (`after` is no key of the list), Unavailable.
        """
        with as_answers():
            records = await asyncio.to_thread(self._catalog.list_keys)
        mine = [record for record in records if _rules(caller, record.tenant)]
        if after is not None:
            mine = _behind(mine, after)
        found = [record for record in mine if include_revoked or record.revoked_at is None]
        return KeyPage(tuple(found[:limit]), has_more=len(found) > limit)

    async def _change(self, function: Callable[[], KeyRecord]) -> KeyRecord:
        async with self._changing:
            with as_answers():
                record = await asyncio.to_thread(function)
            self._keyring.put(record)
            return record


def key_json(record: KeyRecord) -> Json:
    """Return the `api_key` object; nothing of it opens anything."""
    return {
        "object": "api_key",
        "id": record.id,
        "name": record.name,
        "tenant": record.tenant,
        "scopes": list(record.scopes),
        "adapters": None if record.adapters is None else list(record.adapters),
        "created_at": record.created_at,
        "created_by": record.created_by,
        "revoked_at": record.revoked_at,
    }


def _behind(records: Sequence[KeyRecord], key_id: str) -> list[KeyRecord]:
    places = {record.id: place for place, record in enumerate(records, start=1)}
    if key_id not in places:
        raise InvalidRequest(f"after: {key_id[:80]!r} is no key of this list", param="after")
    return list(records[places[key_id] :])


def _rules_all(caller: Principal) -> bool:
    return caller.tenant == DEFAULT_TENANT


def _rules(caller: Principal, tenant: str) -> bool:
    return _rules_all(caller) or caller.tenant == tenant


def _check(wish: KeyWish, tenant: str) -> None:
    """Refuse keys that would not be what they look like.

    Raises: InvalidRequest.
    """
    if wish.adapters is not None and not {"admin", "metrics"}.isdisjoint(wish.scopes):
        raise InvalidRequest(
            "adapters: a key limited to named adapters cannot have the scope 'admin' or 'metrics', "
            "which reach beyond them",
            param="adapters",
        )
    if "metrics" in wish.scopes and tenant != DEFAULT_TENANT:
        raise InvalidRequest(
            "scopes: the metrics are those of all tenants, so only a key of the tenant 'default' "
            "can have the scope 'metrics'",
            param="scopes",
        )
