"""Who calls: the tenant, what its key may do, and which adapters it may name."""

from dataclasses import dataclass

from quickchange_adapters.api_keys import KEY_SCOPES, KeyScope
from quickchange_adapters.names import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. As long as there are no keys there is one tenant, and everybody is it.

    `adapters`: the only names that the caller may use; None: no such limit. `key_id`: empty without
    a key.
    """

    tenant: str = DEFAULT_TENANT
    scopes: frozenset[KeyScope] = frozenset(KEY_SCOPES)
    key_id: str = ""
    adapters: frozenset[str] | None = None

    @property
    def actor(self) -> str:
        """What the audit log calls the caller."""
        return self.key_id

    def may_name(self, adapter: str) -> bool:
        """Whether the caller's key covers an adapter's name, be there such an adapter or not."""
        return self.adapters is None or adapter in self.adapters
