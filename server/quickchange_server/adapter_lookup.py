"""What a caller means by a name, a version or a model string, or the error that says it is nothing.

Look-ups in memory, on the event loop: nothing here waits.
"""

from quickchange_adapters.names import DEFAULT_ALIAS
from quickchange_adapters.records import AdapterRecord, VersionRecord

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_views import ResolvedModel
from quickchange_server.errors import Conflict, Forbidden, NotFound


class AdapterLookup:
    """Finds records in the directory. A `number` of None means the alias `default`."""

    def __init__(self, directory: AdapterDirectory) -> None:
        self._directory = directory

    def adapter(self, name: str, tenant: str) -> AdapterRecord:
        """Return what a tenant gets under a name.

        Raises: NotFound (adapter_not_found).
        """
        record = self._directory.get(name, tenant)
        if record is None:
            raise unknown_adapter(name)
        return record

    def is_static(self, name: str) -> bool:
        """Whether a name is served from a folder given at start."""
        return self._directory.get_static(name) is not None

    def owner(self, name: str, tenant: str) -> str:
        """Return the tenant whose adapter is to be changed: the caller's own, and not static.

        Raises: NotFound, Conflict, Forbidden.
        """
        record = self.adapter(name, tenant)
        if self.is_static(name):
            raise Conflict(f"{name!r} is static (--adapter): it cannot be changed over REST")
        if record.tenant != tenant:
            raise foreign_adapter(name)
        return record.tenant

    def version(self, name: str, number: int | None, tenant: str) -> VersionRecord:
        """Return a version, whatever its state.

        Raises: NotFound (adapter_not_found, version_not_found).
        """
        adapter = self.adapter(name, tenant)
        wanted = adapter.aliases.get(DEFAULT_ALIAS) if number is None else number
        version = None if wanted is None else adapter.version(wanted)
        if version is None:
            what = f"{name}@{DEFAULT_ALIAS}" if number is None else f"{name}:{number}"
            raise NotFound(f"there is no version {what}", code="version_not_found")
        return version

    def live_version(self, name: str, number: int | None, tenant: str) -> VersionRecord:
        """Return a version that is not being deleted, and is the tenant's to act on.

        Raises: NotFound (adapter_not_found, version_not_found), Forbidden (another tenant's).
        """
        version = self.version(name, number, tenant)
        if version.tenant != tenant:
            raise foreign_adapter(name)
        if version.state == "deleting":
            raise NotFound(f"{name}:{version.number} is being deleted", code="version_not_found")
        return version

    def ready_version(self, name: str, number: int | None, tenant: str) -> VersionRecord:
        """Return a version that takes requests.

        Raises: NotFound (adapter_not_found, version_not_found), Conflict (it is disabled).
        """
        version = self.live_version(name, number, tenant)
        if version.state == "disabled":
            raise Conflict(f"{name}:{version.number} is disabled: enable it first")
        return version

    def meant(self, model: str, tenant: str) -> VersionRecord:
        """Return the version that a model string means now, if it takes requests.

        Raises: NotFound (model_not_found).
        """
        version = self._directory.find(model, tenant)
        if version is None:
            raise unknown_model(model)
        return version

    def still_served(self, resolved: ResolvedModel) -> VersionRecord:
        """Return the version that a model string was resolved to, if it still takes requests.

        Raises: NotFound (model_not_found).
        """
        adapter = self._directory.get(resolved.served_name, resolved.tenant)
        version = adapter.version(resolved.version or 0) if adapter else None
        if version is None or version.state != "ready" or version.digest != resolved.digest:
            raise unknown_model(resolved.served_name)
        return version


def unknown_adapter(name: str) -> NotFound:
    """Return the error for a name that nobody has, or not this caller."""
    return NotFound(f"there is no adapter {name[:80]!r}", code="adapter_not_found")


def foreign_adapter(name: str) -> Forbidden:
    """Return the error for another tenant's public adapter, which the caller may only use."""
    return Forbidden(f"{name!r} belongs to another tenant: you may use it, not change it")


def unknown_model(model: str) -> NotFound:
    """Return the error for a model string that means nothing."""
    return NotFound(
        f"there is no model {model[:80]!r}; GET /v1/models lists them",
        code="model_not_found",
        param="model",
    )
