"""Adapters as the API shows them: plain values and their JSON. Knows no engine and no catalog."""

from dataclasses import dataclass, field
from typing import Any, Literal

from quickchange_adapters.names import DEFAULT_TENANT
from quickchange_adapters.task import Task

Json = dict[str, Any]
VersionState = Literal["ready", "quarantined", "disabled", "deleting"]
Tier = Literal["remote", "disk", "host", "device"]
ActionName = Literal["load", "unload", "pin", "unpin", "merge", "unmerge", "disable", "enable"]


@dataclass(frozen=True, slots=True)
class VersionView:
    """One immutable upload: `adapter.version`.

    Times are seconds since 1970. `num_requests` and `last_used_at` are this process's. `report` is
    the report of its upload; in lists it is None.
    """

    name: str
    version: int
    digest: str
    state: VersionState
    peft_type: str
    rank: int
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    task: Json | None
    file_bytes: int
    host_bytes: int
    device_bytes: int
    tier: Tier
    pinned: bool
    merged: bool
    base: str
    created_at: int
    last_used_at: int | None
    num_requests: int
    report: Json | None

    def to_json(self) -> Json:
        """Return the contract's `adapter.version` object."""
        return {
            "object": "adapter.version",
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "state": self.state,
            "peft_type": self.peft_type,
            "rank": self.rank,
            "ranks": list(self.ranks),
            "target_modules": list(self.target_modules),
            "task": self.task,
            "bytes": {
                "file": self.file_bytes,
                "host": self.host_bytes,
                "device": self.device_bytes,
            },
            "tier": self.tier,
            "pinned": self.pinned,
            "merged": self.merged,
            "base": self.base,
            "created_at": self.created_at,
            "last_used_at": self.last_used_at,
            "requests": self.num_requests,
            "report": self.report,
        }


@dataclass(frozen=True, slots=True)
class AdapterView:
    """A name with its versions and aliases: `adapter`.

    `etag` changes with versions, aliases and tags, never with tier or last use. `is_static`: given
    with `--adapter`, read-only over REST.
    """

    name: str
    tenant: str
    visibility: str
    aliases: dict[str, int]
    versions: tuple[VersionView, ...]
    tags: tuple[str, ...]
    created_at: int
    etag: str
    is_static: bool = False

    def to_json(self) -> Json:
        """Return the contract's `adapter` object."""
        return {
            "object": "adapter",
            "name": self.name,
            "tenant": self.tenant,
            "visibility": self.visibility,
            "aliases": dict(self.aliases),
            "versions": [version.to_json() for version in self.versions],
            "tags": list(self.tags),
            "created_at": self.created_at,
        }


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """One page of adapters, sorted by name: an OpenAI-style list."""

    data: tuple[AdapterView, ...]
    has_more: bool

    def to_json(self) -> Json:
        """Return `{"object": "list", "data", "has_more", "first_id", "last_id"}`."""
        return {
            "object": "list",
            "data": [adapter.to_json() for adapter in self.data],
            "has_more": self.has_more,
            "first_id": self.data[0].name if self.data else None,
            "last_id": self.data[-1].name if self.data else None,
        }


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What an upload made: answer 201 when `created`, else 200 (the same bytes were there)."""

    created: bool
    version: VersionView


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """Bytes that a deletion or an unload gave back, per tier."""

    device: int = 0
    host: int = 0
    merged: int = 0
    disk: int = 0
    remote: int = 0

    def __add__(self, other: "FreedBytes") -> "FreedBytes":
        """Sum two replies, tier by tier."""
        return FreedBytes(
            self.device + other.device,
            self.host + other.host,
            self.merged + other.merged,
            self.disk + other.disk,
            self.remote + other.remote,
        )

    def to_json(self) -> dict[str, int]:
        """Return the bytes by tier."""
        return {
            "device": self.device,
            "host": self.host,
            "merged": self.merged,
            "disk": self.disk,
            "remote": self.remote,
        }


@dataclass(frozen=True, slots=True)
class DeletionView:
    """What a DELETE did: answer 200 when `done`, else 202 (requests still run on it).

    `version` is None when the whole adapter was deleted.
    """

    name: str
    version: int | None
    done: bool
    freed: FreedBytes = field(default_factory=FreedBytes)

    def to_json(self) -> Json:
        """Return `{"object", "name", "version"?, "deleted", "state", "freed_bytes"}`."""
        whole = self.version is None
        return {
            "object": "adapter.deleted" if whole else "adapter.version.deleted",
            "name": self.name,
            **({} if whole else {"version": self.version}),
            "deleted": self.done,
            "state": "deleted" if self.done else "deleting",
            "freed_bytes": self.freed.to_json(),
        }


@dataclass(frozen=True, slots=True)
class ActionView:
    """What an action did, and where the version is now."""

    action: ActionName
    version: VersionView
    merged_bytes: int
    freed: FreedBytes
    seconds: float
    replica: str

    def to_json(self) -> Json:
        """Return the contract's reply: tier, bytes, time taken, replica."""
        version = self.version
        return {
            "object": "adapter.action",
            "action": self.action,
            "name": version.name,
            "version": version.version,
            "digest": version.digest,
            "state": version.state,
            "tier": version.tier,
            "pinned": version.pinned,
            "merged": version.merged,
            "bytes": {
                "host": version.host_bytes,
                "device": version.device_bytes,
                "merged": self.merged_bytes,
            },
            "freed_bytes": self.freed.to_json(),
            "seconds": self.seconds,
            "replica": self.replica,
        }


@dataclass(frozen=True, slots=True)
class ModelView:
    """One entry of `GET /v1/models`. `root` is the version behind the id, e.g. `sentiment:3`."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int

    def to_json(self) -> Json:
        """Return OpenAI's `model` object with vLLM's additions."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "quickchange",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.max_model_len,
        }


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model string, resolved once at admission: the base, or one version of an adapter.

    `served_name` is the adapter's bare name (or the base's); `tenant` whose it is. For the base,
    `digest` is the base's own and `version` is None. `task` is the version's task.json, if any.
    """

    kind: Literal["base", "adapter"]
    served_name: str
    digest: str
    tenant: str = DEFAULT_TENANT
    version: int | None = None
    task: Task | None = None

    @property
    def label(self) -> str:
        """What metrics call the adapter."""
        return adapter_label(self.served_name, self.tenant)


def adapter_label(name: str, tenant: str) -> str:
    """Return what metrics call an adapter: its name, after its tenant's unless that is default."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"
