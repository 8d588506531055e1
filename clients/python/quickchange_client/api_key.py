"""API keys as the server shows them. Only a new one comes with what its owner is to send."""

from typing import Literal

from pydantic import Field

from quickchange_client.answer import Answer

Scope = Literal["generate", "adapters:read", "adapters:write", "admin", "metrics"]


class ApiKey(Answer):
    """A key: what it may do, whose it is. Times are seconds since 1970.

    `adapters` None: not limited to named ones. `created_by` is the id of the key that made it.
    """

    object: str = "api_key"
    id: str
    name: str = ""
    tenant: str = "default"
    scopes: list[str] = Field(default_factory=list)
    adapters: list[str] | None = None
    created_at: int | None = None
    created_by: str = ""
    revoked_at: int | None = None


class NewApiKey(ApiKey):
    """A key that was just made. `secret` is what its owner sends; nobody can show it again."""

    secret: str = Field(repr=False)


class ApiKeyPage(Answer):
    """Keys, oldest first; with `has_more`, ask again with `after=last_id`."""

    data: list[ApiKey]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
